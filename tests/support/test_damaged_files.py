"""What cannot be continued or read is refused in one line, with file and field; nothing waits for ever."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from benchmarks.experiments import pixels
from sparseflash.bench import capture, compare, figures, results
from sparseflash.common.errors import SparseFlashError
from sparseflash.train import Corpus, TrainConfig, Trainer, checkpoint, log
from sparseflash.train.data import load
from sparseflash.train.errors import TrainError
from sparseflash.train.sampling import load_model
from sparseflash.train.trainer import resume_config

CORPUS = Corpus([b"to be or not to be, that is the question. " * 50])
CONFIG = TrainConfig(data="", length=32, layers=1, width=32, heads=2, steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    Trainer(CONFIG, CORPUS).run(directory)
    return directory


def edited(run: Path, into: Path, *, tensors=None, **meta) -> Path:
    """A copy of the run whose checkpoint says something else; None takes a field or tensor out."""
    directory = Path(shutil.copytree(run, into / "run"))
    path = directory / checkpoint.FILE
    have, said = load_file(path), checkpoint.read_meta(directory)
    have = {n: x for n, x in {**have, **(tensors or {})}.items() if x is not None}
    said = {n: x for n, x in {**said, **meta}.items() if x is not None}
    save_file(have, path, metadata={"format": checkpoint.FORMAT, "meta": json.dumps(said)})
    return directory


def resume(directory: Path) -> None:
    Trainer(CONFIG, CORPUS).load(directory)


def first(run: Path, ending: str) -> str:
    return next(name for name in load_file(run / checkpoint.FILE) if name.endswith(ending))


def test_a_sound_checkpoint_is_resumed(run, tmp_path):
    resume(edited(run, tmp_path))


KINDS = {
    "missing": (lambda x: None, "missing"),
    "another shape": (lambda x: torch.zeros(3), "shape \\(3,\\)"),
    "NaN": (lambda x: torch.full_like(x, torch.nan), "NaN or infinity"),
    "infinite": (lambda x: torch.full_like(x, torch.inf), "NaN or infinity"),
    "another type": (lambda x: x.double(), "torch.float64, expected torch.float32"),
    "integers": (lambda x: x.long(), "torch.int64, expected torch.float32"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq", "step"])
def test_an_optimizer_that_lost_a_tensor_or_its_values_is_refused(run, tmp_path, state, kind):
    name = first(run, f".{state}")
    change, said = KINDS[kind]
    there = load_file(run / checkpoint.FILE)[name]
    directory = edited(run, tmp_path, tensors={name: change(there)})
    with pytest.raises(TrainError, match=f"{checkpoint.FILE}: {name} .*{said}"):
        resume(directory)


def test_an_optimizer_that_is_gone_or_is_anothers_is_refused(run, tmp_path):
    tensors = load_file(run / checkpoint.FILE)
    gone = dict.fromkeys(n for n in tensors if n.startswith("optimizer."))
    with pytest.raises(TrainError, match="optimizer.*is missing"):
        resume(edited(run, tmp_path / "a", tensors=gone))
    name = first(run, ".exp_avg_sq")
    with pytest.raises(TrainError, match=f"{name} holds -1"):
        resume(edited(run, tmp_path / "b", tensors={name: tensors[name] - 1}))
    with pytest.raises(TrainError, match="optimizer.nobody.exp_avg belongs to no parameter"):
        resume(edited(run, tmp_path / "c", tensors={"optimizer.nobody.exp_avg": torch.zeros(1)}))
    with pytest.raises(TrainError, match="step is 2, expected that of the run, 1"):
        resume(edited(run, tmp_path / "d", step=1, position=1))


@pytest.mark.parametrize("kind", [x for x in KINDS if x not in ("missing", "another shape")])
def test_weights_that_are_none_are_refused(run, tmp_path, kind):
    name = first(run, ".weight")
    change, said = KINDS[kind]
    there = load_file(run / checkpoint.FILE)[name]
    directory = edited(run, tmp_path, tensors={name: change(there)})
    with pytest.raises(TrainError, match=f"{name} .*{said}"):
        resume(directory)
    if kind != "another type":  # rounded weights can be sampled from
        with pytest.raises(TrainError, match=f"{checkpoint.FILE}: {name}"):
            load_model(directory)


def test_what_is_refused_changes_nothing(run, tmp_path):
    name = first(run, ".exp_avg")
    trainer = Trainer(CONFIG, CORPUS)
    before, state = trainer.model.embed.weight.clone(), torch.get_rng_state()
    bad = edited(run, tmp_path / "a", tensors={name: torch.zeros(3)})
    worse = edited(run, tmp_path / "b", tensors={"rng.cpu": torch.zeros(8, dtype=torch.uint8)})
    worst = edited(run, tmp_path / "c", tensors={"rng.cpu": torch.zeros(5056)})
    for directory, said in ((bad, name), (worse, "rng"), (worst, "rng")):
        with pytest.raises(TrainError, match=said):
            trainer.load(directory)
        assert torch.equal(before, trainer.model.embed.weight) and not trainer.optimizer.state
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", None),
        ("step", "2"),
        ("step", 2.0),
        ("step", True),
        ("position", 1),
        ("data", None),
        ("data", 3),
        ("config", None),
        ("config", "no JSON"),
        ("config", "[]"),
        ("config", "{}"),
        ("config", json.dumps({"data": "", "width": "32"})),
        ("config", json.dumps({"data": "", "width": -32})),
        ("config", json.dumps({"data": "", "options": 3})),
        ("config", json.dumps({"data": None})),
    ],
)
def test_a_field_that_says_what_none_can_is_refused_with_its_name(run, tmp_path, field, value):
    directory = edited(run, tmp_path, **{field: value})
    with pytest.raises(TrainError, match=f"{checkpoint.FILE} is not a readable checkpoint .*{field}"):
        resume_config(directory, {})
        resume(directory)


@pytest.mark.parametrize("meta", ["", "no JSON", "[]", "3", "null", "[" * 20000])
def test_metadata_that_is_none_is_refused(run, tmp_path, meta):
    path = tmp_path / checkpoint.FILE
    save_file(load_file(run / checkpoint.FILE), path, metadata={"format": checkpoint.FORMAT, "meta": meta})
    with pytest.raises(TrainError, match="not a readable checkpoint"):
        resume_config(tmp_path, {})


def test_a_file_that_is_cut_short_or_changed_is_refused(run, tmp_path):
    whole, path = (run / checkpoint.FILE).read_bytes(), tmp_path / checkpoint.FILE
    head = int.from_bytes(whole[:8], "little")
    for broken in (b"", whole[:4], whole[: head // 2], whole[:-1], whole[: head + 9], whole + b"more"):
        path.write_bytes(broken)
        for call in (
            lambda: resume(tmp_path),
            lambda: resume_config(tmp_path, {}),
            lambda: load_model(tmp_path),
        ):
            with pytest.raises(TrainError, match="not a readable checkpoint"):
                call()


@pytest.mark.parametrize("line", ["1,2", "x,1.0,,1.0,1.0", "1,1.0,,1.0,", "\xff\x00"])
def test_a_log_that_is_damaged_is_refused_with_the_row(tmp_path, line):
    (tmp_path / log.FILE).write_text(f"{','.join(log.COLUMNS)}\n1,1.0,,1.0,1.0\n{line}\n", encoding="latin-1")
    with pytest.raises(TrainError, match=f"{log.FILE}: row"):
        log.read(tmp_path)


# files that are none


def nameless(tmp_path: Path) -> list[Path]:
    """What names no regular file: reading it takes for ever, or ends with the memory."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("/dev/zero")
    return [pipe, Path("/dev/zero"), tmp_path / "link"]


