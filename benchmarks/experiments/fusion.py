"""A gated layer with its norm as row tiles of one fused program, against eager torch and `torch.compile`.

(silu(h g^T) * (h u^T)) w^T with h = rms_norm(x), at the width of a small model. Time is the median of rounds
in turn; memory is the peak beyond the inputs, the result included, of a call in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.bench.cases import DTYPES
from sparseflash.bench.memory import peak
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, Timing, interleave
from sparseflash.fusion import BYTES, GOLDEN, SIZES, fuse, run

NAME = "rmsnorm-swiglu"
ROWS = (64, 256)
"""Rows of a tile; the other dimensions are one block."""


def eager(x: Tensor, g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """The layer in plain torch."""
    h = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return F.linear(F.silu(F.linear(h, g)) * F.linear(h, u), w)


def plain(layer: Callable[..., Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function of all inputs by name."""
    return lambda given: layer(**given)


def cases(length: int, dtype: str) -> dict[str, Callable[..., Any]]:
    """Every way to run the layer, by name: functions of its inputs."""
    threads, sizes = torch.get_num_threads(), SIZES[NAME] | {"m": length}
    chosen = fuse(GOLDEN[NAME](), sizes, itemsize=DTYPES[dtype].itemsize)
    found = fuse(GOLDEN[NAME](), sizes, tiers=BYTES)
    ways: dict[str, Callable[..., Any]] = {
        "eager": plain(eager),
        "torch.compile": plain(torch.compile(eager)),
    }
    for n in ROWS:
        ways[f"fused, {n} rows a tile"] = partial(run, found.program, blocks={"m": n}, threads=threads)
    ways["fused as the cost model says"] = partial(run, chosen.program, blocks=chosen.blocks, threads=threads)
    ways["one by one"] = partial(run, found.operators, threads=threads)
    return ways


def inputs(length: int, dtype: str) -> dict[str, Tensor]:
    """The layer's inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES[NAME] | {"m": length}
    return {
        name: torch.randn([sizes[dim] for dim in axes], generator=generator).mul(0.1).to(DTYPES[dtype])
        for name, axes in GOLDEN[NAME]().inputs
    }


def measure(
    *,
    length: int = 4096,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    rounds: int = 7,
    minutes: float = 4.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure time and extra memory of every case, and the ratio ``ms_eager / ms``."""
    box = Box(minutes * 60)
    for number, dtype in enumerate(dtypes):
        timings = timed(length, dtype, rounds, Box(box.left / (len(dtypes) - number)), on_run)
        for name, timing in timings.items():
            asked = json.dumps({"name": name, "length": length, "dtype": dtype})
            done = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True)
            row: Row = {"bench": "fusion", "case": name, "dtype": dtype, "T": length}
            row |= {"ms_eager": timings["eager"].median * 1e3, "ms": timing.median * 1e3}
            row |= {"ratio": timings["eager"].over(timing)}
            row |= {"mib": int(done.stdout.split()[-1]) / 2**20 if done.returncode == 0 else None}
            yield row | {"rounds": len(timing.times)}


def timed(length: int, dtype: str, rounds: int, box: Box, on_run: Callable[[str], None]) -> dict[str, Timing]:
    """All cases in turn; what compiles has done so before."""
    given = inputs(length, dtype)
    runs = {name: partial(way, given) for name, way in cases(length, dtype).items()}
    with torch.inference_mode():
        for _ in range(2):
            on_run(f"{dtype}, compiling")
            runs["torch.compile"]()
        return interleave(runs, rounds=rounds, box=box, on_run=lambda name: on_run(f"{dtype}, {name}"))


def extra(name: str, length: int, dtype: str) -> int:
    """Bytes that a case takes beyond its inputs, after a call on little that loads and compiles."""
    with torch.inference_mode():
        way = cases(length, dtype)[name]
        way(inputs(64, dtype))
        given = inputs(length, dtype)
        if name == "torch.compile":
            way(given)  # other shapes compile again
        return peak(lambda: way(given))


if __name__ == "__main__":
    print(extra(**json.loads(sys.argv[1])))
