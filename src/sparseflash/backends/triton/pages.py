"""Scores of pages of keys by the rows that summarise each: a program scores several pages for one query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Pages
from .common import head_at
from .launch import view

WIDE = 4096
"""Elements of summary rows that a program holds at a time."""


@triton.jit
def larger(a, b):
    """The elementwise maximum; NaN is the largest."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def page_kernel(
    Q, ROWS, LAST, RULES, OUT, Hq, heads, Tq, n, w, pages, sinks, near, PARTS: tl.constexpr,
    GROUP: tl.constexpr, SUM: tl.constexpr, SHARED: tl.constexpr, RULED: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """OUT [B,heads,Tq,pages] for one query (a head group's queries, if SHARED) and BN pages."""
    cell = tl.program_id(0).to(tl.int64)
    t, slot = cell % Tq, cell // Tq
    b, head = slot // heads, slot % heads
    kv = head if SHARED else head // GROUP
    first = head * GROUP if SHARED else head
    page, d = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BW)
    last = tl.load(LAST + b * Tq + t)
    live = (page < pages) & (page <= last)
    rows = head_at(ROWS, b, kv)
    made: tl.constexpr = 1 if SUM or not SHARED else GROUP
    score = tl.full([BN], float("-inf"), tl.float32)
    for part in range(PARTS):
        at = page.to(tl.int64) * PARTS + part
        there = live & (at < n)
        seen = there[:, None] & (d < w)[None, :]
        row = tl.load(rows + at[:, None] * ROWS.row + d[None, :] * ROWS.lane, mask=seen, other=0.0).to(
            tl.float32
        )
        for g in tl.static_range(made):
            own = Q + ((b * Hq + first + g) * Tq + t) * w + d
            weight = tl.load(own, mask=d < w, other=0.0)
            if SUM:
                for other in tl.static_range(1, GROUP):
                    weight += tl.load(own + other * Tq * w, mask=d < w, other=0.0)
            x = tl.sum(row * weight[None, :], 1)
            score = tl.where(there, larger(score, x), score)
    free = True
    if RULED:
        near = tl.load(RULES + 2 * head)
        free = tl.load(RULES + 2 * head + 1) != 0
    forced = (page < sinks) | (page > last - near)
    score = tl.where(live & (forced | free), tl.where(forced, float("inf"), score), float("-inf"))
    tl.store(OUT + cell * pages + page, score, mask=page < pages)


def page_scores(q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages) -> Tensor:
    """Scores of pages for each query, in fp32 [B,heads,Tq,pages]."""
    (B, Hq, Tq, w), (_, Hkv, n, _) = q.shape, rows.shape
    heads, pages = Hkv if options.share else Hq, -(-n // options.parts)
    out = torch.empty((B, heads, Tq, pages), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    wide = triton.next_power_of_2(w)
    block = max(1, min(triton.next_power_of_2(pages), WIDE // wide))
    q, last = q.float().contiguous(), last.to(torch.int32).contiguous()
    page_kernel[(B * heads * Tq, triton.cdiv(pages, block))](
        q, view(rows), last, last if rules is None else rules.contiguous(), out,
        Hq, heads, Tq, n, w, pages, options.sinks, options.near, PARTS=options.parts, GROUP=Hq // Hkv,
        SUM=options.share == "sum", SHARED=bool(options.share), RULED=rules is not None, BN=block, BW=wide,
        num_warps=4,
    )  # fmt: skip
    return out
