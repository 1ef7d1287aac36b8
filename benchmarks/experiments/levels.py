"""Instruction-set levels over torch SDPA at the same level, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from sparseflash.backends.cpu import build
from sparseflash.bench.machine import describe
from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError

from . import ROOT
from .kernels import Shape, causal, measure

SHAPES = ((4096, 64), (4096, 128), (8192, 64), (8192, 128))
"""Lengths and head dimensions; four heads."""

TORCH = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    }
}
"""What holds torch to a level: its own kernels, and those of the libraries that may multiply for it."""


def runnable() -> tuple[str, ...]:
    """Levels of this processor that are not for tests."""
    return tuple(name for name, x in build.LEVELS.items() if x.needs <= build.cpu_flags() and not x.source)


def measure_levels(
    levels: Sequence[str],
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 3,
    minutes: float = 5.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure ``ms_sdpa / ms`` of dense causal attention in fp32, or bf16 where a level has products of it.

    A process each, since both libraries choose their instructions once.
    """
    for level in levels:
        on_run(level)
        what = {"shapes": shapes, "rounds": rounds, "minutes": minutes / len(levels)}
        what["dtypes"] = ["bf16" if build.LEVELS[level].bf16 else "fp32"]
        run = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(what)],
            cwd=ROOT,
            env={**os.environ, "SPARSEFLASH_CPU_LEVEL": level, **TORCH.get(level, {})},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise SparseFlashError(f"level {level}: {run.stderr.strip().rpartition(chr(10))[2]}")
        for row in json.loads(run.stdout):
            yield {"bench": "levels", "level": level, **row}


def _measure_here(shapes: Sequence[tuple[int, int]], **options: object) -> list[Row]:
    """Measure the level of this process."""
    dense = [Shape(length, 4, dim, {"dense": causal}) for length, dim in shapes]
    rows = list(measure(shapes=dense, scaling=False, **options))  # type: ignore[arg-type]
    own = {"backend": describe()["backend"]}
    return [{name: x for name, x in row.items() if name != "bench"} | own for row in rows]


if __name__ == "__main__":
    print(json.dumps(_measure_here(**json.loads(sys.argv[1]))))
