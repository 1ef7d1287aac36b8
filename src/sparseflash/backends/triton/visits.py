"""Key ranges that tiles visit, sorted: plan lists hold spans and units apart, stick-breaking needs one order.

An entry of a list is a span or a unit; a tile visits it one block of keys at a time. Where lists have a fixed
capacity (`room`), shapes alone give all sizes: nothing waits for a device. Memory is that of the lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.transpose import counted
from .launch import alike


@dataclass(frozen=True)
class Visits:
    """The entries of every tile, newest keys first, and the numbers ("slots") of the blocks that they visit.

    Lists [B,H,tiles] have entries `start` to `start + count - 1`: key rows `low` to `high - 1`, the index
    `word` of a partial unit among all bits (or -1), and `slot`, the number of the oldest block that the entry
    visits, counted over all blocks of its tile. `span_slot` and `unit_slot` are the slots in the order of the
    plan's own lists: entry p of a tile's spans has `span_slot[span_at + p]`. Example, blocks of 64 keys: a
    tile's spans [0, 64) and [100, 300) have slots 0 and 1; the second visits blocks 1 to 4, in slots 1 to 4.
    """

    start: Tensor
    count: Tensor
    low: Tensor
    high: Tensor
    word: Tensor
    slot: Tensor
    span_at: Tensor
    span_slot: Tensor
    unit_at: Tensor
    unit_slot: Tensor
    slots: int
    """Number of blocks that a tile visits, at most."""


class Places(NamedTuple):
    """All places of all lists, flat: the list (of [B,H,tiles]), the place in it, the entry there, if any."""

    cell: Tensor
    place: Tensor
    entry: Tensor
    real: Tensor
    begin: Tensor
    """Offset of each list's first place."""


def visits(plan: Plan, block: int) -> Visits:
    """The visits of a plan, for blocks of `block` key rows."""
    tables = (plan.span_start, plan.span_count, plan.start, plan.full, plan.count, plan.bits_start)
    span_start, span_count, start, full, count, bits_start = alike(*tables)
    shape = next(x.shape for x in (span_count, count) if x is not None)
    lists, blocks = math.prod(shape), -(-plan.k_rows // block)
    taken = torch.zeros(lists, dtype=torch.int64, device=plan.device)  # blocks numbered so far, of each list
    span_at = unit_at = taken
    span_slot = unit_slot = taken[:0]
    found, slots = [], 0
    if span_start is not None and span_count is not None and plan.spans is not None:
        at = _places(span_start, span_count, plan.span_room)
        low, high = plan.spans[at.entry].long().unbind(1)
        low, high = low.clamp(min=0), torch.where(at.real, high.clamp(max=plan.k_rows), 0)
        span_at, (span_slot, taken) = at.begin, _numbered(at, low, high, taken, block)
        slots = blocks + plan.span_room if plan.span_room else _most(taken)
        found.append((at.cell, low, high, torch.full_like(at.cell, -1), span_slot))
    if start is not None and count is not None and full is not None and plan.index is not None:
        at = _places(start, count, plan.room)
        low = plan.index[at.entry].long() * plan.unit
        high = torch.where(at.real, (low + plan.unit).clamp(max=plan.k_rows), 0)
        word = torch.full_like(at.cell, -1)
        if bits_start is not None:
            place = at.place - full.flatten()[at.cell]
            word = torch.where(place >= 0, bits_start.flatten()[at.cell] + place, -1)
        unit_at, (unit_slot, taken) = at.begin, _numbered(at, low, high, taken, block)
        aligned = plan.unit % block == 0 or block % plan.unit == 0
        each = -(-plan.unit // block) if aligned else (plan.unit - 2) // block + 2
        slots = slots + min(blocks + plan.room, plan.room * each) if plan.room else max(slots, _most(taken))
        found.append((at.cell, low, high, word, unit_slot))
    cell, low, high, word, slot = (torch.cat(x) for x in zip(*found, strict=True))
    cell = torch.where(high > low, cell, lists)  # empty entries sort behind all others
    newest = torch.argsort(cell * (plan.k_rows + 1) - low)
    listed = counted(cell, lists)
    return Visits(
        (listed.cumsum(0) - listed).view(shape), listed.int().view(shape),
        low[newest].int(), high[newest].int(), word[newest], slot[newest].int(),
        span_at.view(shape), span_slot.int(), unit_at.view(shape), unit_slot.int(), max(slots, 1),
    )  # fmt: skip


def _places(start: Tensor, count: Tensor, room: int) -> Places:
    """The places of all lists; without a fixed capacity only the places in use, which reads values."""
    many, device = count.flatten().long(), count.device
    if room:
        cell = torch.arange(len(many) * room, device=device) // room
        begin = torch.arange(len(many), device=device) * room
    else:
        cell = torch.repeat_interleave(torch.arange(len(many), device=device), many)
        begin = many.cumsum(0) - many
    place = torch.arange(len(cell), device=device) - begin[cell]
    real = place < many[cell]
    return Places(cell, place, torch.where(real, start.flatten()[cell] + place, 0), real, begin)


def _numbered(at: Places, low: Tensor, high: Tensor, taken: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Number each entry's oldest block, list by list from `taken` on; also return the updated `taken`."""
    times = torch.where(high > low, (high - 1) // block - low // block + 1, 0)
    before = times.cumsum(0) - times
    return taken[at.cell] + before - before[at.begin[at.cell]], taken.index_add(0, at.cell, times)


def _most(taken: Tensor) -> int:
    """The largest number; reads it from the device."""
    return int(taken.max()) if len(taken) else 0
