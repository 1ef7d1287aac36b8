"""Block sizes of kernels: measured where `tuned.csv` has a row, else a default that fits.

`make gpu` measures the table (`python -m benchmarks.gpu tune`, then `--write-table`). Nothing is searched
while a program runs: the same call on the same card is always the same kernel.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources

from ...common.errors import BackendError
from ...common.files import replacing
from .common import INTERPRETED

MAX_DIM = 576
WHOLE = 512
"""Most dimensions of v, and of q and k in one product; those of q and k beyond have another product."""
TABLE = Path(__file__).with_name("tuned.csv")


@dataclass(frozen=True)
class Blocks:
    """Rows and keys of a program, and its compile options."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 255
    """Registers per thread, at most. Without a limit NVIDIA's assembler spills some to fit more programs."""

    def options(self) -> dict[str, int | bool]:
        """Launch options for these blocks."""
        both: dict[str, int | bool] = {"num_stages": self.stages, "enable_fp_fusion": True}
        if target()[0] == "hip":  # warps of 64 threads
            return both | {"num_warps": self.warps // 2}
        return both | {"num_warps": self.warps, "maxnreg": self.registers}

    def smaller(self) -> Iterator[Blocks]:
        """Yield these blocks, then ever smaller ones, for cards with less shared memory."""
        found = self
        yield found
        if found.stages > 1:
            found = replace(found, stages=1)
            yield found
        while max(found.rows, found.keys) > 16:
            side = "rows" if found.rows > found.keys else "keys"
            found = replace(found, **{side: getattr(found, side) // 2})
            yield found


class Case(NamedTuple):
    """Key of the tuning table: kernel, dimension, unit and dtype."""

    kernel: str
    """"rows", "rows, backward", "decode", "columns", "entries", "linear" or "stick"."""
    dim: int
    """The larger of D and Dv, padded to a power of two."""
    unit: int
    """Keys of a unit; 0 for plans of spans alone."""
    dtype: str


HOPPER = {  # (padded D at most, bytes of an element): rows, keys, warps, stages
    "rows": {
        (64, 2): Blocks(128, 64, 8, 2), (128, 2): Blocks(128, 32, 8, 3), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 16, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
        (512, 2): Blocks(16, 16, 8, 1), (512, 4): Blocks(16, 16, 8, 1),
    },
    "decode": {  # few rows: what counts is how many keys are in flight
        (64, 2): Blocks(64, 128, 4, 3), (128, 2): Blocks(64, 64, 4, 3), (256, 2): Blocks(32, 32, 4, 3),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 16, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
        (512, 2): Blocks(16, 16, 8, 1), (512, 4): Blocks(16, 16, 8, 1),
    },
    "columns": {
        (64, 2): Blocks(64, 64, 8, 2), (128, 2): Blocks(32, 64, 8, 1), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 16, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
        (512, 2): Blocks(16, 16, 8, 1), (512, 4): Blocks(16, 16, 8, 1),
    },
    "entries": {
        (64, 2): Blocks(64, 32, 8, 1), (128, 2): Blocks(64, 32, 8, 1), (256, 2): Blocks(32, 32, 8, 1),
        (64, 4): Blocks(32, 16, 8, 1), (128, 4): Blocks(32, 16, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
        (512, 2): Blocks(16, 16, 8, 1), (512, 4): Blocks(16, 16, 8, 1),
    },
    "linear": {  # tokens of a chunk; keys: rows and columns of the state
        (64, 2): Blocks(64, 64, 4, 1), (128, 2): Blocks(64, 64, 8, 1), (256, 2): Blocks(64, 64, 8, 1),
        (64, 4): Blocks(32, 32, 8, 1), (128, 4): Blocks(32, 32, 8, 1), (256, 4): Blocks(16, 32, 8, 1),
    },
    "stick": {
        (64, 2): Blocks(32, 32, 8, 1), (128, 2): Blocks(32, 32, 8, 1), (256, 2): Blocks(16, 32, 8, 1),
        (64, 4): Blocks(32, 16, 8, 1), (128, 4): Blocks(16, 16, 8, 1), (256, 4): Blocks(16, 16, 8, 1),
    },
}  # fmt: skip
BLACKWELL = HOPPER | {"columns": HOPPER["columns"] | {(64, 4): Blocks(32, 16, 8, 1)}}
OTHERS = {  # whose products take their operands from registers, or that have less shared memory
    "rows": HOPPER["rows"] | {(64, 2): Blocks(128, 32, 8, 1), (128, 2): Blocks(64, 32, 8, 1)},
    "columns": HOPPER["columns"]
    | {(64, 2): Blocks(32, 32, 8, 1), (128, 2): Blocks(32, 32, 8, 1), (256, 2): Blocks(32, 16, 8, 1)},
    "decode": HOPPER["decode"],
    "entries": HOPPER["entries"],
    "linear": HOPPER["linear"] | {(256, 2): Blocks(32, 64, 8, 1)},
    "stick": HOPPER["stick"],
}  # fmt: skip

COMPILER = tuple(int(n) for n in triton.__version__.split(".")[:2])
NEWER = {
    ("columns", 128, 2): Blocks(64, 32, 8, 1)
}  # from Triton 3.9 on: what is above takes too many registers


@functools.cache
def target() -> tuple[str, int]:
    """Backend and generation (0 for AMD) of this card, such as ("cuda", 90)."""
    if INTERPRETED.value:
        return "interpreter", 0
    found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch if found.backend == "cuda" else 0


def architecture() -> str:
    """Name of this card's architecture in the table, such as "sm_90"."""
    if target()[0] != "hip":
        return f"sm_{target()[1]}"
    return str(triton.runtime.driver.active.get_current_target().arch)


@functools.cache
def tuned(path: Path = TABLE) -> dict[tuple[str, Case], Blocks]:
    """The committed table: (architecture, case) to the fastest measured blocks."""
    names, found = [f.name for f in fields(Blocks)], {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            case = Case(row["kernel"], int(row["dim"]), int(row["unit"]), row["dtype"])
            found[row["architecture"], case] = Blocks(*(int(row[name]) for name in names))
    return found


def write_tuned(rows: dict[tuple[str, Case], Blocks], path: Path = TABLE) -> None:
    """Write the table, in order."""
    columns = ["architecture", *Case._fields, *(f.name for f in fields(Blocks))]
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for (name, case), blocks in sorted(rows.items()):
            writer.writerow({"architecture": name, **case._asdict(), **asdict(blocks)})
    tuned.cache_clear()


_trial: dict[str, Blocks] = {}


@contextmanager
def trying(kernel: str, blocks: Blocks) -> Iterator[None]:
    """Override table and default: launch a kernel with these blocks, for tuning."""
    _trial[kernel] = blocks
    try:
        yield
    finally:
        del _trial[kernel]


def choose(case: Case, heavy: bool, plain: bool = True) -> Blocks:
    """Choose the blocks for a case; `heavy` calls need many registers, and the table is not tuned for them.

    `plain`: rows are tokens in order, without order, position, segment or expiry tables.
    """
    if case.kernel in _trial:
        return _trial[case.kernel]
    if not heavy and (known := tuned().get((architecture(), case))):
        return known
    return _default(case, heavy, plain)


def _default(case: Case, heavy: bool, plain: bool) -> Blocks:
    size = getattr(torch, case.dtype).itemsize
    kernel, _, backward = case.kernel.partition(", ")
    if kernel == "decode" and heavy:  # registers do not suffice for more keys
        kernel = "rows"
    table = {9: HOPPER, 10: BLACKWELL}.get(target()[1] // 10, OTHERS)
    dim = next(d for d in (64, 128, 256, WHOLE) if case.dim <= d)
    blocks = table[kernel][dim, size]
    if COMPILER >= (3, 9) and table is not OTHERS and not heavy:
        blocks = NEWER.get((case.kernel, dim, size), blocks)
    if kernel == "columns":
        if heavy and size == 4 and table is OTHERS:
            return replace(blocks, rows=16 if dim == 128 else blocks.rows, keys=16)
        return replace(blocks, keys=min(blocks.keys, 32), stages=1) if heavy and size == 2 else blocks
    if kernel == "stick" and heavy and dim == 256:
        return replace(blocks, keys=16)
    if kernel != "rows":
        return blocks
    if heavy:
        return replace(blocks, keys=16) if size == 4 else blocks
    if table is HOPPER and blocks.stages > 1 and case.dim <= 64 and plain and not backward:
        return replace(blocks, registers=128)  # two programs fit side by side
    return blocks


_fits: dict[tuple[str, Blocks], Blocks] = {}


def fitting(kernel: str, blocks: Blocks, start: Callable[[Blocks], None]) -> None:
    """Start a kernel, with smaller blocks where the card has too little shared memory for these."""
    for one in _fits.get((kernel, blocks), blocks).smaller():
        try:
            start(one)
        except OutOfResources as error:
            if kernel in _trial:  # while tuning, a candidate that does not fit fails
                raise
            lacking = error
        else:
            _fits[kernel, blocks] = one
            return
    raise BackendError(
        f"kernel {kernel!r} needs {lacking.required} of {lacking.name} in its smallest blocks, this card has "
        f"{lacking.limit}: use a smaller head dimension, or backend='reference'"
    )
