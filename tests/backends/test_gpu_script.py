"""`make gpu` without a GPU: every stage walks through, and a run that was cut off goes on where it was."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sparseflash as sf

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
pytest.importorskip("safetensors")

from sparseflash.bench.results import read

ROOT = Path(__file__).parents[2]
TIMED = ("dense", "blocks", "decode", "hash", "qk", "train", "quality", "tune")
STAGES = ("check", "device", *TIMED, "sanitize")
QUALITY = ("dense", "window 8 + hash", "window 8 + random")


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
    trained = read(tmp_path / "gpu-quality.csv")
    assert [(row["case"], row["step"]) for row in trained] == [(x, n) for x in QUALITY for n in ("2", "4")]
    assert all(0 < float(row["bits_per_byte"]) < 20 for row in trained)


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


# ---------------------------------------------------------------- the first ten minutes


def test_the_first_minutes_walk_through_in_the_interpreter(tmp_path):
    said = script("first", "--dry-run", "--out", tmp_path)
    assert " 0 failed, 0 skipped, " in said.splitlines()[-1]
    rows = read(tmp_path / "gpu-first.csv")
    assert not [row["error"] for row in rows if row.get("error")]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    assert parts == ["check", "dense", "blocks", "curves", "step", "decode", "tune"]
    again = script("first", "--dry-run", "--out", tmp_path)
    assert again.splitlines()[-1].startswith("0 measured, 0 failed, 0 skipped")


HANG, DIE = 2, 4


def race_tasks():
    """What a card may do to a task: measure, raise, never come back, end the process."""
    from benchmarks.gpu.task import Task

    def task(n):
        def run():
            yield {"ms": n + 0.5}
            if n == 1:
                raise RuntimeError("out of memory")
            if n == HANG:
                time.sleep(600)
            if n == DIE:
                os._exit(7)

        return Task({"part": "ab"[n > HANG], "n": n}, run)

    return [task(n) for n in range(7)]


@pytest.fixture
def race(runner, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the worker
    from benchmarks.gpu import first

    monkeypatch.setattr(first, "DEVICE", "cpu")

    def make(out, minutes):
        mine = [[task for task in race_tasks() if task.key["part"] == name] for name in "ab"]
        parts = [
            first.Part("a", 0.5, lambda: mine[0]),
            first.Part("b", 0.5 - first.COMPILING, lambda: mine[1]),
        ]
        return first.Race(runner.Run(out), minutes, parts, f"{__name__}:race_tasks")

    return make


def test_a_task_that_hangs_or_dies_or_raises_costs_no_other(race):
    from benchmarks.gpu.worker import Worker

    worker, tasks = Worker(f"{__name__}:race_tasks"), race_tasks()

    def errors(n, seconds=100.0):
        rows = list(worker.run(n, tasks[n], time.monotonic() + seconds))
        assert rows[0]["ms"] == n + 0.5  # what was measured before it failed stays
        return [row["error"] for row in rows if "error" in row]

    assert errors(0) == errors(3) == []
    assert errors(1) == ["RuntimeError: out of memory"]
    began = time.monotonic()
    assert errors(HANG, 0.5) == ["stopped: it took longer than was left"]
    assert time.monotonic() - began < 10
    assert errors(DIE) == ["its process ended with 7"]
    assert errors(5) == []
    worker.close()


def test_what_has_no_time_left_is_a_row_and_the_next_call_goes_on_there(race, tmp_path):
    assert race(tmp_path, 1e-9).go().startswith("0 measured, 0 failed, 7 skipped")
    rows = read(tmp_path / "gpu-first.csv")
    assert [row["error"] for row in rows] == ["skipped: no time left"] * 7
    assert all(row["gpu"] == "a card" for row in rows)
    there = race(tmp_path, 9.0)
    there.run.missing = lambda *_: [0, 1, 3]
    assert there.go().startswith("2 measured, 1 failed, 0 skipped")
    rows = read(tmp_path / "gpu-first.csv")
    assert [(row["n"], row["error"]) for row in rows] == [
        ("0", ""), ("1", ""), ("1", "RuntimeError: out of memory"), ("3", "")
    ]  # fmt: skip


def test_the_check_of_a_first_call_is_a_row_or_an_error(race, monkeypatch):
    from benchmarks.gpu import conformance

    for found in ("", "dq of window, D=64, torch.float16: off by 0.3"):
        monkeypatch.setattr(conformance.trust, "faults", lambda device, found=found: found)
        task = conformance.Task({"kind": "own"}, conformance.trusted)
        assert task.rows() == [
            {"kind": "own"} | ({"error": f"AssertionError: {found}"} if found else {"repeats": 1})
        ]


def test_every_part_has_its_share_of_the_minutes_and_what_compiles_too(race):
    from benchmarks.gpu import first

    assert first.COMPILING + sum(part.share for part in first.PARTS) == pytest.approx(1)
    tasks = first.tasks()
    assert len({tuple(task.key.items()) for task in tasks}) == len(tasks)


@pytest.mark.parametrize("fresh", [True, False])
def test_on_a_card_what_no_pack_brought_is_compiled_first_and_a_pack_names_the_commit(
    race, tmp_path, monkeypatch, fresh
):
    from benchmarks.gpu import first

    asked = []

    def compile_all(target, names, workers, seconds):
        asked.append((target, *names))
        return {"kernels": 3, "seconds": 1.0}

    told = {"parts": "a", "git": "1234", "sources": first.ahead.sources() if fresh else "other"}
    monkeypatch.setattr(first, "DEVICE", "cuda")
    monkeypatch.setattr(first.blocks, "architecture", lambda: "sm_90")
    monkeypatch.setattr(first.ahead, "unpack", lambda target: (told, "7 compiled kernels"))
    monkeypatch.setattr(first.ahead, "compile_all", compile_all)
    one = race(tmp_path, 1e-9)
    one.run.about |= {"git": ""}
    monkeypatch.setattr(first, "DEVICE", "cuda")
    assert one.go().startswith("0 measured, 0 failed, 7 skipped")
    assert asked == ([("sm_90", "b")] if fresh else [("sm_90", "a"), ("sm_90", "b")])
    rows = read(tmp_path / "gpu-first.csv")
    assert {row["git"] for row in rows if row["part"] != "compile"} == {"1234" if fresh else ""}
    assert [row["kind"] for row in rows if row["part"] == "compile"] == [x[1] for x in asked]


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """The decoding kernels of `first`, compiled for a Hopper card and packed, and the folder of the pack."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "made"))
    monkeypatch.setenv("PYTHONPATH", str(Path(sf.__file__).parent.parent))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.gpu import ahead

    monkeypatch.setattr(ahead, "BUILD", tmp_path)
    row = ahead.compile_all("sm_90", ["decode"], 1, 300)
    assert row["kernels"] >= 2 and "error" not in row
    return ahead, ahead.pack("sm_90", ["decode"], "abc"), row["kernels"]


