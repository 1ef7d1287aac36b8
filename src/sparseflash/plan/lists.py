"""The lists of a plan as values: what each tile visits, as spans of key rows or as numbers of units.

A plan keeps its tensors under flat names (`span_start`, `start`); here both kinds have one shape, and what is
there is there as a whole.
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
    """All entries of some lists, flat: the list (of [B,H,R]), the place in it, what stands there, if full."""

    cell: Tensor
    place: Tensor
    entry: Tensor
    full: Tensor


class Bits(NamedTuple):
    """Words of partial units [Nb, tile, ceil(unit/32)], and where those of each list begin [B,H,R]."""

    words: Tensor
    start: Tensor


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of every tile [B,H,R]: places `start` to `start + count - 1` of a pool.

    The first `full` entries need no test. With a `room`, list n owns the places n * room to
    (n + 1) * room - 1, used or not.
    """

    NAMES: ClassVar[dict[str, str]]
    """Of each field, the name that a plan has for it."""

    start: Tensor
    full: Tensor
    count: Tensor
    pool: Tensor
    room: int

    def laid_out(self, batch: int, heads: int) -> Self:
        """Lists of their own for every batch slot and head, without memory of their own."""
        tables = {n: laid_out(getattr(self, n), batch, heads) for n in ("start", "full", "count")}
        return dataclasses.replace(self, **tables, room=0)

    def tile(self, r: int) -> Self:
        """The lists of one tile, [B,H]."""
        tables = {n: getattr(self, n)[..., r] for n in ("start", "full", "count")}
        return dataclasses.replace(self, **tables)

    def listed(self) -> Listed:
        """Every entry; looks at values."""
        start, full, count = (x.reshape(-1).long() for x in (self.start, self.full, self.count))
        cell, place = expand(count)
        return Listed(cell, place, self.pool[start[cell] + place].long(), place < full[cell])

    def rows(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Key rows `[lo, hi)` of some entries."""
        raise NotImplementedError

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key rows lo and hi of each entry, whether full, and its place: [..., m], empty ones behind."""
        slot = torch.arange(int(self.count.max()) if self.count.numel() else 0, device=self.count.device)
        live = slot < self.count[..., None]
        at = torch.where(live, self.start[..., None] + slot, 0)
        if len(self.pool):
            lo, hi = (torch.where(live, x, 0) for x in self.rows(self.pool[at].long()))
        else:
            lo = hi = torch.zeros_like(at)
        return lo, hi, live & (slot < self.full[..., None]), slot.expand_as(lo)

    def fields(self) -> Fields:
        """The lists as fields of a plan."""
        made = {name: getattr(self, own) for own, name in self.NAMES.items()}
        return {n: x.contiguous() if isinstance(x, Tensor) else x for n, x in made.items()}

    @classmethod
    def arranged(
        cls, cell: Tensor, full: Tensor, entry: Tensor, shape: tuple[int, int, int]
    ) -> tuple[Fields, Tensor]:
        """Fields of a plan whose lists [B,H,R] hold these entries, full ones first; and their new order."""
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
        """The ranges themselves."""
        lo, hi = entry.unbind(-1)
        return lo, hi


@dataclass(frozen=True, eq=False)
class Units(Lists):
    """Entries are numbers of units, `unit` key rows each: pool [Nu]. What is not full may have bits."""

    NAMES = {"start": "start", "full": "full", "count": "count", "pool": "index", "room": "room"}

    unit: int
    k_rows: int
    bits: Bits | None

    def laid_out(self, batch: int, heads: int) -> Self:
        """`Lists.laid_out`, of the bits too."""
        own = super().laid_out(batch, heads)
        if self.bits is None:
            return own
        start = laid_out(self.bits.start, batch, heads)
        return dataclasses.replace(own, bits=self.bits._replace(start=start))

    def tile(self, r: int) -> Self:
        """`Lists.tile`, of the bits too."""
        own = super().tile(r)
        if self.bits is None:
            return own
        return dataclasses.replace(own, bits=self.bits._replace(start=self.bits.start[..., r]))

    def rows(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of units; the last one ends with the keys."""
        return entry * self.unit, ((entry + 1) * self.unit).clamp(max=self.k_rows)

    def bit_rows(self, listed: Listed) -> Tensor:
        """Which of the bits each entry has, -1 for those without."""
        if self.bits is None:
            return torch.full_like(listed.cell, -1)
        first, full = (x.reshape(-1)[listed.cell] for x in (self.bits.start, self.full))
        return torch.where(listed.full, -1, first + listed.place - full)

    def fields(self) -> Fields:
        """`Lists.fields`, with the bits."""
        words, start = self.bits or (None, None)
        return super().fields() | {"bits": words, "bits_start": None if start is None else start.contiguous()}
