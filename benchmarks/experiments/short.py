"""Calls on few tokens, where what is around the kernels takes longer than they do: over dense torch SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import sparseflash as sf
from sparseflash.bench.cases import inputs
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.train.attention import Attention, dense

CALLS = 200
"""Calls of one timing: one alone is as short as a look at the clock is coarse."""


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense causal attention on our kernels."""
    return sf.attention(q, k, v, causal=True)


def again(attention: Attention, *given: torch.Tensor) -> Callable[[], None]:
    """So many calls without gradient."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                attention(*given)

    return run


def measure(
    *,
    lengths: tuple[int, ...] = (16, 128, 512),
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    heads: int = 4,
    dim: int = 64,
    rounds: int = 7,
    minutes: float = 2.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure microseconds of one forward, and ``us_sdpa / us``."""
    box, groups = Box(minutes * 60), [(T, dtype) for T in lengths for dtype in dtypes]
    for number, (T, dtype) in enumerate(groups):
        given = [x.detach() for x in inputs(T, heads=heads, dim=dim, dtype=dtype)[:3]]
        runs = {name: again(run, *given) for name, run in (("sdpa", dense), ("ours", ours))}
        share = Box(box.left / (len(groups) - number))
        timings = interleave(
            runs, rounds=rounds, box=share, on_run=lambda name, T=T: on_run(f"{T} tokens, {name}")
        )
        us = {name: timings[name].median / CALLS * 1e6 for name in runs}
        row: Row = {"bench": "short", "dtype": dtype, "T": T, "heads": heads, "dim": dim}
        row |= {"us_sdpa": us["sdpa"], "us": us["ours"], "ratio": us["sdpa"] / us["ours"]}
        yield row | {"rounds": len(timings["ours"].times)}
