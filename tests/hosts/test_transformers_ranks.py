"""Models of Transformers over ranks: what is refused; and the example, `Trainer` on two processes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import sparseflash as sf
from transformer_models import tiny

ROOT = Path(__file__).parents[2]


def test_on_one_process_nothing_changes():
    model = tiny("llama").eval()
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids, labels=ids)
        with sf.transformers.context_parallel(model) as across:
            got = model(ids, labels=ids)  # arguments by place, too
        again = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(across.cp.unshard(got.logits, 1), want.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.logits, want.logits) and got.past_key_values is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attention_mask": torch.tensor([[0] * 4 + [1] * 36])}, "padding behind the tokens alone"),
        ({"attention_mask": torch.ones(1, 1, 40, 40)}, "attention_mask: expected none, or"),
        ({"labels": torch.zeros(1, dtype=torch.long)}, r"labels: expected one a token, \[1, 40\]"),
        ({"logits_to_keep": 1}, "logits_to_keep: a rank has those of its own tokens"),
        ({"output_attentions": True}, "output_attentions: no rank has the weights"),
        ({"position_ids": torch.arange(40)[None] % 20}, "packed documents are attended densely"),
    ],
)
def test_what_has_no_share_of_a_rank_is_refused(given, said):
    model, ids = tiny("llama"), torch.arange(3, 43)[None]
    method = sf.methods.HashSparse(nb=4) if "position_ids" in given else None
    with (
        sf.transformers.context_parallel(model, method=method),
        pytest.raises(sf.SparseFlashError, match=said),
    ):
        model(input_ids=ids, **given)


def test_a_method_that_is_for_decoding_is_refused():
    with (
        pytest.raises(sf.SparseFlashError, match="it is for decode, not for training"),
        sf.transformers.context_parallel(tiny("llama"), method=sf.methods.Quest()),
    ):
        pass


def test_the_example_has_the_losses_of_one_process(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    script = [str(ROOT / "examples" / "context_parallel.py"), "--steps", "3", "--length", "64"]
    script += ["--rows", "2", "--out", str(tmp_path)]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    shared = subprocess.Popen(
        [*many, *script, "--context-parallel", "2"], env=env, text=True, stdout=subprocess.PIPE
    )
    monkeypatch.setattr(sys, "argv", script)
    runpy.run_path(script[0], run_name="__main__")
    alone, (together, _) = capsys.readouterr().out, shared.communicate(timeout=120)
    assert shared.returncode == 0
    want, got = (
        torch.tensor([float(x) for x in line.split()[1:]])
        for text in (alone, together)
        for line in text.splitlines()
        if line.startswith("losses ")
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert want[-1] < want[0]
