"""Times of layers, forward and backward, by length: slopes of Combiner, and lightning beside dense attention.

`slope` is that of the line through log time over log length, from the shortest to this length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.nn import Layer

CASES: dict[str, Callable[[int, int], Layer]] = {
    "dense": sf.nn.SelfAttention,
    "combiner, fixed": partial(sf.nn.Combiner, segment=128),
    "combiner, axial": partial(sf.nn.Combiner, segment=128, pattern="axial"),
    "combiner, logsparse": partial(sf.nn.Combiner, pattern="logsparse"),
    "lightning": sf.nn.LightningAttention,
    "stick-breaking": sf.nn.StickBreakingAttention,
    "sparsek, k = 256": sf.nn.SparseKAttention,
    "routing": partial(sf.nn.RoutingAttention, clusters=64),
}


def measure(
    *,
    cases: Sequence[str] = tuple(CASES),
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384),
    width: int = 256,
    heads: int = 4,
    rounds: int = 3,
    minutes: float = 10.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """A row for each case and length."""
    box = Box(minutes * 60)
    layers = {name: CASES[name](width, heads) for name in cases}
    log: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for T in lengths:
        x = torch.randn(1, T, width, generator=torch.Generator().manual_seed(0))
        calls = {name: partial(_both, layer, x) for name, layer in layers.items()}
        found = interleave(calls, rounds=rounds, box=box, on_run=lambda name, T=T: on_run(f"{name}, T = {T}"))
        for name, own in found.items():
            log[name].append((math.log(T), math.log(own.median)))
            row: Row = {"bench": "layers-times", "case": name, "T": T, "width": width, "heads": heads}
            row |= {"ms": own.median * 1e3, "slope": _slope(log[name]), "rounds": len(own.times)}
            yield row | ({"over_dense": found["dense"].over(own)} if "dense" in found else {})


def _both(layer: Layer, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    layer(x).sum().backward()


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[n] for p in points) / len(points) for n in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
