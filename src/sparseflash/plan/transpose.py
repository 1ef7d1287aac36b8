"""The transpose of a plan's lists: for each group of keys, the query tiles that visit it.

Where values can be read, the transpose is compact. Elsewhere, for lists of fixed capacity (`room`), its size
follows from shapes alone: no synchronisation, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .lists import Spans, Units
from .make.native import builders
from .options import host
from .ragged import begins, expand
from .record import KeyLists, Record
from .stamps import stamp

P = TypeVar("P", bound=Record)
KEY_GROUP = 128
FAR = 1 << 32
"""Larger than any row number."""
ENTRIES = 1 << 22
"""Entries that are transposed in one chunk, which holds at least one (batch, head)."""


def transpose_spans(spans: Spans, k_rows: int) -> KeyLists:
    """For each group of KEY_GROUP key rows, the tiles whose spans touch it, as ranges of tiles.

    Spans at the same place in the lists of consecutive tiles form a run while both ends only move to the
    right and each span touches the one before: causal, window, bucket and document plans are a few runs a
    list. Within a run the tiles that touch a group are consecutive, and so are those that cover it; binary
    searches find both. So dense causal attention over R tiles takes O(R) entries, not R^2 / 2.

    Example, KEY_GROUP = 128: tiles 0, 1, 2 with spans [0, 128), [0, 256), [0, 384) are one run. Group 1 is
    keys 128..255: touched by tiles 1, 2 (a = 1, b = 3), covered, if full, by the same (s = 1, e = 3).
    """
    if spans.room and not host(spans.pool):
        return _spans_unseen(spans, k_rows)
    batch, heads, R = spans.count.shape
    columns, lists, device = -(-k_rows // KEY_GROUP), batch * heads, spans.pool.device
    cell, place, entry, full = spans.listed()
    lo, hi = spans.rows(entry)
    some = hi > lo
    cell, place, lo, hi, full = (x[some] for x in (cell, place, lo, hi, full))
    widest = int(spans.count.max()) if spans.count.numel() else 0
    at, order = ((cell // R * widest + place) * R + cell % R).sort()
    # now sorted by list, place in the list, tile
    cell, place, lo, hi, full = (x[order] for x in (cell, place, lo, hi, full))
    tile, of_list = cell % R, cell // R

    fresh = torch.ones_like(full)
    fresh[1:] = (at[1:] != at[:-1] + 1) | (tile[1:] == 0) | (full[1:] != full[:-1])
    fresh[1:] |= (lo[1:] < lo[:-1]) | (hi[1:] < hi[:-1]) | (lo[1:] > hi[:-1])
    begin, run = fresh.nonzero()[:, 0], fresh.cumsum(0) - 1
    end = torch.cat([begin[1:], begin.new_full((1,), len(at))])[: len(begin)]
    first = lo[begin] // KEY_GROUP
    n = -(-hi[end - 1] // KEY_GROUP) - first
    own, place_of_run = expand(n)
    column = first[own] + place_of_run
    left, right = column * KEY_GROUP, (column + 1) * KEY_GROUP

    def search(keys: Tensor, value: Tensor, after: bool) -> Tensor:
        return torch.searchsorted(run * FAR + keys, own * FAR + value, right=after)

    a, b = search(hi, left, True), search(lo, right, False)  # tiles a..b-1 touch the group
    s, e = search(hi, right.clamp(max=k_rows), False), search(lo, left, True)  # tiles s..e-1 cover it
    covered = full[begin][own] & (torch.maximum(s, a) < e)
    s, e = torch.where(covered, torch.maximum(s, a), b), torch.where(covered, e, b)
    froms, ends, partial = torch.cat([s, a, e]), torch.cat([e, s, b]), torch.arange(3, device=device) > 0
    some = (ends > froms).nonzero()[:, 0]
    froms, ends = froms[some], ends[some]
    group = (of_list[begin][own] * columns + column).repeat(3)[some]
    order = ((group * 2 + partial.repeat_interleave(len(own))[some]) * R + tile[froms]).argsort()
    listed = torch.bincount(group, minlength=lists * columns)
    lead = (batch, heads, columns)
    return KeyLists(
        start=begins(listed).view(lead),
        count=listed.int().view(lead),
        full=torch.bincount(group[some < len(own)], minlength=lists * columns).int().view(lead),
        index=tile[froms][order].int(),
        source=place[froms][order].int(),
        until=(tile[ends - 1] + 1)[order].int(),
        group=KEY_GROUP,
    )


def transpose_units(units: Units) -> KeyLists:
    """For each unit, list the tiles that visit it."""
    batch, heads, R = units.count.shape
    columns, lists = -(-units.k_rows // units.unit), batch * heads
    if units.room and not host(units.pool):
        return _units_unseen(units)
    starts, fulls, counts = (x.reshape(lists, R) for x in (units.start, units.full, units.count))
    native = builders(len(units.pool), units.pool, units.count)
    transpose = _transpose if native is None else native.transpose
    start, count, full, index, source = transpose(starts, fulls, counts, units.pool, columns)
    lead = (batch, heads, columns)
    return KeyLists(
        start=start.view(lead),
        count=count.view(lead),
        full=full.view(lead),
        index=index,
        source=source,
        until=None,
        group=units.unit,
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
        cell, slot = expand(n)
        source = (first[cell] + slot).to(torch.int32 if len(units) < 2**31 else torch.int64)
        partial = (slot >= sure[cell]).int()
        total = counts[at : at + step].shape[0] * columns
        key = ((cell // R * columns + units[source]) * 2 + partial).int()
        met = torch.bincount(key, minlength=2 * total).view(total, 2)
        order = key.sort(stable=True).indices  # stable, so tiles stay ascending
        found.append((met.sum(-1), met[:, 0], cell[order] % R, source[order]))
    listed, n_full, index, sources = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*found, strict=True))
    return begins(listed), listed.int(), n_full.int(), index.int(), sources


# ---------------------------------------------------------------- without reading values


class Entries(NamedTuple):
    """Slots of unit lists, flat: index of the list in [B,H,R], place in it, unit, and whether it is used."""

    cell: Tensor
    place: Tensor
    unit: Tensor
    real: Tensor


def unit_entries(units: Units) -> Entries:
    """Enumerate entries; for lists of fixed capacity every slot, used or not, without synchronisation."""
    if not units.room:
        listed = units.listed()
        return Entries(listed.cell, listed.place, listed.entry, torch.ones_like(listed.full))
    count = units.count.flatten().long()
    at = torch.arange(count.numel() * units.room, device=count.device)
    cell, place = at // units.room, at % units.room
    real = place < count[cell]
    return Entries(cell, place, torch.where(real, units.pool, 0).long(), real)


def _units_unseen(units: Units) -> KeyLists:
    """`transpose_units` by shapes alone: a stable sort of all slots, with unused slots at the end."""
    (batch, heads, R), columns = units.count.shape, -(-units.k_rows // units.unit)
    entries, none = unit_entries(units), 2 * batch * heads * columns
    partial = (entries.place >= units.full.flatten()[entries.cell]).long()
    key = (entries.cell // R * columns + entries.unit) * 2 + partial
    key = torch.where(entries.real, key, none)
    order, met = key.sort(stable=True).indices, counted(key, none).view(batch, heads, columns, 2)
    total = met.sum(-1)
    return KeyLists(
        start=begins(total),
        count=total.int(),
        full=met[..., 0].int(),
        index=(entries.cell % R)[order].int(),
        source=order.int() if len(order) < 2**31 else order,
        until=None,
        group=units.unit,
    )


def counted(key: Tensor, size: int) -> Tensor:
    """Count how often each number below `size` occurs, int64 [size]; `size` itself is not counted."""
    found = torch.zeros(size + 1, dtype=torch.int64, device=key.device)
    return found.index_add_(0, key, torch.ones_like(key))[:size]


def _spans_unseen(spans: Spans, k_rows: int) -> KeyLists:
    """`transpose_spans` by shapes alone: for each place of the lists and each group, one run of tiles.

    The run extends from the first to the last tile that touches the group; a tile between them that does not
    touch it is tested and contributes nothing. If all tiles between the first and the last that cover the
    group cover it too, these need no element test, and the run is cut in three.
    """
    batch, heads, R = spans.count.shape
    columns, room, G = -(-k_rows // KEY_GROUP), spans.room, KEY_GROUP
    lists, device = batch * heads, spans.pool.device
    lo, hi = spans.pool.view(lists, R, room, 2).transpose(1, 2).long().unbind(-1)  # [lists, room, R]
    slot = torch.arange(room, device=device)[:, None]
    full, count = (x.reshape(lists, 1, R) for x in (spans.full, spans.count))
    some = (slot < count) & (hi > lo)
    end = torch.where(hi >= k_rows, columns, hi // G)  # the last group may be shorter than G
    touched = (lo // G, torch.where(some, (hi + (G - 1)) // G, 0))
    covered = ((lo + (G - 1)) // G, torch.where(some & (slot < full), end, 0))
    begin, stop = (torch.cat(x) for x in zip(touched, covered))
    first, last = _stabbed(begin.flatten(0, 1), stop.flatten(0, 1), columns)
    (a, s), (b, e) = (x.view(2, lists, room, columns) for x in (first, last))
    n = _overlaps(*covered, columns)
    whole = (n > 0) & (e + 1 - s == n)
    a, b = torch.where(b < 0, 0, a), b + 1
    s, e = torch.where(whole, s, b), torch.where(whole, e + 1, b)
    # layout of each group [lists, columns]: `room` full runs, then 2 * `room` partial ones
    runs = torch.stack([torch.stack([s, e], -1), torch.stack([a, s], -1), torch.stack([e, b], -1)], 2)
    runs = runs.permute(0, 3, 2, 1, 4).reshape(-1, 2).int()
    lead, source = (batch, heads, columns), slot.flatten().int()
    total = torch.arange(lists * columns, device=device)
    return KeyLists(
        start=(total * (3 * room)).view(lead),
        count=torch.full(lead, 3 * room, dtype=torch.int32, device=device),
        full=torch.full(lead, room, dtype=torch.int32, device=device),
        index=runs[:, 0].contiguous(),
        source=source.repeat(3 * lists * columns),
        until=runs[:, 1].contiguous(),
        group=KEY_GROUP,
    )


def _overlaps(begin: Tensor, end: Tensor, size: int) -> Tensor:
    """Count, for each number below `size`, the ranges `begin ... end - 1` (last axis) that contain it."""
    lead = begin.shape[:-1]
    one = (end > begin).long()
    change = torch.zeros(*lead, size + 1, dtype=torch.int64, device=begin.device)
    change.scatter_add_(-1, begin.clamp(max=size), one)
    change.scatter_add_(-1, torch.maximum(begin, end).clamp(max=size), -one)
    return change.cumsum(-1)[..., :size]


def _stabbed(begin: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Find the first and last of R ranges that contain each number below `size`: [n, size], -1: none.

    A range is the union of two intervals of one power-of-two length, at its begin and at its end. They are
    scattered into a table row per power (a reversed sparse table); each row is then pushed down, halved, to
    the next smaller power. E.g. [2, 7) is [2, 6) and [3, 7), of row 2.
    """
    n, R = begin.shape
    levels = max(1, size.bit_length())
    length = (end - begin).clamp(min=1)
    level = torch.zeros_like(length)
    for power in range(1, levels):
        level += length >= 1 << power
    none = torch.iinfo(torch.int64).max
    order = torch.arange(R, device=begin.device).expand(n, R)
    # the last range is the first in reverse order
    table = torch.full((2, n, levels * size + 1), none, dtype=torch.int64, device=begin.device)
    for edge in (begin, end - (1 << level)):
        at = torch.where(end > begin, level * size + edge, levels * size)
        for which, value in enumerate((order, R - 1 - order)):
            table[which].scatter_reduce_(-1, at, value, "amin")
    table = table[..., : levels * size].view(2, n, levels, size)
    for power in reversed(range(levels - 1)):
        half, wide, narrow = 1 << power, table[:, :, power + 1], table[:, :, power]
        narrow[..., :] = torch.minimum(narrow, wide)
        narrow[..., half:] = torch.minimum(narrow[..., half:], wide[..., : size - half])
    first, last = table[:, :, 0]
    return torch.where(first == none, -1, first), torch.where(last == none, -1, R - 1 - last)


# ---------------------------------------------------------------- stored in the plan


def prepared(plan: P) -> P:
    """Attach the transposed lists (`Plan.prepare`)."""
    if plan.span_keys is not None or plan.unit_keys is not None:
        return plan
    spans, units = plan.span_lists, plan.unit_lists
    made = plan._changed(
        span_keys=None if spans is None else transpose_spans(spans, plan.k_rows),
        unit_keys=None if units is None else transpose_units(units),
    )
    object.__setattr__(made, "_derived_from", stamp(made.tensors().values()))
    return made


def current(plan: P) -> P:
    """Drop transposed lists that are older than the plan's tensors (`Plan.current`)."""
    known = vars(plan).get("_derived_from")
    if known is None or torch.compiler.is_compiling() or known == stamp(plan.tensors().values()):
        return plan
    return plan._changed(span_keys=None, unit_keys=None)
