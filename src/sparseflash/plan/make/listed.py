"""Constructors from what a method has already listed: blocks, keys, ranges.

On the host lists are compact. On accelerators and inside compiled functions their shapes are static, so that
no value has to be looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PlanError, require
from ..options import (
    INTEGERS,
    TILE,
    UNIT,
    Fields,
    check_options,
    fit,
    host,
    is_count,
    is_length,
    normal_offset,
    shape_of,
)
from ..ragged import begins
from .native import builders
from .spans import pack_spans

Candidates = Callable[[Tensor], tuple[Tensor, Tensor]]
Kinds = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNK = 1 << 20
"""Candidates that are looked at in one go."""


def _sizes(Tq: int, Tk: int, **options: object) -> None:
    check_options(**options)
    require(
        (is_length(Tq) and is_length(Tk), f"Tq={Tq!r}, Tk={Tk!r}: lengths are ints >= 0, of 32 bits"),
        error=PlanError,
    )


def _first_rows(Tq: int, tile: int, tiles: int, device: torch.device) -> Tensor:
    """Position of the first query of each tile."""
    return (torch.arange(tiles, device=device) * tile).clamp(max=max(Tq - 1, 0))


@dataclass(frozen=True)
class _Grid:
    """Tiles of queries against units of keys."""

    Tq: int
    Tk: int
    tile: int
    unit: int
    causal: bool
    q_offset: int = 0

    def kinds(self, unit_id: Tensor, listed: Tensor, r: Tensor) -> Tensor:
        """0 full, 1 partial, 2 not visited: units [..., n] of the tiles r [...]."""
        last = (unit_id + 1) * self.unit - 1
        whole = last < self.Tk
        gone = ~listed
        if self.causal:
            first = (r * self.tile).clamp(max=max(self.Tq - 1, 0))[..., None]
            newest = (first + self.tile - 1).clamp(max=self.Tq - 1) + self.q_offset
            whole = whole & (last <= first + self.q_offset)
            gone = gone | (unit_id * self.unit > newest)
        return torch.where(gone, 2, torch.where(whole, 0, 1))

    def lists(
        self, given: Tensor, candidates: Candidates, capacity: int | None, *, unique: bool = True
    ) -> Fields:
        """Unit lists of what is given for each tile, by whoever makes them fastest."""
        able = capacity is None and isinstance(self.q_offset, int)
        native = builders(given.numel(), given) if able else None
        if native is None:
            return unit_lists(given, candidates, self.kinds, capacity)
        return native.list_units(given, **dataclasses.asdict(self), unique=unique)


def unit_lists(given: Tensor, candidates: Candidates, kinds: Kinds, capacity: int | None) -> Fields:
    """Unit lists from `given` [B,H,R,n], full units first: compact on the host, else of a static width."""
    if capacity is None and host(given):
        return _compact(given, candidates, kinds)
    *lead, width = given.shape
    r = torch.arange(lead[2], device=given.device).expand(lead)
    unit_id, listed = candidates(given)
    kind = kinds(unit_id, listed, r)
    order = torch.argsort(kind, dim=-1, stable=True)
    kind, unit_id = kind.gather(-1, order), unit_id.gather(-1, order)
    count, full = (kind < 2).sum(-1), (kind == 0).sum(-1)
    if capacity is not None and capacity < width:
        width = capacity
    start = torch.arange(count.numel(), device=count.device) * width
    return {
        "start": start.view(count.shape),
        "full": full.clamp(max=width).int(),
        "count": count.clamp(max=width).int(),
        "index": torch.where(kind < 2, unit_id, 0)[..., :width].flatten().int(),
        "overflow": (count > width).any().int(),
        "room": width,
    }


def _compact(given: Tensor, candidates: Candidates, kinds: Kinds) -> Fields:
    """The lists behind one another, made so many at a time that they outweigh whatever making them takes."""
    *lead, n = given.shape
    total, R = math.prod(lead), lead[2]
    flat = given.reshape(total, n)
    count, full = torch.zeros(2, total, dtype=torch.int32, device=flat.device)
    # pages that stay untouched cost nothing
    index = torch.empty(flat.numel(), dtype=torch.int32, device=flat.device)
    used, step = 0, max(1, CHUNK // max(n, 1))
    for at in range(0, total if n else 0, step):
        part = flat[at : at + step]
        unit_id, listed = candidates(part)
        kind = kinds(unit_id, listed, torch.arange(at, at + len(part), device=part.device) % R)
        visited, sure = kind < 2, kind == 0
        own, first = visited.sum(-1, dtype=torch.int32), sure.sum(-1, dtype=torch.int32)
        count[at : at + step], full[at : at + step] = own, first
        piece = unit_id[visited].int()
        if bool(((first > 0) & (first < own)).any()):  # full ones first
            place = torch.where(sure, sure.cumsum(-1), first[:, None] + (kind == 1).cumsum(-1)) - 1
            place = place + begins(own)[:, None]
            piece = torch.empty_like(piece).scatter_(0, place[visited], piece)
        index[used : used + len(piece)] = piece
        used += len(piece)
    spare = len(index) - used
    small = len(index) < CHUNK or spare > len(index) // 4
    index = index[:used].clone() if spare and small else index[:used]
    start = begins(count).view(lead)
    return {"start": start, "full": full.view(lead), "count": count.view(lead), "index": index}


def _check_capacity(capacity: int | None) -> None:
    require(
        (
            capacity is None or is_count(capacity, 1),
            f"capacity={capacity!r}: expected a positive int, or None",
        ),
        error=PlanError,
    )


def from_blocks(
    keep_blocks: Tensor,
    *,
    Tq: int,
    Tk: int,
    tile: int = TILE,
    unit: int = UNIT,
    causal: bool = False,
    capacity: int | None = None,
) -> Fields:
    """Fields of `Plan.from_blocks`."""
    _sizes(Tq, Tk, tile=tile, unit=unit, causal=causal)
    _check_capacity(capacity)
    R, C = -(-Tq // tile), -(-Tk // unit)
    expected = f"bool [B|1, H|1, {R} tiles of {tile}, {C} units of {unit}]"
    require(
        (
            isinstance(keep_blocks, Tensor)
            and keep_blocks.dim() == 4
            and tuple(keep_blocks.shape[2:]) == (R, C)
            and keep_blocks.shape[1] > 0,
            f"keep_blocks: {shape_of(keep_blocks)}; expected {expected}",
        ),
        error=PlanError,
    )
    require(
        (
            keep_blocks.dtype == torch.bool,
            f"keep_blocks has dtype {keep_blocks.dtype}: expected bool, True = attends",
        ),
        error=PlanError,
    )
    grid, units = _Grid(Tq, Tk, tile, unit, causal), torch.arange(C, device=keep_blocks.device)
    fields = grid.lists(keep_blocks, lambda x: (units.expand(x.shape), x), capacity)
    return {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": causal, **fields}


def from_keys(
    index: Tensor,
    *,
    Tq: int,
    Tk: int,
    tile: int = 1,
    unit: int = 1,
    causal: bool = False,
    q_offset: int = 0,
    unique: bool = False,
    capacity: int | None = None,
) -> Fields:
    """Fields of `Plan.from_keys`."""
    _sizes(Tq, Tk, tile=tile, unit=unit, causal=causal, unique=unique)
    _check_capacity(capacity)
    R, C = -(-Tq // tile), -(-Tk // unit)
    require(
        (
            isinstance(index, Tensor) and index.dim() == 4 and index.shape[2] == R and index.shape[1] > 0,
            f"index: {shape_of(index)}; expected integers [B|1, H|1, {R} tiles of {tile}, n], -1 = none",
        ),
        error=PlanError,
    )
    require(
        (index.dtype in INTEGERS, f"index has dtype {index.dtype}: expected integers; try index.int()"),
        error=PlanError,
    )
    seen = host(index)
    index = fit(index, "index holds", -1, C - 1 if seen else C, "units are 0..{most}, -1 = none")
    normal_offset(q_offset)

    def candidates(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.long() if seen else torch.where(x < C, x.long(), -1)
        if unique or x.shape[-1] < 2:
            return x, x >= 0
        x = x.sort(-1).values  # a key named twice is one key
        fresh = torch.nn.functional.pad(x[..., 1:] != x[..., :-1], (1, 0), value=True)
        return x, (x >= 0) & fresh

    grid = _Grid(Tq, Tk, tile, unit, causal, q_offset)
    fields = grid.lists(index, candidates, capacity, unique=unique)
    own = {"tile": tile, "unit": unit, "causal": causal, "q_offset": q_offset}
    return {"Tq": Tq, "Tk": Tk, **own, **fields}


def from_spans(
    spans: Tensor, *, Tq: int, Tk: int, tile: int = TILE, unit: int = UNIT, causal: bool = False
) -> Fields:
    """Fields of `Plan.from_spans`."""
    _sizes(Tq, Tk, tile=tile, unit=unit, causal=causal)
    R = -(-Tq // tile)
    require(
        (
            isinstance(spans, Tensor)
            and spans.dim() == 5
            and spans.shape[2] == R
            and spans.shape[4] == 2
            and spans.shape[1] > 0,
            f"spans: {shape_of(spans)}; expected integers [B|1, H|1, {R} tiles of {tile}, m, 2]",
        ),
        error=PlanError,
    )
    require(
        (spans.dtype in INTEGERS, f"spans has dtype {spans.dtype}: expected integers; try spans.int()"),
        error=PlanError,
    )
    lo, hi = (spans if host(spans) else fit(spans, "spans hold", 0, Tk)).long().unbind(-1)
    if host(spans) and spans.numel():
        bad = (lo < 0) | (hi > Tk) | (hi < lo)
        require(
            (
                not bool(bad.any()),
                f"spans hold {lo.min()}..{hi.max()}: expected [lo, hi) with 0 <= lo <= hi <= {Tk} keys",
            ),
            error=PlanError,
        )
        begin, order = torch.where(hi > lo, lo, Tk + 1).sort(-1)
        end = hi.gather(-1, order)
        overlap = (begin[..., 1:] < end[..., :-1]) & (begin[..., 1:] <= Tk) & (begin[..., :-1] <= Tk)
        require(
            (not bool(overlap.any()), "spans: the ranges of a tile must not overlap; join them"),
            error=PlanError,
        )
    los, his, full = list(lo.unbind(-1)), list(hi.unbind(-1)), [True] * lo.shape[-1]
    if causal:  # keys up to the first row are seen by all, keys after the last by none
        first = _first_rows(Tq, tile, R, spans.device) + 1
        last = (first - 1 + tile).clamp(max=Tq)
        middle = [torch.minimum(torch.maximum(a, first), b) for a, b in zip(los, his, strict=True)]
        ends = [torch.maximum(torch.minimum(b, last), m) for b, m in zip(his, middle, strict=True)]
        los, his, full = los + middle, middle + ends, full + [False] * len(full)
    if not los:
        los = his = [torch.zeros(spans.shape[:3], dtype=torch.int64, device=spans.device)]
        full = [True]
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        **pack_spans(los, his, full, moving=False),
    }
