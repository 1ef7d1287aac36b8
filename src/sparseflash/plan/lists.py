"""The lists of a plan as objects: the spans of key rows or the unit numbers that each tile visits.

A plan stores the tensors under flat names (`span_start`, `start`); here span and unit lists share one
interface, and all tensors of a kind are present together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from .options import Fields, laid_out
from .ragged import begins, expand


class Listed(NamedTuple):
    """Entries of lists, flat: index of the list in [B,H,R], place in the list, pool value, whether full."""

    cell: Tensor
    place: Tensor
    entry: Tensor
    full: Tensor


class Bits(NamedTuple):
    """Words of partial units [Nb, tile, ceil(unit/32)], and the first row of words of each list [B,H,R]."""

    words: Tensor
    start: Tensor


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of every tile [B,H,R]: slots `start` to `start + count - 1` of a pool.

    The first `full` entries need no element test. If `room` > 0, lists have that fixed capacity: list n owns
    the slots [n * room, (n + 1) * room), used or not.
    """

    NAMES: ClassVar[dict[str, str]]
    """Maps each field to its name in a plan."""

    start: Tensor
    full: Tensor
    count: Tensor
    pool: Tensor
    room: int

    def laid_out(self, batch: int, heads: int) -> Self:
        """Expand the tables to [batch, heads, R]; the pool stays shared, so the result has no `room`."""
        tables = {n: laid_out(getattr(self, n), batch, heads) for n in ("start", "full", "count")}
        return dataclasses.replace(self, **tables, room=0)

    def tile(self, r: int) -> Self:
        """The lists of one tile, [B,H]."""
        tables = {n: getattr(self, n)[..., r] for n in ("start", "full", "count")}
        return dataclasses.replace(self, **tables)

    def listed(self) -> Listed:
        """Flatten every entry; reads values, so it synchronises."""
        start, full, count = (x.reshape(-1).long() for x in (self.start, self.full, self.count))
        cell, place = expand(count)
        return Listed(cell, place, self.pool[start[cell] + place].long(), place < full[cell])

    def rows(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Key rows `[lo, hi)` of pool values `entry`."""
        raise NotImplementedError

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key rows lo and hi of each entry, whether full, its place: [..., m], padded with empty ranges."""
        slot = torch.arange(int(self.count.max()) if self.count.numel() else 0, device=self.count.device)
        live = slot < self.count[..., None]
        at = torch.where(live, self.start[..., None] + slot, 0)
        if len(self.pool):
            lo, hi = (torch.where(live, x, 0) for x in self.rows(self.pool[at].long()))
        else:
            lo = hi = torch.zeros_like(at)
        return lo, hi, live & (slot < self.full[..., None]), slot.expand_as(lo)

    def fields(self) -> Fields:
        """Return the lists as fields of a plan."""
        made = {name: getattr(self, own) for own, name in self.NAMES.items()}
        return {n: x.contiguous() if isinstance(x, Tensor) else x for n, x in made.items()}

    @classmethod
    def arranged(
        cls, cell: Tensor, full: Tensor, entry: Tensor, shape: tuple[int, int, int]
    ) -> tuple[Fields, Tensor]:
        """Build the fields of compact lists `shape` [B,H,R] from entries, full first; and the permutation."""
        lists = shape[0] * shape[1] * shape[2]
        order = torch.argsort(cell * 2 + (~full).long(), stable=True)
        count = torch.bincount(cell, minlength=lists)[:lists]
        sure = torch.bincount(cell[full], minlength=lists)[:lists]
        values = {
            "start": begins(count).view(shape),
            "full": sure.int().view(shape),
            "count": count.int().view(shape),
            "pool": entry[order].int(),
        }
        return {cls.NAMES[own]: x for own, x in values.items()}, order


@dataclass(frozen=True, eq=False)
class Spans(Lists):
    """Entries are ranges of key rows: pool [Ns, 2]."""

    NAMES = {
        "start": "span_start", "full": "span_full", "count": "span_count", "pool": "spans",
        "room": "span_room",
    }  # fmt: skip

    def rows(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Split the ranges into lo and hi."""
        lo, hi = entry.unbind(-1)
        return lo, hi


@dataclass(frozen=True, eq=False)
class Units(Lists):
    """Entries are unit numbers, a unit being `unit` key rows: pool [Nu]. Partial entries may have bits."""

    NAMES = {"start": "start", "full": "full", "count": "count", "pool": "index", "room": "room"}

    unit: int
    k_rows: int
    bits: Bits | None

    def laid_out(self, batch: int, heads: int) -> Self:
        """`Lists.laid_out`, including the bits."""
        own = super().laid_out(batch, heads)
        if self.bits is None:
            return own
        start = laid_out(self.bits.start, batch, heads)
        return dataclasses.replace(own, bits=self.bits._replace(start=start))

    def tile(self, r: int) -> Self:
        """`Lists.tile`, including the bits."""
        own = super().tile(r)
        if self.bits is None:
            return own
        return dataclasses.replace(own, bits=self.bits._replace(start=self.bits.start[..., r]))

    def rows(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Key rows of units; the last unit is cut at the end of the keys."""
        return entry * self.unit, ((entry + 1) * self.unit).clamp(max=self.k_rows)

    def bit_rows(self, listed: Listed) -> Tensor:
        """Row of `bits.words` of each entry, -1 for full entries and lists without bits."""
        if self.bits is None:
            return torch.full_like(listed.cell, -1)
        first, full = (x.reshape(-1)[listed.cell] for x in (self.bits.start, self.full))
        return torch.where(listed.full, -1, first + listed.place - full)

    def fields(self) -> Fields:
        """`Lists.fields`, including the bits."""
        words, start = self.bits or (None, None)
        return super().fields() | {"bits": words, "bits_start": None if start is None else start.contiguous()}
