"""The kernel table: given plans of every kind over dense causal torch SDPA, one interleaved run a shape.

Plans are made beforehand: what is timed is the kernels. `plan-costs` times the making.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.cases import Blocks, backward, forward, inputs
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.plan import Plan
from sparseflash.train.attention import dense


@dataclass(frozen=True)
class Shape:
    """Cases that share tensors [1, heads, length, dim] and one dense baseline."""

    length: int
    heads: int
    dim: int
    cases: dict[str, Callable[[int, int], Plan]]
    """Label to a function of (length, heads)."""


def causal(length: int, heads: int) -> Plan:
    """Everything up to the diagonal."""
    return Plan.dense(length, length, causal=True)


@dataclass(frozen=True)
class Tokens:
    """Single keys: every tile draws its own from those before its end, in order."""

    tile: int
    share: float = 1.0
    most: int | None = None

    def __call__(self, length: int, heads: int) -> Plan:
        """Draw `share` of what a tile can see, at most `most` keys."""
        generator = torch.Generator().manual_seed(0)
        tiles = -(-length // self.tile)
        wide = min(self.most or length, math.ceil(length * self.share))
        index = torch.full((1, heads, tiles, wide), -1, dtype=torch.int32)
        for h in range(heads):
            for r in range(tiles):
                end = min((r + 1) * self.tile, length)
                n = min(wide, max(1, round(end * self.share)))
                index[0, h, r, :n] = torch.randperm(end, generator=generator)[:n].sort().values
        return Plan.from_keys(index, Tq=length, Tk=length, tile=self.tile, causal=True, unique=True)


SHAPES = (
    Shape(
        8192,
        4,
        64,
        {
            "dense": causal,
            "blocks of 128, 25 %": Blocks(128, 128, 0.25),
            "blocks of 128, 13 %": Blocks(128, 128, 0.13),
            "blocks of 64, 25 %": Blocks(64, 64, 0.25),
            "blocks of 64, 13 %": Blocks(64, 64, 0.13),
            "units of 16 a tile of 64, 25 %": Blocks(64, 16, 0.25),
            "keys a tile of 128, 25 %": Tokens(128, 0.25),
            "keys a tile of 64, 25 %": Tokens(64, 0.25),
        },
    ),
    Shape(8192, 4, 128, {"dense": causal, "blocks of 128, 25 %": Blocks(128, 128, 0.25)}),
    Shape(8192, 1, 64, {"dense": causal, "blocks of 128, 25 %": Blocks(128, 128, 0.25)}),
    Shape(2048, 4, 64, {"dense": causal, "256 keys a query": Tokens(1, most=256)}),
)


def measure(
    *,
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    scaling: bool = True,
    rounds: int = 7,
    minutes: float = 5.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure ``ms_sdpa / ms`` forward and backward; ``density`` is that of the plan.

    With `scaling`, the last rows of the first shape compare the dense kernels on one thread with the same on
    all: there, ``ms_sdpa`` is empty and ``ratio`` is the speed-up.
    """
    groups = [(shape, dtype) for shape in shapes for dtype in dtypes]
    for shape, dtype in groups:
        q, k, v, dout = inputs(shape.length, heads=shape.heads, dim=shape.dim, dtype=dtype)
        plans = {label: make(shape.length, shape.heads) for label, make in shape.cases.items()}
        runs = {"forward": forward(dense, q, k, v), "backward": backward(dense, q, k, v, dout)}
        for label, plan in plans.items():
            ours = _of(plan)
            runs[f"{label}, forward"] = forward(ours, q, k, v)
            runs[f"{label}, backward"] = backward(ours, q, k, v, dout)
        alone = scaling and shape is shapes[0] and "dense" in plans and torch.get_num_threads() > 1
        if alone:
            ours = _of(causal(shape.length, shape.heads))
            runs["one thread, forward"] = _alone(forward(ours, q, k, v))
            runs["one thread, backward"] = _alone(backward(ours, q, k, v, dout))
        box = Box(minutes * 60 / len(groups))
        named = f"{dtype}, T {shape.length}, H {shape.heads}, D {shape.dim}"
        timings = interleave(
            runs, rounds=rounds, box=box, on_run=lambda name, at=named: on_run(f"{at}, {name}")
        )
        about = {"T": shape.length, "batch": 1, "heads": shape.heads, "dim": shape.dim}
        for kind in ("forward", "backward"):
            base = timings[kind].median * 1e3
            for label, plan in plans.items():
                own = timings[f"{label}, {kind}"].median * 1e3
                row: Row = {"bench": "kernel-table", "case": f"{label}, {kind}", "dtype": dtype, **about}
                row |= {"density": plan.density, "ms_sdpa": base, "ms": own, "ratio": base / own}
                yield row | {"rounds": len(timings[kind].times)}
        if alone:
            for kind in ("forward", "backward"):
                one, all_ = (timings[f"{x}, {kind}"].median * 1e3 for x in ("one thread", "dense"))
                row = {
                    "bench": "kernel-table",
                    "case": f"dense, {kind}, all threads over one",
                    "dtype": dtype,
                }
                row |= about | {"density": 1.0, "ms": all_, "ratio": one / all_}
                yield row | {"rounds": len(timings[kind].times)}


def _of(plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: sf.attention(q, k, v, plan)


def _alone(run: Callable[[], object]) -> Callable[[], object]:
    def one() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return one
