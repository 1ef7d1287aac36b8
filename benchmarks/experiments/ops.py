"""Ops that are no softmax over a plan, over dense torch SDPA and over the same in plain torch.

One interleaved run a case and data type. Stick-breaking is measured twice: on normal inputs, whose sticks end
after some hundred keys, and on inputs whose logits lie around -6, so that every key has to be visited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.cases import backward, forward, inputs
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.train.attention import Attention, dense


@dataclass(frozen=True)
class Op:
    """An op, its twin in plain torch, and the length and heads at which they are measured."""

    label: str
    ours: Attention
    plain: Attention | None
    length: int = 8192
    heads: int = 4
    shift: float = 0.0
    """What is added to every logit, by way of the last lane of q and k."""


def slopes(heads: int) -> Tensor:
    """Decay rates 1/2, 1/4, ...: as ALiBi gives them to so many heads."""
    return 2.0 ** -torch.arange(1, heads + 1)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours."""
    return sf.linear_attention(q, k, v, decay_rate=slopes(q.shape[1]))


def chunked(q: Tensor, k: Tensor, v: Tensor, size: int = 64) -> Tensor:
    """Linear attention in plain torch: all chunks at once, a loop over their states. Whole chunks only."""
    n, at = q.shape[2] // size, torch.arange(size)
    rate = slopes(q.shape[1])[:, None, None, None]
    between, before, after, last = (
        torch.exp(-rate * x).to(q.dtype)
        for x in (
            (at[:, None] - at).clamp(min=0),
            at[:, None] + 1,
            size - 1 - at[:, None],
            torch.tensor(size),
        )
    )
    q, k, v = (x.unflatten(2, (n, size)) for x in (q, k, v))
    sums = (k * after).transpose(-1, -2) @ v
    state, states = torch.zeros_like(sums[:, :, 0]), []
    for added in sums.unbind(2):
        states.append(state)
        state = state * last[:, 0] + added
    inside = (q @ k.transpose(-1, -2) * between.tril()) @ v
    return (inside + before * (q @ torch.stack(states, 2))).flatten(2, 3)


def stick(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours."""
    return sf.stick_breaking(q, k, v)


def sticks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stick-breaking in plain torch, over all pairs, in logarithms."""
    z = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = torch.ones(z.shape[-2:], dtype=torch.bool).tril(-1)
    left = torch.where(seen, torch.nn.functional.logsigmoid(-z), 0).flip(-1).cumsum(-1).flip(-1)
    return torch.where(seen, torch.exp(z + left), 0) @ v


OPS = (
    Op("linear attention", linear, chunked),
    Op("linear attention, one head", linear, chunked, heads=1),
    Op("stick-breaking", stick, None),
    Op("stick-breaking, every key counts", stick, None, shift=-6.0),
    Op("stick-breaking, every key counts", stick, sticks, length=2048, shift=-6.0),
)


def measure(
    *,
    ops: tuple[Op, ...] = OPS,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    dim: int = 64,
    rounds: int = 5,
    minutes: float = 6.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure ``ms_sdpa / ms_ours`` and ``ms_torch / ms_ours`` of every op, forward and backward."""
    groups = [(op, dtype) for op in ops for dtype in dtypes]
    box = Box(minutes * 60)
    for number, (op, dtype) in enumerate(groups):
        q, k, v, dout = inputs(op.length, heads=op.heads, dim=dim, dtype=dtype)
        if op.shift:
            with torch.no_grad():
                q[..., -1], k[..., -1] = 1, op.shift * dim**0.5
        able = {"sdpa": dense, "torch": op.plain, "ours": op.ours}
        runs = {}
        for name, attention in able.items():
            if attention is not None:
                runs[f"{name} forward"] = forward(attention, q, k, v)
                runs[f"{name} backward"] = backward(attention, q, k, v, dout)
        share = Box(box.left / (len(groups) - number))
        watch = f"{op.label}, {dtype}"
        timings = interleave(
            runs, rounds=rounds, box=share, on_run=lambda name, w=watch: on_run(f"{w}, {name}")
        )
        for way in ("forward", "backward"):
            row: Row = {"bench": "ops", "case": f"{op.label}, {way}", "dtype": dtype, "T": op.length}
            row |= {"heads": op.heads, "dim": dim}
            ms = {name: timings[f"{name} {way}"].median * 1e3 for name in able if f"{name} {way}" in runs}
            row |= {"ms_sdpa": ms["sdpa"], "ms_torch": ms.get("torch"), "ms": ms["ours"]}
            row |= {"ratio": ms["sdpa"] / ms["ours"]}
            row |= {"ratio_torch": ms["torch"] / ms["ours"] if "torch" in ms else None}
            yield row | {"rounds": len(timings[f"ours {way}"].times)}
