"""Benchmark cases: labelled attentions, random plans, inputs, and the calls to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.methods import HashSparse, QKSparse
from sparseflash.methods.base import Selection
from sparseflash.plan import Plan
from sparseflash.train.attention import Attention, build, dense

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One line of a plot.

    Attributes
    ----------
    label : str
        Name in tables and plots.
    attention : callable
        ``(q, k, v) -> out``; selection, sorting and gathering happen inside it.
    family : str
        Cases of a family share a colour.
    longest : int or None
        Longest length to measure, if any.
    """

    label: str
    attention: Attention
    family: str
    longest: int | None = None


def curves() -> list[Case]:
    """Dense, naive, Reformer, hash-sparse and QK-sparse, as in the paper's runtime figures."""
    cases = [
        Case("dense (torch SDPA)", dense, "dense"),
        Case("naive masked, 16 buckets", Naive(HashSparse(nb=16)), "naive", longest=4096),
        Case("reformer", build("reformer"), "reformer"),
    ]
    cases += [
        Case(f"hash-sparse, {nb} buckets", build("hash-sparse", {"nb": nb}), "hash-sparse")
        for nb in (4, 16, 64)
    ]
    cases += [
        Case(
            f"qk-sparse, {drop:.0%} dropped",
            build("qk-sparse", {"q_drop": drop, "k_drop": drop}),
            "qk-sparse",
        )
        for drop in (0.3, 0.5, 0.7)
    ]
    cases += [
        Case(f"naive qk-sparse, {drop:.0%} dropped", Compacted(QKSparse(drop, drop)), "naive", longest=8192)
        for drop in (0.3, 0.5, 0.7)
    ]
    return cases


@dataclass(frozen=True)
class Naive:
    """Hash-sparse attention as a boolean T x T mask for torch SDPA."""

    method: HashSparse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Hash, build the mask, attend."""
        with torch.no_grad():
            q_bucket, k_bucket = self.method.ids(q, k)
            keep = (q_bucket[..., :, None] == k_bucket[..., None, :]).tril_()
            empty = ~keep.any(-1, keepdim=True)  # a row without visible keys would be NaN
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep | empty)
        return out.masked_fill(empty, 0.0)

    def select(self, q: Tensor, k: Tensor) -> Selection:
        """Select the pairs of the mask, as a plan."""
        return self.method.select(q, k)


@dataclass(frozen=True)
class Compacted:
    """QK-sparse attention as gathered rows, with a mask of their positions, for torch SDPA."""

    method: QKSparse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Draw, gather, build the mask, attend, scatter."""
        with torch.no_grad():
            q_keep, k_keep = self.method.keep(q, k)
            q_rows, k_rows = (
                keep.sort(dim=-1, descending=True, stable=True).indices[..., : int(keep.sum(-1).max())]
                for keep in (q_keep, k_keep)
            )
            q_kept, k_kept = q_keep.gather(-1, q_rows), k_keep.gather(-1, k_rows)  # counts vary by head
            seen = (k_rows[..., None, :] <= q_rows[..., :, None]) & k_kept[..., None, :]
            empty = ~(seen.any(-1, keepdim=True) & q_kept[..., None])
        near = [
            x.gather(2, rows[..., None].expand(*rows.shape, x.shape[-1]))
            for x, rows in ((q, q_rows), (k, k_rows), (v, k_rows))
        ]
        out = F.scaled_dot_product_attention(*near, attn_mask=seen | empty).masked_fill(empty, 0.0)
        return torch.zeros_like(q).scatter(2, q_rows[..., None].expand_as(out), out)

    def select(self, q: Tensor, k: Tensor) -> Selection:
        """Select the same pairs, as a plan."""
        return self.method.select(q, k)


@dataclass(frozen=True)
class Blocks:
    """Random share of each tile's causal blocks, always with those on its diagonal, independent per head."""

    tile: int
    unit: int
    share: float

    def __call__(self, length: int, heads: int) -> Plan:
        """Draw the blocks: each tile keeps its diagonal, and random other blocks up to its share."""
        R, C = -(-length // self.tile), -(-length // self.unit)
        draw = torch.rand(1, heads, R, C, generator=torch.Generator().manual_seed(0))
        first, after = (torch.arange(R)[:, None] + n for n in (0, 1))
        key = torch.arange(C) * self.unit
        seen = key < after * self.tile
        draw = draw.masked_fill(key >= first * self.tile, 2.0).masked_fill(~seen, -1.0)
        rank = draw.argsort(-1, descending=True).argsort(-1)
        keep = seen & (rank < torch.round(seen.sum(-1, keepdim=True) * self.share).clamp_min(1))
        size = {"tile": self.tile, "unit": self.unit}
        return Plan.from_blocks(keep, Tq=length, Tk=length, causal=True, **size)


def inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 4,
    dim: int = 64,
    dtype: str = "fp32",
    seed: int = 0,
    device: str = "cpu",
) -> list[Tensor]:
    """Independent normal q, k, v and dout [batch, heads, length, dim]; q, k, v require gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(batch, heads, length, dim, generator=generator).to(device, DTYPES[dtype])
        for _ in range(4)
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def forward_backward(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> Callable[[], Any]:
    """Make a call that runs `attention` forward and backward."""
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), dout)


def forward(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """Make a call that runs `attention` forward only, on tensors without gradients."""
    tensors = [x.detach() for x in (q, k, v)]

    def run() -> Any:
        with torch.no_grad():
            return attention(*tensors)

    return run


def backward(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], Any]:
    """Make a call that runs the backward of `attention`; the forward runs once, here."""
    out = attention(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


DIRECTIONS: dict[str, Callable[..., Callable[[], Any]]] = {
    "forward": lambda attention, q, k, v, dout: forward(attention, q, k, v),
    "backward": backward,
    "both": forward_backward,
}
"""Function by direction, (attention, q, k, v, dout) to the call to time."""