needs_pipes = pytest.mark.skipif(
    not hasattr(os, "mkfifo") or not Path("/dev/zero").exists(), reason="no pipes"
)


@needs_pipes
def test_text_without_an_end_is_refused(tmp_path):
    for path in nameless(tmp_path):
        with pytest.raises(TrainError, match=f"--data {path} is a (pipe|device)"):
            load(path)


@needs_pipes
def test_a_directory_is_searched_for_files_alone(tmp_path):
    nameless(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    assert load(tmp_path).files == 1


@needs_pipes
def test_benchmarks_read_files_alone(tmp_path):
    for path in [*nameless(tmp_path), tmp_path]:
        for read in (results.read, pixels.read_idx, lambda x: capture.inputs(x, dtype=torch.float32)):
            with pytest.raises(SparseFlashError, match="is a (pipe|device|directory)"):
                read(path)


def test_benchmarks_refuse_files_of_another_kind(tmp_path):
    path = tmp_path / "some.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SparseFlashError, match="no result file"):
        results.read(path)
    for text, said in (("a,b\n1\n", "row 1"), ("a,b\n1,2\n3,4,5\n", "row 2"), ("a,b\n1,2\n", "no column c")):
        path.write_text(text)
        with pytest.raises(SparseFlashError, match=said):
            results.read(path, "c")
    curves = tmp_path / "curves.csv"
    curves.write_text("bench,case,T,ms\ncurves,dense (torch SDPA),abc,1\n")
    with pytest.raises(SparseFlashError, match="curves.csv: a row has no number to draw: .*abc"):
        figures.redraw(curves)
    row = {"bench": "ops", "case": "a", "ms": "1.0"}
    with pytest.raises(SparseFlashError, match="row ops, a: ms: .*fast"):
        compare.compare([row], [{**row, "ms": "fast"}])
    with pytest.raises(SparseFlashError, match="No such file"):
        results.read(tmp_path / "absent")
    with pytest.raises(SparseFlashError, match="is no capture"):
        capture.inputs(path, dtype=torch.float32)
    save_file({f"layer.0.{x}": torch.zeros(3) for x in "qkv"}, path)
    with pytest.raises(SparseFlashError, match="is no capture: layer.0.q is \\[3\\]"):
        capture.inputs(path, dtype=torch.float32)
    image = gzip.compress(b"\0\0\x08\x02" + bytes([0, 0, 0, 1] * 2) + b"x" * 100)
    for broken in (image[:-12], b"\0\0\x08\x03", b"\0\0\x08\x02" + bytes(8)):
        path = tmp_path / ("a.gz" if broken[:1] == image[:1] else "a.idx")
        path.write_bytes(broken)
        with pytest.raises(SparseFlashError, match="--images"):
            pixels.read_idx(path)


@needs_pipes
def test_the_command_says_so_in_one_line_and_at_once(run, tmp_path):
    pipe = nameless(tmp_path)[0]
    bad = edited(run, tmp_path, step=-1)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for arguments in (["--data", pipe, "--out", tmp_path / "new"], ["--resume", "--out", bad]):
        command = [sys.executable, "-m", "sparseflash", "train", *map(str, arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
