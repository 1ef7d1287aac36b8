"""The Triton backend without a GPU: its kernels run in Triton's interpreter, in a process of their own."""

import ast
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseflash as sf

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")

CASES = Path(__file__).parents[1] / "triton_cases.py"
SEED = int(os.environ.get("SPARSEFLASH_SEED", "0"))


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python with the interpreter switched on, which is decided when Triton is imported."""
    source = Path(sf.__file__).parent.parent
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{source}{os.pathsep}{CASES.parent}"}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def hold(first: int, last: int) -> None:
    done = interpreted(str(CASES), "--seeds", str(first), str(last))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "the same bits" in done.stdout


def test_every_kind_of_plan_agrees_with_fp64_forward_and_backward():
    hold(SEED, SEED + 1)


@pytest.mark.slow
def test_many_plans_agree_with_fp64_forward_and_backward():
    hold(1000 * SEED + 1, 1000 * SEED + 9)


def test_what_the_interpreter_gets_wrong_is_refused():
    code = (
        "import torch, sparseflash as sf\n"
        "q = torch.randn(1, 1, 16, 16, dtype=torch.bfloat16)\n"
        "try: sf.attention(q, q, q, backend='triton')\n"
        "except sf.BackendError as error: print(error)\n"
    )
    assert "bf16" in interpreted("-c", code).stdout


def test_no_kernel_adds_from_two_places():
    """Atomics and locks make sums depend on timing; loads, stores and reductions of a program do not."""
    folder = Path(sf.__file__).with_name("backends") / "triton"
    used = {
        (path.name, node.attr)
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tl"
    }
    assert ("rows.py", "store") in used
    assert not {
        (name, call) for name, call in used if "atomic" in call or "lock" in call or "barrier" in call
    }


def test_a_head_that_is_too_wide_is_refused_with_every_other_reason():
    from sparseflash.backends import triton as backend

    wide = torch.empty(1, 1, 2, 640, dtype=torch.float64)
    reasons = "; ".join(backend.refuse(wide, wide, wide))
    assert "head dimension 640 (up to 576" in reasons and "float64" in reasons and "on cpu" in reasons


def test_without_a_gpu_the_backend_says_why_it_does_not_run():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    q = torch.randn(1, 1, 16, 16)
    with pytest.raises(sf.BackendError, match="tensors are on cpu"):
        sf.attention(q, q, q, backend="triton")
    assert not sf.backend_status()["triton"].usable


# ---------------------------------------------------------------- whether a card is trusted


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that says its name, and a home for what is remembered."""
    from types import SimpleNamespace

    from sparseflash.backends.triton import trust

    says = SimpleNamespace(name="Card 9000", ran=[], found="", device=torch.device("cuda", 0))
    monkeypatch.setenv("SPARSEFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: says.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trust, "_known", {})
    monkeypatch.setattr(trust, "faults", lambda device: says.ran.append(says.name) or says.found)
    trust.card_of.cache_clear()
    yield says
    trust.card_of.cache_clear()


def forget(trust):
    """As another process."""
    trust._known.clear()
    trust.card_of.cache_clear()


@pytest.mark.parametrize("mode", ["inference", "no_grad", "default device", "autocast", "none"])
def test_the_check_of_a_card_is_the_same_in_whatever_mode_it_is_asked_for(mode):
    """What it finds is remembered: the first call of a server stands under `torch.inference_mode()`."""
    from sparseflash.backends import reference
    from sparseflash.backends.triton import trust

    def wrong(*given, **how):
        return [1.01 * x for x in reference.backward(*given, **how)[:3]]

    def shifted(*given, **how):
        out, lse, norm = reference.forward(*given, **how)
        return out, lse + 0.1, norm

    modes = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "default device": torch.device("meta"),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    with modes.get(mode, contextlib.nullcontext()):
        assert trust.faults(torch.device("cpu"), (reference.forward, reference.backward)) == ""
        assert "dq of dense" in trust.faults(torch.device("cpu"), (reference.forward, wrong))
        assert "lse of dense" in trust.faults(torch.device("cpu"), (shifted, reference.backward))


def test_a_card_is_checked_once_and_then_trusted_without_being_asked_for(card, monkeypatch):
    from sparseflash.backends import dispatch
    from sparseflash.backends.triton import trust

    assert "not checked on this card yet" in trust.standing()
    with pytest.warns(RuntimeWarning, match="checking the Triton kernels on Card 9000, once"):
        assert trust.caution(card) == ""
    assert trust.caution(card) == "" and len(card.ran) == 1
    forget(trust)
    assert trust.standing() == "checked on this card"
    assert trust.caution(card) == "" and len(card.ran) == 1, "remembered by another process"
    (path,) = (Path(os.environ["SPARSEFLASH_CACHE"]) / "triton").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(dispatch._load("triton"), "refuse", lambda *tensors: [])
    assert dispatch.choose("forward", "", card).NAME == "triton"
    card.name = "Card 9001"
    forget(trust)
    with pytest.warns(RuntimeWarning, match="Card 9001"):
        assert trust.caution(card) == "" and len(card.ran) == 2, "another card"


def test_a_card_that_fails_is_left_alone_with_a_word(card, monkeypatch):
    from sparseflash.backends import dispatch
    from sparseflash.backends.triton import trust

    card.found = "dq of dense: off by 3"
    with pytest.warns(RuntimeWarning, match="checking"):
        assert "failed its check on this card (dq of dense: off by 3)" in trust.caution(card)
    monkeypatch.setattr(dispatch._load("triton"), "refuse", lambda *tensors: [])
    monkeypatch.setattr(dispatch._load("reference"), "refuse", lambda *tensors: [])
    monkeypatch.setattr(dispatch._load("cpu"), "refuse", lambda *tensors: ["tensors are on cuda:0"])
    dispatch._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="the reference runs, which is slow: triton failed its check"):
        assert dispatch.choose("forward", "", card).NAME == "reference"
    assert dispatch.choose("forward", "triton", card).NAME == "triton"

    def crash(device):
        raise ValueError("no such instruction")

    monkeypatch.setattr(trust, "faults", crash)
    forget(trust)
    assert "failed its check" in trust.caution(card), "a failure is remembered, too"
    assert "raised ValueError: no such instruction" in trust.checked(trust.card_of(card.device), card.device)