def test_kernels_are_compiled_without_a_card_and_found_where_they_travel_to(packed, monkeypatch, tmp_path):
    ahead, path, count = packed
    assert path.stat().st_size < 1 << 20
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    (tmp_path / "made").rename(tmp_path / "gone")  # the lists of files named this place
    told, line = ahead.unpack("sm_90")
    assert (told["git"], told["parts"]) == ("abc", "decode") and told["sources"] == ahead.sources()
    assert line == f"{count} compiled kernels from {path.name}"
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "there").rglob("*.cubin")}
    assert len(there) == count
    row = ahead.compile_all("sm_90", ["decode"], 1, 300)
    assert row["kernels"] == count  # nothing was compiled again
    assert there == {file: file.stat().st_mtime_ns for file in (tmp_path / "there").rglob("*.cubin")}


def test_kernels_for_another_triton_are_left_where_they_lie(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from benchmarks.gpu import ahead

    monkeypatch.setattr(ahead, "BUILD", tmp_path)
    assert ahead.unpack("sm_90") == ({}, "no kernels are compiled ahead (make gpu-prepare)")
    here = ahead.about("sm_90")
    for change, word in (
        ({"triton": "3.6.0"}, "Triton 3.6.0"),
        ({"target": "sm_80"}, "sm_80"),
        ({}, "build"),
    ):
        (tmp_path / "about.json").write_text(json.dumps(here | change | {"key": "other", "sources": ""}))
        with tarfile.open(tmp_path / "kernels-x.tar.xz", "w:xz") as file:
            file.add(tmp_path / "about.json", "about.json")
        told, line = ahead.unpack("sm_90")
        assert not told and word in line and "of no use" in line and here["triton"] in line
    assert not (tmp_path / "cache").exists()


def test_time_that_is_over_ends_the_compiling(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from benchmarks.gpu import ahead

    row = ahead.compile_all("sm_90", ["decode"], 2, 0.2)
    assert row["error"] == "2 of 2 processes had no time to end" and row["seconds"] < 10
