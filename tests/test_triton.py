"""The Triton backend without a GPU: its kernels run in Triton's interpreter, in a process of their own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseflash as sf

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")

CASES = Path(__file__).with_name("triton_cases.py")
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

    wide = torch.empty(1, 1, 2, 320, dtype=torch.float64)
    reasons = "; ".join(backend.refuse(wide, wide, wide))
    assert "head dimension 320 (up to 256" in reasons and "float64" in reasons and "on cpu" in reasons


def test_without_a_gpu_the_backend_says_why_it_does_not_run():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    q = torch.randn(1, 1, 16, 16)
    with pytest.raises(sf.BackendError, match="tensors are on cpu"):
        sf.attention(q, q, q, backend="triton")
    assert not sf.backend_status()["triton"].usable
