"""Decoding: one work list shares the keys of few rows among many programs; results are merged in order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ...plan import Plan
from ...plan.options import spread_heads
from .common import INTERPRETED, LN2, LOG2E, NEVER, Table, head_at, row_at
from .launch import alike, found, view

_LEAST = 16 if INTERPRETED.value else 256
"""Minimum number of keys of a piece."""


class Work(NamedTuple):
    """Which program computes which piece of which list of [B,H,tiles]; a list's pieces are consecutive.

    `pieces` [programs, 3] int32: the list of each program, the number of its piece, and the list's number of
    pieces; an idle program has a piece number behind the last. `lists` [B*H*tiles, 2]: the first program of
    each list, and how many programs it has, at least one.
    """

    pieces: Tensor
    lists: Tensor


def keys_listed(plan: Plan) -> Tensor:
    """Number of key rows in each list: int64 [B|1,heads,tiles]."""
    spanned = united = None
    if (spans := plan.span_lists) is not None:
        low, high = spans.rows(spans.pool.long())
        size = (high.clamp(max=plan.k_rows) - low.clamp(min=0)).clamp(min=0)
        before, start = pad(size.cumsum(0), (1, 0)), spans.start.long()
        spanned = before[start + spans.count] - before[start]
    if (units := plan.unit_lists) is not None:
        united = units.count.long() * units.unit
    some = [x for x in alike(spanned, united) if x is not None]
    return some[0] if len(some) == 1 else some[0] + some[1]


def work_of(plan: Plan, batch: int, heads: int, programs: int) -> Work:
    """Split all lists into equal shares for `programs` programs; each list's last share may be smaller.

    LeanAttention's schedule (arXiv 2405.10480, section IV), cut at the ends of lists. Computed on the device
    without reading values on the host, once per plan. Pieces are fractions of a list as it is when read:
    if a plan changes in place, the schedule is out of balance until it is computed anew, but never wrong.
    """
    made: dict[tuple[int, ...], Work] = plan.__dict__.setdefault("_work", {})
    key = (batch, heads, programs, plan.tiles)
    if kept := made.get(key):
        return kept
    keys = spread_heads(keys_listed(plan), heads).expand(batch, -1, -1).flatten()
    share = (-(keys.sum() // -programs)).clamp(min=_LEAST)
    pieces = (-(keys // -share)).clamp(min=1)
    end = pieces.cumsum(0)
    program = torch.arange(len(keys) + programs, device=plan.device)
    cell = torch.searchsorted(end, program, right=True).clamp(max=len(keys) - 1)
    begin = end - pieces
    piece = (program - begin[cell]).minimum(pieces[cell])
    work = Work(torch.stack([cell, piece, pieces[cell]], -1).int(), torch.stack([begin, pieces], -1).int())
    # a tensor created while a graph is captured has no values before the graph runs: do not keep it
    if plan.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        made[key] = work
    return work


@triton.jit
def merge_kernel(
    PART, PART_TOP, PART_REST, LISTS, OUT, LSE, TOP, REST, ORDER, unit, H, Tq, tiles, rows,
    TILE: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ORDERED: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """OUT, LSE and norm of one row, from PART [programs, TILE, DV] and the norms of its programs."""
    cell, within = tl.program_id(0) // TILE, tl.program_id(0) % TILE
    bh, row = cell // tiles, cell % tiles * TILE + within
    b, h = bh // H, bh % H
    token = row
    if ORDERED:
        token = tl.load(row_at(ORDER, b, h, H, rows) + row, mask=row < rows, other=-1)
    real = (row < rows) & (token >= 0)
    first, pieces = tl.load(LISTS + 2 * cell), tl.load(LISTS + 2 * cell + 1)
    d = tl.arange(0, BDV)
    m, total = tl.full([], NEVER, tl.float32), tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BDV], tl.float32)
    for i in range(0, pieces, MANY):
        n = i + tl.arange(0, MANY)
        at = (first + n).to(tl.int64) * TILE + within
        top = tl.load(PART_TOP + at, mask=real & (n < pieces), other=NEVER)
        rest = tl.load(PART_REST + at, mask=real & (n < pieces), other=0.0)
        now = tl.maximum(m, tl.max(top, 0))
        level = tl.where(now == NEVER, 0.0, now)
        factor = unit * LOG2E
        weight, shrink = tl.exp2((top - level) * factor + rest * LOG2E), tl.exp2((m - level) * factor)
        live = (real & (n < pieces))[:, None] & (d < DV)[None, :]
        part = tl.load(PART + at[:, None] * DV + d[None, :], mask=live, other=0.0)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        m = now
    some = total > 0
    total = tl.where(some, total, 1.0)
    to = head_at(OUT, b.to(tl.int64), h.to(tl.int64)) + token.to(tl.int64) * OUT.row
    tl.store(to + d * OUT.lane, (acc / total).to(OUT.at.dtype.element_ty), mask=real & (d < DV))
    state, rest = bh.to(tl.int64) * Tq + token, tl.log2(total) * LN2
    tl.store(LSE + state, tl.where(some, m * unit + rest, NEVER), mask=real)
    tl.store(TOP + state, tl.where(some, m, NEVER), mask=real)
    tl.store(REST + state, rest, mask=real)


def merge(
    part: Tensor,
    part_norm: Tensor,
    work: Work,
    plan: Plan,
    unit: float,
    out: Tensor,
    lse: Tensor,
    norm: Tensor,
) -> None:
    """Merge the programs' results, part [programs,1,rows,Dv] and norms in fp32, into out, lse and norm."""
    B, H, Tq, Dv = out.shape
    order = Table(out if plan.q_order is None else plan.q_order.contiguous(), *found(plan.q_order))
    tile = part.shape[2]
    merge_kernel[(B * H * plan.tiles * tile,)](
        part, part_norm[0], part_norm[1], work.lists, view(out), lse, norm[0], norm[1], order,
        unit=unit, H=H, Tq=Tq, tiles=plan.tiles, rows=plan.q_rows, TILE=tile, DV=Dv,
        BDV=triton.next_power_of_2(Dv), ORDERED=plan.q_order is not None, MANY=16, num_warps=4,
    )  # fmt: skip