@pytest.mark.parametrize("harm", ["empty", "other", "writable", "text"])
def test_what_is_remembered_of_a_card_is_believed_only_if_it_is_whole_and_ours(card, harm):
    from sparseflash.backends.triton import trust

    with pytest.warns(RuntimeWarning, match="checking"):
        trust.caution(card)
    path = trust._path(trust.card_of(card.device))
    told = path.read_text()
    path.write_text({"empty": "", "other": told.replace("9000", "9"), "text": "[]"}.get(harm, told))
    if harm == "writable":
        path.chmod(0o666)
    assert trust.remembered(trust.card_of(card.device)) is None


def test_no_check_begins_while_a_graph_is_captured_and_none_where_nothing_can_be_kept(card, monkeypatch):
    from sparseflash.backends.triton import trust

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "before a graph was captured" in trust.caution(card) and not card.ran
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("SPARSEFLASH_CACHE", "/proc/nowhere")
    with pytest.warns(RuntimeWarning, match="checking"):
        assert trust.caution(card) == ""


@pytest.mark.slow
def test_the_check_of_a_card_passes_for_the_kernels_and_fails_for_wrong_ones():
    code = (
        "import torch\n"
        "from sparseflash.backends.triton import backward, forward, trust\n"
        "print('right:', trust.faults(torch.device('cpu')) or 'none')\n"
        "late = lambda *x, **o: tuple(y if y is None else y * 1.02 for y in forward(*x, **o))\n"
        "print('wrong:', trust.faults(torch.device('cpu'), (late, backward)))\n"
        "lame = lambda *x, **o: (*backward(*x, **o)[:2], x[3] * 0, None)\n"
        "print('wrong:', trust.faults(torch.device('cpu'), (forward, lame)))\n"
    )
    done = interpreted("-c", code)
    right, out, dv = done.stdout.splitlines()
    assert right == "right: none" and out.startswith("wrong: out of dense"), done.stderr[-2000:]
    assert dv.startswith("wrong: dv of dense")
