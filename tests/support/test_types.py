"""What a type checker says of calls: a mistyped option is an error, what is right is not."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

CALLS = """
import torch
import sparseflash as sf

x = torch.zeros(1, 1, 4, 8)
packed, edges = x[0], torch.tensor([0, 1])
{}
"""
RIGHT = [
    "a: torch.Tensor = sf.attention(x, x, x, causal=True, scale=0.5, softcap=None, backend='cpu')",
    "b: tuple[torch.Tensor, torch.Tensor] = sf.attention(x, x, x, return_lse=True, sink_logits=None)",
    "c: torch.Tensor = sf.decode(x, x, x, edges, softcap=30.0)",
    "d: tuple[torch.Tensor, torch.Tensor] = sf.decode(x, x, x, return_lse=True)",
    "e: torch.Tensor = sf.attention_varlen(packed, packed, packed, edges, causal=True, window_size=(4, 0))",
    "f: torch.Tensor = sf.indexer_topk(x, x[0], x[0], 4, causal=False)",
]
WRONG = [
    "sf.attention(x, x, x, causal='yes')",
    "sf.attention(x, x, x, is_causal=True)",
    "sf.attention(x, x, x, scal=0.5, return_lse=True)",
    "g: torch.Tensor = sf.attention(x, x, x, return_lse=True)",
    "sf.decode(x, x, x, scale='small')",
    "sf.decode(x, x, x, causal=True)",
    "sf.attention_varlen(packed, packed, packed, edges, window=(4, 0))",
    "sf.indexer_topk(x, x[0], x[0], 4, topp=4)",
]


@pytest.mark.slow
def test_mistyped_options_are_errors_of_the_type_checker_and_others_are_none(tmp_path):
    lines = CALLS.format("\n".join([*RIGHT, *WRONG])).splitlines()
    file = tmp_path / "calls.py"
    file.write_text("\n".join(lines))
    source = Path(__file__).resolve().parents[2] / "src"
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--follow-imports", "silent"]
    command += ["--ignore-missing-imports", "--cache-dir", str(tmp_path), str(file)]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(source), "PATH": ""}
    )
    at = {int(said.split(":")[1]) for said in run.stdout.splitlines() if ": error:" in said}
    assert {lines[n - 1] for n in at} == set(WRONG), run.stdout + run.stderr
