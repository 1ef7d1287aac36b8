"""The transpose of a plan's lists: for each group of keys, the query tiles that visit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .core import KeyLists, Plan

KEY_GROUP = 128
Groups = Callable[["Plan", Tensor, Tensor], tuple[Tensor | None, Tensor, Tensor]]
ENTRIES = 1 << 22
"""Entries that are transposed in one go, where one (batch, head) has no more."""


def transpose_spans(plan: Plan) -> KeyLists:
    """For each group of KEY_GROUP key rows, the tiles whose spans touch it (partial where a span cuts it)."""
    assert plan.span_start is not None and plan.span_full is not None
    assert plan.span_count is not None and plan.spans is not None
    lists = plan.span_start, plan.span_full, plan.span_count
    return _transpose(plan, *lists, len(plan.spans), KEY_GROUP, _groups_of_spans)


def transpose_units(plan: Plan) -> KeyLists:
    """For each unit, the tiles that list it."""
    assert plan.start is not None and plan.full is not None
    assert plan.count is not None and plan.index is not None
    lists = plan.start, plan.full, plan.count
    return _transpose(plan, *lists, len(plan.index), plan.unit, _groups_of_units)


def _groups_of_units(plan: Plan, source: Tensor, full: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    assert plan.index is not None
    return None, plan.index[source], full


def _groups_of_spans(plan: Plan, source: Tensor, full: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """(entry, group, whether the group is covered and full) of every group that a span touches."""
    assert plan.spans is not None
    lo, hi = plan.spans[source].unbind(-1)
    first, last = lo // KEY_GROUP, (hi - 1) // KEY_GROUP + 1
    n = torch.where(hi > lo, last - first, 0)
    pick = torch.repeat_interleave(torch.arange(len(n), dtype=torch.int32, device=n.device), n)
    ends = n.cumsum(0)
    at = torch.arange(len(pick), dtype=ends.dtype, device=n.device)
    group = (at - (ends - n - first)[pick]).int()
    edge = ((group + 1) * KEY_GROUP).clamp(max=plan.k_rows)
    return pick, group, full[pick] & (lo[pick] <= group * KEY_GROUP) & (hi[pick] >= edge)


def _transpose(
    plan: Plan, start: Tensor, full: Tensor, count: Tensor, size: int, group: int, groups_of: Groups
) -> KeyLists:
    """Entries are met in the order of their tiles; a stable sort by (key group, partial) keeps that order."""
    from .core import KeyLists

    batch, heads, R = count.shape
    columns, lists = -(-plan.k_rows // group), batch * heads
    starts, fulls, counts = (x.reshape(lists, R) for x in (start, full, count))
    most = int(counts.sum(-1).max()) if lists and R else 0
    step = max(1, min(ENTRIES // max(most, 1), 2**29 // max(columns, 1)))
    found: list[tuple[Tensor, ...]] = []
    for at in range(0, max(lists, 1), step):
        n, first, sure = (x[at : at + step].flatten() for x in (counts, starts, fulls))
        cell = torch.repeat_interleave(torch.arange(len(n), dtype=torch.int32, device=n.device), n)
        slot = torch.arange(len(cell), device=n.device) - (n.cumsum(0) - n)[cell]
        source = (first[cell] + slot).to(torch.int32 if size < 2**31 else torch.int64)
        whole = slot < sure[cell]
        del slot
        pick, column, whole = groups_of(plan, source, whole)
        if pick is not None:
            cell, source = cell[pick], source[pick]
        total = counts[at : at + step].shape[0] * columns
        key = ((cell // max(R, 1) * columns + column) * 2).int() + (~whole).int()
        met = torch.bincount(key, minlength=2 * total).view(total, 2)
        order = key.sort(stable=True).indices
        found.append((met.sum(-1), met[:, 0], cell[order] % max(R, 1), source[order]))
    listed, n_full, index, sources = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*found, strict=True))
    lead = (batch, heads, columns)
    return KeyLists(
        start=(listed.cumsum(0) - listed).view(lead),
        count=listed.int().view(lead),
        full=n_full.int().view(lead),
        index=index.int(),
        source=sources,
        group=group,
    )
