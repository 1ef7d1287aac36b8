"""AnchorAttention: single keys (stripes) whose logits come close to the best local logit (the anchor)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..ops._arguments import as_scale, as_softcap
from ..ops.attention import attention
from ..plan import Plan
from ..plan.options import known, pieces, precise
from ..selection.scores import pooled
from .base import Context, Method, Selection, begin, check_counts

SHARP = 1024.0
"""Factor for maxima by an lse: lse(1024 x) / 1024 is max(x), to within log(n) / 1024."""


@dataclass(frozen=True)
class AnchorAttention(Method):
    """Groups of queries see the first keys, their own, and each earlier key that scores nearly as well.

    The anchor of a query is its best logit among the first and the nearest keys. A key in between is visible
    to a whole group if its logit with the mean query of some block of the group is at most `theta` below the
    block's mean anchor. This takes one threshold and no sorting. Region and stripes are one softmax.

    Papers: Zhang et al., "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity", arXiv
    2505.23520.

    Parameters
    ----------
    theta : float
        How far below the anchor a logit may lie (natural-log units); larger keeps more keys.
    block : int
        Queries of a block, whose mean query scores the keys.
    step : int
        Blocks of a group, which shares one key list; a query also sees its group's keys up to itself.
    sinks : int
        First blocks of keys, visible to all queries.
    anchor : "max" or "pooled"
        "max": the mean of the best logits of a block's queries, which takes another pass over the region;
        "pooled": the best logit of their mean query, which costs nothing and selects no worse.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, `scale` and `softcap`. Groups start at the
    first query of a chunk.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.AnchorAttention(theta=1.0, block=64, step=2)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.7
    (torch.Size([1, 2, 1024, 32]), True)
    """

    theta: float = 12.0
    block: int = 128
    step: int = 16
    sinks: int = 1
    anchor: str = "max"

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2505.23520"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_counts(self, 1, "block", "step")
        check_counts(self, 0, "sinks")
        fits = isinstance(self.theta, (int, float)) and not isinstance(self.theta, bool)
        if not (fits and math.isfinite(self.theta)):
            raise SparseFlashError(f"theta={self.theta!r}: expected a finite number")
        if self.anchor not in ("max", "pooled"):
            raise SparseFlashError(f"anchor={self.anchor!r}: expected max or pooled")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select the region as ranges and the stripes as gathered keys."""
        ctx, (Tq, Tk), at = ctx or {}, (q.shape[2], k.shape[2]), begin(ctx, q)
        scale, cap = as_scale(ctx.get("scale"), q.shape[3]), as_softcap(ctx.get("softcap"))
        frame: dict[str, Any] = {"Tq": Tq, "Tk": Tk, "causal": True, "q_offset": ctx.get("q_offset", 0)}
        group, sinks, q, k = self.block * self.step, min(self.sinks * self.block, Tk), q.detach(), k.detach()
        number = torch.arange(0, Tq, self.block, device=q.device)
        own, behind = at + number // group * group, at + (number + self.block).clamp(max=Tq)
        ends = ((torch.zeros_like(own), own.clamp(0, sinks)), (own.clamp(0, Tk), behind.clamp(0, Tk)))
        spans = torch.stack([torch.stack(pair, -1) for pair in ends], -2)
        region = Plan.from_spans(spans, tile=self.block, **frame)
        if not (q.numel() and k.numel()):
            return Selection(region)

        with precise(q):
            rows, level = pooled(q, self.block), None
            if self.anchor == "max":
                sharp: dict[str, Any] = {"scale": SHARP * scale, "softcap": SHARP * cap}
                _, best = attention(q, k, k[..., :1], region, return_lse=True, **sharp)
                level = pooled(best[..., None] / SHARP, self.block)
            k, found, key = k.to(rows.dtype), [], torch.arange(Tk, device=q.device)
            for r, to in pieces(rows.shape[2], self.step):
                tiles = slice(r, to)
                score = _products(rows[:, :, tiles], k, scale, cap)
                begins = own[..., tiles, None]
                if level is None:
                    near = ((key < sinks) | (key >= begins)) & (key < behind[..., tiles, None])
                    high = score.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
                else:
                    high = level[:, :, tiles]
                found.append(self._any((score >= high - self.theta) & (key >= sinks) & (key < begins)))
        frame["q_offset"] = region.q_offset
        stripes = Plan.from_blocks(torch.cat(found, 2), tile=group, unit=1, **frame)
        lists = {n: getattr(stripes, n) for n in ("start", "full", "count")}  # blocks share group lists
        lists = {n: x.repeat_interleave(self.step, -1)[..., : len(number)] for n, x in lists.items()}
        stripes = stripes._changed(tile=self.block, **lists)
        return Selection(Plan.from_lists(spans=region, index=stripes, disjoint=True))

    def _any(self, tiles: Tensor) -> Tensor:
        """Reduce `tiles [B,H,n,Tk]` by any over each group of `step` tiles; the last group may be short."""
        n = tiles.shape[2]
        if known(n) and n <= self.step:
            return tiles.any(2, keepdim=True)
        group = torch.arange(n, device=tiles.device) // self.step
        wanted = tiles.new_zeros(*tiles.shape[:2], -(-n // self.step), tiles.shape[3], dtype=torch.int32)
        return wanted.index_add(2, group, tiles.int()) > 0


def _products(rows: Tensor, k: Tensor, scale: float, cap: float) -> Tensor:
    """Logits of rows [B,Hq,n,D] against all keys: [B,Hq,n,Tk]."""
    B, Hq, n, D = rows.shape
    group = rows.reshape(B, k.shape[1], -1, D)  # broadcasting over k would copy it for each head of a group
    score = (group @ k.mT * scale).view(B, Hq, n, -1)
    return cap * (score / cap).tanh() if cap else score
