"""The Triton kernels for cards that need not be here: compiled ahead of time, against a committed table.

A kernel may not spill, not outgrow the card's shared memory, not lose its tensor cores, and not take over a
tenth more registers than the table says. After a change that is wanted, write the table anew:

    python tests/triton_aot.py --targets sm_90 sm_100 sm_80 gfx942 > triton_aot.csv    and move it here
"""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sparseflash as sf

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")

from triton_aot import DIMS, DTYPES, GOLDEN, Row, faults, read

PROGRAM = Path(__file__).parents[1] / "triton_aot.py"


def compiled(cache: Path, *given: object, path: str = "") -> list[Row]:
    """The rows of a share of the table, compiled by as many processes as there are cores (at most four)."""
    workers = min(4, os.cpu_count() or 1)
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        workers = max(1, workers // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    places = [path, str(Path(sf.__file__).parent.parent)]
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, places))}
    env.pop("TRITON_INTERPRET", None)
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, given), "--share", str(i), str(workers)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(workers)
    ]  # fmt: skip
    said = [process.communicate() for process in started]
    for process, (_, error) in zip(started, said, strict=True):
        assert process.returncode == 0, error[-4000:]
    return [row for out, _ in said for row in read(io.StringIO(out))]


def test_the_kernels_for_a_hopper_card_take_what_the_table_says(tmp_path):
    given = ("--dims", 64, "--dtypes", "bf16", "--ops")
    rows = compiled(tmp_path, "--plans", "dense", "everything", *given, "attention")
    rows += compiled(tmp_path, "--plans", "dense", *given, "decode", "statistics", "linear", "stick")
    assert len(rows) == 7 + 2 + 5 + 5 + 4
    assert not faults(rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted({row.target for row in read(GOLDEN)}))
def test_every_shipped_kernel_takes_what_the_table_says(target, tmp_path):
    rows = compiled(tmp_path, "--targets", target)
    assert {row.key for row in rows} == {row.key for row in read(GOLDEN) if row.target == target}
    assert not faults(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "version",
    ["3.6.0", "3.8.0", "3.9.0"],  # 3.7 is what is installed
)
def test_one_source_compiles_with_other_versions_of_triton(version, tmp_path):
    place = tmp_path / "triton"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"triton {version} cannot be installed here: {done.stderr.strip()[-200:]}")
    given = (tmp_path / "cache", "--expect", version, "--plans", "dense")
    wide = ("--dims", 64, 128, "--dtypes", "bf16", "fp32", "--ops", "attention")
    rows = compiled(*given, "blocks", "everything", *wide, path=str(place))
    others = ("--dims", 64, "--dtypes", "bf16", "--ops", "decode", "statistics", "linear", "stick")
    rows += compiled(*given, *others, path=str(place))
    assert len(rows) == 3 * 2 * 2 * 3 + 2 * 2 + 2 + 5 + 5 + 4
    assert not faults([replace(row, registers=0) for row in rows])  # allocation differs; the limits do not


def test_the_table_covers_every_dimension_and_dtype_of_every_kernel():
    golden = {(row.kernel, row.dtype, row.dim) for row in read(GOLDEN) if row.target == "sm_90"}
    kernels = ("rows", "rows, backward", "columns", "decode")
    assert {(k, t, d) for k in kernels for t in DTYPES for d in DIMS} <= golden


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled": 8}, "spills 8"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"products": 0}, "tensor cores"),
        ({"registers": 400}, "registers"),
        ({"dim": 48}, "not in the table"),
        ({}, None),
    ],
)
def test_a_worse_kernel_is_noticed(change, complaint):
    row = next(r for r in read(GOLDEN) if r.target == "sm_90" and r.dtype == "bf16")
    found = faults([replace(row, **change)])
    assert (complaint in found[0]) if complaint else not found
