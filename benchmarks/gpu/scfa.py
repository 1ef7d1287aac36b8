"""The curves of Sparse Causal Flash Attention (arXiv 2306.01160), selection, sorting and gathering included.

Buckets and masks are independent and uniform, as in the paper's figures: B 4, H 48, D 64 over lengths from
258 up, and beside them B 1, H 12, where few programs have to fill a card.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import Plan
from sparseflash.bench.results import Row

from . import rivals
from .device import DEVICE, DRY, generator, tensors, times
from .task import Task

Made = dict[str, Callable[[], Plan]]
SHAPES = (
    {(1, 1): (32,)}
    if DRY
    else {
        (4, 48): (258, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        (1, 12): (16384, 32768, 65536, 131072),
    }
)
BUCKETS = (2,) if DRY else (2, 4, 8, 16, 32, 64, 1024)  # the last is the floor: next to no pairs
DROPS = (0.5,) if DRY else (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def hashed() -> list[Task]:
    """Hash-sparse, by numbers of buckets."""
    return [curve(B, H, T, _hashed, BUCKETS) for (B, H), lengths in SHAPES.items() for T in lengths]


def kept() -> list[Task]:
    """QK-sparse, by the share of queries and keys that is dropped."""
    return [curve(B, H, T, _kept, DROPS) for (B, H), lengths in SHAPES.items() for T in lengths]


def few(B: int, H: int, T: int, rounds: int) -> list[Task]:
    """One setting of each, in the middle of its curve."""
    shape = next((b, h, n[0]) for (b, h), n in SHAPES.items()) if DRY else (B, H, T)
    both = ((_hashed, BUCKETS[:1] if DRY else (16,)), (_kept, (0.5,)))
    made = [curve(*shape, make, settings, rounds) for make, settings in both]
    return [Task({"method": name} | task.key, task.run) for name, task in zip(("hash", "qk"), made)]


def curve(
    B: int, H: int, T: int, make: Callable[..., Made], settings: tuple[Any, ...], rounds: int = 0
) -> Task:
    """All settings of a method at one length."""
    rounds = rounds or (20 if T <= 8192 else 6)
    return Task({"B": B, "H": H, "T": T}, functools.partial(_curve, B, H, T, make, settings, rounds))


def _hashed(B: int, H: int, T: int, buckets: tuple[int, ...]) -> Made:
    def make(nb: int) -> Callable[[], Plan]:
        chance = generator(nb)
        q, k = torch.randint(nb, (2, B, H, T), generator=chance, device=DEVICE, dtype=torch.int32)
        return lambda: Plan.from_buckets(q, k, buckets=nb)

    return {f"hash, {nb} buckets": make(nb) for nb in buckets}


def _kept(B: int, H: int, T: int, drops: tuple[float, ...]) -> Made:
    def make(drop: float) -> Callable[[], Plan]:
        chance = generator(0)
        q, k = torch.rand(2, B, H, T, generator=chance, device=DEVICE) >= drop
        return lambda: Plan.from_keep(q, k)

    return {f"qk, {drop:.0%} dropped": make(drop) for drop in drops}


def _curve(
    B: int, H: int, T: int, made: Callable[..., Made], settings: tuple[Any, ...], rounds: int
) -> Iterator[Row]:
    """Forward, backward and both, of every case in turn; beside them what making the plan takes of it."""
    given = tensors(B, H, T, 64 if not DRY else 16)
    q, k, v, dout = given
    building = made(B, H, T, settings)

    def whole(make: Callable[[], Plan]) -> rivals.Attention:
        return lambda q, k, v: sf.attention(q, k, v, make())

    cases: dict[str, rivals.Attention] = {f"{n}, dense": case for n, case in rivals.dense().items()}
    cases |= {name: whole(make) for name, make in building.items()}
    apart = rivals.both_ways(cases, given, rounds=rounds)

    def both(case: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(case(q, k, v), (q, k, v), dout)

    together = times({name: both(case) for name, case in cases.items()}, rounds=rounds)
    plans = times({name: lambda make=make: make().prepare() for name, make in building.items()}, seconds=3)
    for name in cases:
        forward, backward = apart[name]
        row = {"case": name, **together[name].row(), "ms_forward": forward.ms, "ms_backward": backward.ms}
        yield row | {"ms_plan": plans[name].ms if name in plans else None}
