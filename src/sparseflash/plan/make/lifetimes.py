"""Keys that are visible from one query position up to another: caches that evict, trees, sliding states.

A tile lists only keys that are alive at one of its query positions. Neighbouring keys that are alive together
form a range; scattered ones are gathered. Birth and expiry are rules of the plan (`k_pos` and `k_end`), so no
bits are needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...common.errors import PlanError, require
from ..options import INTEGERS, TILE, Fields, host, is_length, laid_out, narrow, shape_of
from ..ragged import begins, expand
from .listed import CHUNK, GONE, WHOLE, Frame, check_capacity, unit_lists

LONG = 128
"""Neighbouring keys alive together that form a range; shorter runs are faster as gathered keys."""


def _life(x: object, name: str) -> Tensor:
    if not (isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] > 0):
        raise PlanError(f"{name}: {shape_of(x)}; expected integers [B|1, H|1, Tk]")
    require(
        (x.dtype in INTEGERS, lambda: f"{name} has dtype {x.dtype}: expected integers; try {name}.int()"),
        error=PlanError,
    )
    return narrow(x)  # clamped: a large number means never


def from_lifetimes(
    begin: Tensor | None,
    end: Tensor,
    *,
    Tq: int | None,
    q_offset: int | Tensor = 0,
    tile: int = TILE,
    capacity: int | None = None,
) -> Fields:
    """Fields of `Plan.from_lifetimes`; `begin=None` means every key's own position."""
    end = _life(end, "end" if begin is not None else "k_end")
    Tk = end.shape[-1]
    own = torch.arange(Tk, dtype=torch.int32, device=end.device).view(1, 1, -1)
    first = own if begin is None else _life(begin, "begin")
    require(
        (
            first.shape[-1] == Tk,
            lambda: f"begin {list(first.shape)} and end {list(end.shape)}: expected one Tk",
        ),
        (first.device == end.device, lambda: f"begin is on {first.device}, end on {end.device}: move them"),
        error=PlanError,
    )
    Tq = Tk if Tq is None else Tq
    require((is_length(Tq), lambda: f"Tq={Tq!r}: expected an int >= 0 of 32 bits"), error=PlanError)
    frame = Frame(Tq, Tk, tile, 1, True, q_offset)
    check_capacity(capacity)
    extent = frame.extent(end, first)
    fields = frame.fields() | {"k_end": end, "k_pos": None if begin is None else first}
    lists = _Lives(frame, *(laid_out(x, *extent) for x in (first, end)))
    return fields | (lists.compact() if capacity is None and host(end) else lists.padded(capacity))


class _Lives:
    """Lifetimes of keys [B,H,Tk] against the position ranges of a frame's tiles."""

    def __init__(self, frame: Frame, begin: Tensor, end: Tensor) -> None:
        self.tiles, self.Tk = frame.tiles, begin.shape[-1]
        self.lead = (*begin.shape[:2], frame.tiles)
        q = frame.of_tiles(begin.device).laid_out(*begin.shape[:2])
        self.first, self.last = (narrow(x.reshape(-1)) for x in (q.low, q.high))
        self.begin, self.end = begin.flatten(0, 1), end.flatten(0, 1)

    def kinds(self, head: Tensor | int, cell: Tensor | slice) -> Tensor:
        """Classify every key for some tiles of a head, WHOLE, PART or GONE: [n, Tk] uint8."""
        begin, end = self.begin[head], self.end[head]
        first, last = self.first[cell, None], self.last[cell, None]
        alive = (begin <= last) & (end > first) & (end > begin)
        whole = (begin <= first) & (end > last)
        return GONE - alive.byte() - whole.byte()

    def padded(self, capacity: int | None) -> Fields:
        """Lists of gathered keys of a static width."""
        key = torch.arange(self.Tk, device=self.begin.device)
        given = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device).expand(*self.lead, self.Tk)

        def kinds(unit: Tensor, listed: Tensor, cell: Tensor) -> Tensor:
            cell = cell.flatten()
            return self.kinds(cell // self.tiles, cell).view(unit.shape)

        return unit_lists(given, lambda x: (key.expand(x.shape), x), kinds, capacity)

    def compact(self) -> Fields:
        """Compact lists: ranges of neighbouring keys alive together, and the other keys as units."""
        device = self.begin.device
        # ranges: cell, whether full, first key, end; single: cell, whether full, key
        none = torch.zeros(0, dtype=torch.int64, device=device)
        ranges: list[tuple[Tensor, ...]] = [(none, none > 0, none, none)]
        single: list[tuple[Tensor, ...]] = [(none, none > 0, none)]
        step = max(1, CHUNK // max(self.Tk, 1))
        heads = range(len(self.begin) if self.Tk else 0)
        for head, tile in ((h, r) for h in heads for r in range(0, self.tiles, step)):
            at = head * self.tiles + tile
            kind = self.kinds(head, slice(at, min(at + step, (head + 1) * self.tiles)))
            new = pad(kind[:, 1:] != kind[:, :-1], (1, 0), value=True)
            start = new.flatten().nonzero().view(-1)
            stop = torch.cat([start[1:], start.new_tensor([kind.numel()])])
            which, size = kind.flatten()[start], stop - start
            alive = which < GONE
            long, short = alive & (size >= LONG), alive & (size < LONG)
            row, lo = start[long] // self.Tk, start[long] % self.Tk
            ranges.append((at + row, which[long] == WHOLE, lo, lo + size[long]))
            owner, place = expand(size[short])
            flat, sure = start[short][owner] + place, (which[short] == WHOLE)[owner]
            single.append((at + flat // self.Tk, sure, flat % self.Tk))
        cell, sure, lo, hi = (torch.cat(x) for x in zip(*ranges, strict=True))
        fields = lists_of(cell, sure, torch.stack([lo, hi], -1), self.lead, "span_", "spans")
        cell, sure, key = (torch.cat(x) for x in zip(*single, strict=True))
        return fields | lists_of(cell, sure, key, self.lead, "", "index")


def lists_of(cell: Tensor, sure: Tensor, pool: Tensor, lead: tuple[int, ...], pre: str, name: str) -> Fields:
    """Build lists from entries sorted by cell (index in [B,H,R]); a list's full entries come first."""
    total = math.prod(lead)
    count, full = torch.bincount(cell, minlength=total), torch.bincount(cell[sure], minlength=total)
    start, rest = begins(count), count - full
    rank = sure.cumsum(0)
    place = torch.where(
        sure,
        rank - 1 - begins(full)[cell],
        full[cell] + torch.arange(len(cell), device=cell.device) - rank - begins(rest)[cell],
    )
    listed = torch.empty(pool.shape, dtype=torch.int32, device=pool.device)
    listed[start[cell] + place] = pool.int()
    return {
        pre + "start": start.view(lead),
        pre + "full": full.int().view(lead),
        pre + "count": count.int().view(lead),
        name: listed,
    }
