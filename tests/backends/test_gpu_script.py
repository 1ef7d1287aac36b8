"""`make gpu` without a GPU: every stage walks through, and a run that was cut off goes on where it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sparseflash as sf

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
pytest.importorskip("safetensors")

from sparseflash.bench.results import read

ROOT = Path(__file__).parents[2]
STAGES = ("check", "device", "dense", "blocks", "decode", "hash", "qk", "train", "tune", "sanitize")


def script(*arguments: object) -> str:
    source = Path(sf.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_every_stage_walks_through_in_the_interpreter(tmp_path):
    said = script("--dry-run", "--out", tmp_path)
    assert said.endswith("all is done\n")
    for name in STAGES:
        rows = read(tmp_path / f"gpu-{name}.csv")
        assert rows and not [row["error"] for row in rows if row.get("error")]
        assert all(row["gpu"] == "interpreter" and row["triton"] and row["git"] is not None for row in rows)
    assert {row["case"] for row in read(tmp_path / "gpu-qk.csv")} == {"math, dense", "qk, 50% dropped"}
    assert all(float(row["ms"]) > 0 for row in read(tmp_path / "gpu-train.csv"))


def test_the_model_of_the_train_stage_is_the_papers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu.training import Paper

    with torch.device("meta"):
        model = Paper(8192, 768, 12, [F.scaled_dot_product_attention] * 12)
        tokens = torch.zeros(4, 8192, dtype=torch.long)
        assert model(tokens, tokens).shape == ()
    weights = sum(p.numel() for p in model.parameters())
    assert weights == (50304 + 8192) * 768 + 12 * (11 * 768**2 + 2 * 768) + 768  # 122.8 million


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.gpu.runner as module

    about = {"gpu": "a card", "torch": "1", "triton": "2", "git": "abc", "clocks": "1980 MHz"}
    monkeypatch.setattr(module, "machine", lambda: about)
    return module


def a_stage(runner, ran, stop_at=None):
    def task(n):
        def run():
            if n == stop_at:
                raise KeyboardInterrupt
            ran.append(n)
            if n == 3:
                raise RuntimeError("out of memory")
            yield {"ms": n + 0.5}
            yield {"ms": n + 0.25}

        return runner.Task({"T": 2**n, "case": "x"}, run)

    return runner.Stage(lambda: [task(n) for n in range(5)], 1, "")


def test_a_run_that_was_cut_off_goes_on_at_the_first_task_that_is_missing(runner, tmp_path):
    ran = []
    with pytest.raises(KeyboardInterrupt):
        runner.Run(tmp_path).stage("x", a_stage(runner, ran, stop_at=2))
    assert ran == [0, 1]
    assert "2 of 5 tasks done, next: T 4" in runner.Run(tmp_path).state("x", a_stage(runner, ran))
    assert runner.Run(tmp_path).stage("x", a_stage(runner, ran))
    assert ran == [0, 1, 2, 3, 4]  # the one that failed is a row that says so
    rows = read(tmp_path / "gpu-x.csv")
    assert [row["T"] for row in rows] == ["1", "1", "2", "2", "4", "4", "8", "16", "16"]
    assert "out of memory" in rows[6]["error"] and rows[6]["clocks"] == "1980 MHz"
    assert runner.Run(tmp_path).stage("x", a_stage(runner, ran)) and len(ran) == 5
    runner.Run(tmp_path, retry=True).stage("x", a_stage(runner, ran))
    assert ran[5:] == [3]


def test_another_commit_measures_anew_and_time_stops_between_tasks(runner, tmp_path, monkeypatch):
    ran = []
    runner.Run(tmp_path).stage("x", a_stage(runner, ran))
    monkeypatch.setattr(
        runner, "machine", lambda: {"gpu": "a card", "torch": "1", "triton": "2", "git": "def"}
    )
    assert not runner.Run(tmp_path, minutes=1e-9).stage("x", a_stage(runner, ran))
    assert len(ran) == 5
    assert len(read(tmp_path / "gpu-x.csv")) == 9  # nothing is thrown away before there is something new
    runner.Run(tmp_path).stage("x", a_stage(runner, ran))
    assert len(ran) == 10


def test_the_table_is_made_of_what_was_faster_than_the_default(runner, tmp_path, monkeypatch):
    from benchmarks.gpu import tuning
    from sparseflash.backends.triton import blocks
    from sparseflash.bench.results import write

    rows = []
    for dim, times in ((64, {32: 2.0, 64: 1.0}), (128, {32: 1.0, 64: 0.99})):
        for keys, ms in times.items():
            one = blocks.Blocks(128, keys, 8, 2)
            case = {"kernel": "rows", "dim": dim, "unit": 0, "dtype": "bfloat16", "architecture": "sm_90"}
            rows.append(case | vars(one) | {"default": keys == 32, "ms": ms})
    rows.append(rows[0] | {"rows": 256, "ms": None, "error": "OutOfResources"})
    write(tmp_path / "gpu-tune.csv", rows)
    monkeypatch.setattr(blocks, "TABLE", tmp_path / "tuned.csv")
    monkeypatch.setattr(blocks, "tuned", lambda: {})
    written = {}
    monkeypatch.setattr(blocks, "write_tuned", written.update)
    assert "1 rows, 1 cases keep" in tuning.write_table(tmp_path / "gpu-tune.csv")
    assert written == {("sm_90", blocks.Case("rows", 64, 0, "bfloat16")): blocks.Blocks(128, 64, 8, 2)}
