"""The blocks of keys that tiles visit, in order: what lists hold apart, a stick needs in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import Plan
from .launch import alike


@dataclass(frozen=True)
class Visits:
    """Every visit of a tile to a block of keys, newest keys first, and again block by block.

    `lists` [B,H,tiles] of a plan have visits `start` to `start + count - 1`, each of key rows `low` to
    `high - 1` within one block; `word` is the place of its unit among all bits, or -1. `by_block` are visits
    ordered by block, those of block c at `block_start` to `block_start + block_count - 1` [B,H,blocks].
    """

    start: Tensor
    count: Tensor
    low: Tensor
    high: Tensor
    word: Tensor
    by_block: Tensor
    tile: Tensor
    block_start: Tensor
    block_count: Tensor


def visits(plan: Plan, block: int) -> Visits:
    """The visits of a plan to blocks of so many key rows."""
    device, blocks = plan.device, -(-plan.k_rows // block)
    tables = (plan.span_start, plan.span_count, plan.start, plan.full, plan.count, plan.bits_start)
    span_start, span_count, start, full, count, bits_start = alike(*tables)
    shape = next(x.shape for x in (span_count, count) if x is not None)
    found = []
    if span_start is not None and span_count is not None and plan.spans is not None:
        cell, entry, _ = _entries(span_start, span_count)
        low, high = plan.spans[entry].long().unbind(1)
        found.append((cell, low.clamp(min=0), high.clamp(max=plan.k_rows), torch.full_like(cell, -1)))
    if start is not None and count is not None and full is not None and plan.index is not None:
        cell, entry, place = _entries(start, count)
        low = plan.index[entry].long() * plan.unit
        word = torch.full_like(cell, -1)
        if bits_start is not None:
            place = place - full.flatten()[cell]
            word = torch.where(place >= 0, bits_start.flatten()[cell] + place, -1)
        found.append((cell, low, (low + plan.unit).clamp(max=plan.k_rows), word))
    cell, low, high, word = (torch.cat(x) for x in zip(*found, strict=True))
    # an entry is a visit of each block that it touches
    first = low // block
    times = torch.where(high > low, (high - 1) // block - first + 1, 0)
    which = torch.repeat_interleave(torch.arange(len(times), device=device), times)
    nth = torch.arange(len(which), device=device) - (times.cumsum(0) - times)[which]
    cell, at, word = cell[which], first[which] + nth, word[which]
    low, high = torch.maximum(low[which], at * block), torch.minimum(high[which], (at + 1) * block)
    newest = torch.argsort(cell * (plan.k_rows + 1) - low)
    cell, at, low, high, word = (x[newest] for x in (cell, at, low, high, word))
    count = torch.bincount(cell, minlength=math.prod(shape))
    tiles = max(plan.tiles, 1)
    block_of = cell // tiles * blocks + at
    readers = torch.bincount(block_of, minlength=math.prod(shape[:2]) * blocks)
    return Visits(
        (count.cumsum(0) - count).view(shape), count.int().view(shape), low.int(), high.int(), word,
        torch.argsort(block_of, stable=True), (cell % tiles).int(),
        (readers.cumsum(0) - readers).view(*shape[:2], blocks), readers.int().view(*shape[:2], blocks),
    )  # fmt: skip


def _entries(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The list of each entry, where it lies, and its place in the list."""
    many = count.flatten().long()
    cell = torch.repeat_interleave(torch.arange(len(many), device=many.device), many)
    place = torch.arange(len(cell), device=many.device) - (many.cumsum(0) - many)[cell]
    return cell, start.flatten()[cell] + place, place
