"""The transpose of a plan's lists: for each group of keys, the query tiles that visit it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .builders import builders

if TYPE_CHECKING:
    from .core import KeyLists, Plan

KEY_GROUP = 128
FAR = 1 << 32
"""More than any row number."""
ENTRIES = 1 << 22
"""Entries that are transposed in one go, where one (batch, head) has no more."""


def transpose_spans(plan: Plan) -> KeyLists:
    """For each group of KEY_GROUP key rows, the tiles whose spans touch it, as ranges of tiles.

    Spans at one place of the lists of neighbouring tiles form a run while both their ends only move to the
    right and each touches the one before: causal, window, bucket and document plans are a few runs a list.
    Within a run, the tiles that touch a group are neighbours, and so are those that cover it; sorted searches
    find both. So dense causal attention over R tiles takes O(R) entries, not the R^2 / 2 of single tiles.
    """
    from .core import KeyLists

    assert plan.span_start is not None and plan.span_full is not None
    assert plan.span_count is not None and plan.spans is not None
    batch, heads, R = plan.span_count.shape
    columns, lists, device = -(-plan.k_rows // KEY_GROUP), batch * heads, plan.device
    count = plan.span_count.flatten()
    cell = torch.repeat_interleave(torch.arange(len(count), device=device), count)
    place = torch.arange(len(cell), device=device) - (count.cumsum(0) - count)[cell]
    lo, hi = plan.spans[plan.span_start.flatten()[cell] + place].long().unbind(-1)
    some = hi > lo
    cell, place, lo, hi = (x[some] for x in (cell, place, lo, hi))
    widest = int(count.max()) if len(count) else 0
    at, order = ((cell // max(R, 1) * widest + place) * R + cell % max(R, 1)).sort()
    cell, place, lo, hi = (x[order] for x in (cell, place, lo, hi))  # by list, place in the list, tile
    tile, of_list = cell % max(R, 1), cell // max(R, 1)
    full = place < plan.span_full.flatten()[cell]

    fresh = torch.ones_like(full)
    fresh[1:] = (at[1:] != at[:-1] + 1) | (tile[1:] == 0) | (full[1:] != full[:-1])
    fresh[1:] |= (lo[1:] < lo[:-1]) | (hi[1:] < hi[:-1]) | (lo[1:] > hi[:-1])
    begin, run = fresh.nonzero()[:, 0], fresh.cumsum(0) - 1
    end = torch.cat([begin[1:], begin.new_full((1,), len(at))])[: len(begin)]
    first = lo[begin] // KEY_GROUP
    n = (hi[end - 1] - 1) // KEY_GROUP + 1 - first
    own = torch.repeat_interleave(torch.arange(len(begin), device=device), n)
    column = torch.arange(len(own), device=device) - (n.cumsum(0) - n - first)[own]
    left, right = column * KEY_GROUP, (column + 1) * KEY_GROUP

    def search(keys: Tensor, value: Tensor, after: bool) -> Tensor:
        return torch.searchsorted(run * FAR + keys, own * FAR + value, right=after)

    a, b = search(hi, left, True), search(lo, right, False)  # the group is touched
    s, e = search(hi, right.clamp(max=plan.k_rows), False), search(lo, left, True)  # and covered
    covered = full[begin][own] & (torch.maximum(s, a) < e)
    s, e = torch.where(covered, torch.maximum(s, a), b), torch.where(covered, e, b)
    froms, ends, partial = torch.cat([s, a, e]), torch.cat([e, s, b]), torch.arange(3, device=device) > 0
    some = (ends > froms).nonzero()[:, 0]
    froms, ends = froms[some], ends[some]
    group = (of_list[begin][own] * columns + column).repeat(3)[some]
    order = ((group * 2 + partial.repeat_interleave(len(own))[some]) * max(R, 1) + tile[froms]).argsort()
    listed = torch.bincount(group, minlength=lists * columns)
    lead = (batch, heads, columns)
    return KeyLists(
        start=(listed.cumsum(0) - listed).view(lead),
        count=listed.int().view(lead),
        full=torch.bincount(group[some < len(own)], minlength=lists * columns).int().view(lead),
        index=tile[froms][order].int(),
        source=place[froms][order].int(),
        until=(tile[ends - 1] + 1)[order].int(),
        group=KEY_GROUP,
    )


def transpose_units(plan: Plan) -> KeyLists:
    """For each unit, the tiles that list it."""
    from .core import KeyLists

    assert plan.start is not None and plan.full is not None
    assert plan.count is not None and plan.index is not None
    batch, heads, R = plan.count.shape
    columns, lists = -(-plan.k_rows // plan.unit), batch * heads
    starts, fulls, counts = (x.reshape(lists, R) for x in (plan.start, plan.full, plan.count))
    native = builders(len(plan.index), plan.index, plan.count)
    transpose = _transpose if native is None else native.transpose
    start, count, full, index, source = transpose(starts, fulls, counts, plan.index, columns)
    lead = (batch, heads, columns)
    return KeyLists(
        start=start.view(lead),
        count=count.view(lead),
        full=full.view(lead),
        index=index,
        source=source,
        until=None,
        group=plan.unit,
    )


def _transpose(
    starts: Tensor, fulls: Tensor, counts: Tensor, units: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Builders.transpose` in PyTorch."""
    lists, R = counts.shape
    most = int(counts.sum(-1).max()) if lists and R else 0
    step = max(1, min(ENTRIES // max(most, 1), 2**29 // max(columns, 1)))
    found: list[tuple[Tensor, ...]] = []
    for at in range(0, max(lists, 1), step):
        n, first, sure = (x[at : at + step].flatten() for x in (counts, starts, fulls))
        cell = torch.repeat_interleave(torch.arange(len(n), dtype=torch.int32, device=n.device), n)
        slot = torch.arange(len(cell), device=n.device) - (n.cumsum(0) - n)[cell]
        source = (first[cell] + slot).to(torch.int32 if len(units) < 2**31 else torch.int64)
        partial = (slot >= sure[cell]).int()
        total = counts[at : at + step].shape[0] * columns
        key = ((cell // max(R, 1) * columns + units[source]) * 2 + partial).int()
        met = torch.bincount(key, minlength=2 * total).view(total, 2)
        order = key.sort(stable=True).indices  # entries are met in the order of their tiles, and keep it
        found.append((met.sum(-1), met[:, 0], cell[order] % max(R, 1), source[order]))
    listed, n_full, index, sources = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*found, strict=True))
    return listed.cumsum(0) - listed, listed.int(), n_full.int(), index.int(), sources
