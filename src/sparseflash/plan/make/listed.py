"""Constructors from lists that a method has made: blocks, keys, ranges.

The extreme positions of a tile and of a unit or range decide whether the tile sees all, part or none of it,
so any row orders and offsets work. On the host lists are compact. On accelerators and inside compiled
functions their shapes are static, so that no value has to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import (
    INTEGERS,
    Fields,
    check_options,
    common_heads,
    fit,
    host,
    is_count,
    is_length,
    joint,
    laid_out,
    normal_offset,
    shape_of,
)
from ..ragged import begins
from .extremes import Extremes, RangeExtremes, as_order, extremes, rows_of
from .native import builders
from .spans import pack_spans

Candidates = Callable[[Tensor], tuple[Tensor, Tensor]]
Kinds = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNK = 1 << 20
"""Candidates that are classified in one chunk."""
WHOLE, PART, GONE = 0, 1, 2
"""Kinds of a unit or range for a tile: fully visible, in part, not at all."""


@dataclass(frozen=True)
class Frame:
    """The grid of a plan, tiles of query rows x units of key rows, with its row orders and causality."""

    Tq: int
    Tk: int
    tile: int
    unit: int
    causal: bool
    q_offset: int | Tensor = 0
    q_order: Tensor | None = None
    k_order: Tensor | None = None

    def __post_init__(self) -> None:
        check_options(tile=self.tile, unit=self.unit, causal=self.causal)
        if not (is_length(self.Tq) and is_length(self.Tk)):
            raise PlanError(f"Tq={self.Tq!r}, Tk={self.Tk!r}: lengths are ints >= 0, of 32 bits")
        own: Fields = {"q_offset": normal_offset(self.q_offset)}
        own["q_order"] = as_order(self.q_order, self.Tq, "q_order")
        own["k_order"] = as_order(self.k_order, self.Tk, "k_order")
        vars(self).update(own)

    @property
    def tiles(self) -> int:
        """Number of query tiles."""
        return -(-rows_of(self.Tq, self.q_order) // self.tile)

    @property
    def k_rows(self) -> int:
        """Number of key rows."""
        return rows_of(self.Tk, self.k_order)

    @property
    def columns(self) -> int:
        """Number of key units."""
        return -(-self.k_rows // self.unit)

    def fields(self) -> Fields:
        """Return the plan's fields other than its lists."""
        return vars(self) | {}

    def extent(self, *given: Tensor) -> tuple[int, int]:
        """(batch, heads) that tensors [B|1, H|1, ...], the orders and the offset broadcast to."""
        laid = [x for x in (*given, self.q_order, self.k_order) if x is not None]
        sizes = [x.shape[0] for x in laid]
        if self.causal and isinstance(self.q_offset, Tensor) and self.q_offset.dim():
            sizes.append(self.q_offset.shape[0])
        batch = joint(sizes)
        if batch is None:
            raise PlanError(
                f"lists, orders and q_offset have batch sizes {sorted(set(sizes))}: expected one, or 1"
            )
        return batch, common_heads(*laid)

    def of_tiles(self, device: torch.device) -> Extremes:
        """Extreme query positions of each tile."""
        return extremes(self.Tq, self.tile, order=self.q_order, offset=self.q_offset, device=device)

    @property
    def plain(self) -> bool:
        """Whether rows are tokens with one int offset, so that extreme positions are plain arithmetic."""
        return self.q_order is None and self.k_order is None and isinstance(self.q_offset, int)

    def kinds(self, batch: int, heads: int, device: torch.device) -> Kinds:
        """Return a function that classifies units [..., n] (`listed` or not) of lists `cell` [...]."""
        if self.plain:
            return self._plain_kinds
        q = self.of_tiles(device).laid_out(batch, heads)
        k = extremes(self.Tk, self.unit, order=self.k_order, device=device)
        R, C = self.tiles, self.columns
        first, last = q.low.reshape(-1), q.high.reshape(-1)
        shared = self.k_order is None
        low, high, whole = (
            x.flatten() if shared else laid_out(x, batch, heads).reshape(-1) for x in vars(k).values()
        )

        def kind(unit: Tensor, listed: Tensor, cell: Tensor) -> Tensor:
            cell = cell[..., None]
            at = unit.clamp(0, C - 1) + (0 if shared else cell // R * C)
            gone, sure = ~listed | (high[at] < 0) | (last[cell] < first[cell]), whole[at]
            if self.causal:
                gone, sure = gone | (low[at] > last[cell]), sure & (high[at] <= first[cell])
            return torch.where(gone, GONE, torch.where(sure, WHOLE, PART))

        return kind

    def _plain_kinds(self, unit: Tensor, listed: Tensor, cell: Tensor) -> Tensor:
        assert isinstance(self.q_offset, int)
        last = (unit + 1) * self.unit - 1
        whole, gone = last < self.Tk, ~listed
        if self.causal:
            first = (cell % self.tiles * self.tile)[..., None] + self.q_offset
            newest = (first + (self.tile - 1)).clamp(max=self.Tq - 1 + self.q_offset)
            whole = whole & (last <= first)
            gone = gone | (unit * self.unit > newest)
        return torch.where(gone, GONE, torch.where(whole, WHOLE, PART))

    def lists(
        self, given: Tensor, candidates: Candidates, capacity: int | None, *, unique: bool = True
    ) -> Fields:
        """Build unit lists from the `given` blocks or keys of each tile, with native builders if offered."""
        if self.plain and capacity is None and (native := builders(given.numel(), given)):
            names = ("Tq", "Tk", "tile", "unit", "causal", "q_offset")
            return native.list_units(given, **{n: getattr(self, n) for n in names}, unique=unique)
        given = laid_out(given, *self.extent(given))
        if not (given.numel() and self.columns):
            given = given[..., :0]
        kinds = self.kinds(given.shape[0], given.shape[1], given.device)
        return unit_lists(given, candidates, kinds, capacity)


def ordered_lists(given: Tensor, frame: Frame) -> Fields:
    """Use lists of ascending unit numbers [B,H,R,n] unchanged: full units are a prefix, partial ones follow.

    Each list has capacity n, and no value is read, so this costs a few small operations. Example, causal,
    unit 4, Tk = 16, one query at position 5: list 0 1 2 -1 has count 2 (unit 2 is future), full 1.
    """
    n, unit, offset = given.shape[-1], frame.unit, frame.q_offset
    assert isinstance(offset, int)
    begun, whole = -(-frame.Tk // unit), frame.Tk // unit  # number of units with any key, of complete units
    count, full = given >= 0, given < whole
    if frame.causal and frame.tiles == 1:
        count = count & (given < min(begun, (offset + frame.Tq - 1) // unit + 1))
        full = given < min(whole, (offset + 1) // unit)
    elif frame.causal:
        first = torch.arange(offset, offset + frame.Tq, frame.tile, device=given.device)[:, None]
        last = (first + (frame.tile - 1)).clamp(max=offset + frame.Tq - 1)
        count = count & (given <= last // unit)
        full = full & (given < (first + 1) // unit)
    start = torch.arange(0, given.numel(), n, device=given.device).view(given.shape[:3])
    listed = count.sum(-1, dtype=torch.int32), (full & count).sum(-1, dtype=torch.int32)
    return {"start": start, "count": listed[0], "full": listed[1], "room": n} | {
        "index": given.clamp(min=0).flatten().int()
    }


def unit_lists(given: Tensor, candidates: Candidates, kinds: Kinds, capacity: int | None) -> Fields:
    """Build unit lists from `given` [B,H,R,n], full units first: compact on the host, else static width."""
    if capacity is None and host(given):
        return _compact(given, candidates, kinds)
    *lead, width = given.shape
    cell = torch.arange(math.prod(lead), device=given.device).view(lead)
    unit_id, listed = candidates(given)
    kind = kinds(unit_id, listed, cell)
    order = torch.argsort(kind, dim=-1, stable=True)
    kind, unit_id = kind.gather(-1, order), unit_id.gather(-1, order)
    count, full = (kind < GONE).sum(-1), (kind == WHOLE).sum(-1)
    if capacity is not None and capacity < width:
        width = capacity
    start = torch.arange(count.numel(), device=count.device) * width
    return {
        "start": start.view(count.shape),
        "full": full.clamp(max=width).int(),
        "count": count.clamp(max=width).int(),
        "index": torch.where(kind < GONE, unit_id, 0)[..., :width].flatten().int(),
        "overflow": (count > width).any().int(),
        "room": width,
    }


def _compact(given: Tensor, candidates: Candidates, kinds: Kinds) -> Fields:
    """Build compact lists in chunks of tiles, so that temporaries stay small beside the lists."""
    *lead, n = given.shape
    total = math.prod(lead)
    flat = given.reshape(total, n)
    count, full = torch.zeros(2, total, dtype=torch.int32, device=flat.device)
    # allocated for the worst case: memory pages that are never written cost nothing
    index = torch.empty(flat.numel(), dtype=torch.int32, device=flat.device)
    used, step = 0, max(1, CHUNK // max(n, 1))
    for at in range(0, total if n else 0, step):
        part = flat[at : at + step]
        unit_id, listed = candidates(part)
        kind = kinds(unit_id, listed, torch.arange(at, at + len(part), device=part.device))
        visited, sure = kind < GONE, kind == WHOLE
        own, first = visited.sum(-1, dtype=torch.int32), sure.sum(-1, dtype=torch.int32)
        count[at : at + step], full[at : at + step] = own, first
        piece = unit_id[visited].int()
        if bool(((first > 0) & (first < own)).any()):  # move full units first
            place = torch.where(sure, sure.cumsum(-1), first[:, None] + (kind == PART).cumsum(-1)) - 1
            place = place + begins(own)[:, None]
            piece = torch.empty_like(piece).scatter_(0, place[visited], piece)
        index[used : used + len(piece)] = piece
        used += len(piece)
    spare = len(index) - used
    small = len(index) < CHUNK or spare > len(index) // 4
    index = index[:used].clone() if spare and small else index[:used]
    start = begins(count).view(lead)
    return {"start": start, "full": full.view(lead), "count": count.view(lead), "index": index}


def check_capacity(capacity: int | None) -> None:
    """Check that a capacity (most entries of a tile) is a positive int or None."""
    require(
        (
            capacity is None or is_count(capacity, 1),
            lambda: f"capacity={capacity!r}: expected a positive int, or None",
        ),
        error=PlanError,
    )


def from_blocks(keep_blocks: Tensor, frame: Frame, *, capacity: int | None = None) -> Fields:
    """Fields of `Plan.from_blocks`."""
    check_capacity(capacity)
    R, C = frame.tiles, frame.columns
    require(
        (
            isinstance(keep_blocks, Tensor)
            and keep_blocks.dim() == 4
            and tuple(keep_blocks.shape[2:]) == (R, C)
            and keep_blocks.shape[1] > 0,
            lambda: (
                f"keep_blocks: {shape_of(keep_blocks)}; expected bool [B|1, H|1, {R} tiles of {frame.tile}, "
                f"{C} units of {frame.unit}]"
            ),
        ),
        error=PlanError,
    )
    require(
        (
            keep_blocks.dtype == torch.bool,
            lambda: f"keep_blocks has dtype {keep_blocks.dtype}: expected bool, True = attends",
        ),
        error=PlanError,
    )
    units = torch.arange(C, device=keep_blocks.device)
    lists = frame.lists(keep_blocks, lambda x: (units[: x.shape[-1]].expand(x.shape), x), capacity)
    return frame.fields() | lists


def from_keys(
    index: Tensor,
    frame: Frame,
    *,
    unique: bool = False,
    ascending: bool = False,
    capacity: int | None = None,
) -> Fields:
    """Fields of `Plan.from_keys`."""
    check_options(unique=unique, ascending=ascending)
    check_capacity(capacity)
    R, C = frame.tiles, frame.columns
    require(
        (
            isinstance(index, Tensor) and index.dim() == 4 and index.shape[2] == R and index.shape[1] > 0,
            lambda: (
                f"index: {shape_of(index)}; expected integers [B|1, H|1, {R} tiles of {frame.tile}, n], "
                "-1 = none"
            ),
        ),
        error=PlanError,
    )
    require(
        (
            index.dtype in INTEGERS,
            lambda: f"index has dtype {index.dtype}: expected integers; try index.int()",
        ),
        error=PlanError,
    )
    seen = host(index)
    index = fit(index, "index holds", -1, C - 1 if seen else C, "units are 0..{most}, -1 = none")

    if ascending and frame.plain and capacity is None and index.shape[-1]:
        return frame.fields() | ordered_lists(laid_out(index, *frame.extent(index)), frame)

    def candidates(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.long() if seen else torch.where(x < C, x.long(), -1)
        if unique or ascending or x.shape[-1] < 2:
            return x, x >= 0
        x = x.sort(-1).values  # sorted, so that duplicates can be dropped
        fresh = torch.nn.functional.pad(x[..., 1:] != x[..., :-1], (1, 0), value=True)
        return x, (x >= 0) & fresh

    return frame.fields() | frame.lists(index, candidates, capacity, unique=unique or ascending)


def from_spans(spans: Tensor, frame: Frame, *, capacity: int | None = None) -> Fields:
    """Fields of `Plan.from_spans`."""
    check_capacity(capacity)
    R, rows = frame.tiles, frame.k_rows
    require(
        (
            isinstance(spans, Tensor)
            and spans.dim() == 5
            and spans.shape[2] == R
            and spans.shape[4] == 2
            and spans.shape[1] > 0,
            lambda: (
                f"spans: {shape_of(spans)}; expected integers [B|1, H|1, {R} tiles of {frame.tile}, m, 2]"
            ),
        ),
        error=PlanError,
    )
    require(
        (
            spans.dtype in INTEGERS,
            lambda: f"spans has dtype {spans.dtype}: expected integers; try spans.int()",
        ),
        error=PlanError,
    )
    lo, hi = (spans if host(spans) else fit(spans, "spans hold", 0, rows)).long().unbind(-1)
    if host(spans) and spans.numel():
        bad = (lo < 0) | (hi > rows) | (hi < lo)
        require(
            (
                not bool(bad.any()),
                lambda: (
                    f"spans hold {lo.min()}..{hi.max()}: expected [lo, hi) with 0 <= lo <= hi <= {rows} keys"
                ),
            ),
            error=PlanError,
        )
        begin, order = torch.where(hi > lo, lo, rows + 1).sort(-1)
        end = hi.gather(-1, order)
        overlap = (begin[..., 1:] < end[..., :-1]) & (begin[..., 1:] <= rows) & (begin[..., :-1] <= rows)
        require(
            (not bool(overlap.any()), "spans: the ranges of a tile must not overlap; join them"),
            error=PlanError,
        )
    extent = frame.extent(lo)
    lo, hi = laid_out(lo, *extent), laid_out(hi, *extent)
    return frame.fields() | span_lists(frame, lo, hi, capacity)


def span_lists(frame: Frame, lo: Tensor, hi: Tensor, capacity: int | None) -> Fields:
    """Build span lists from disjoint ranges [B,H,R,m], cut or dropped by the frame's causality."""
    if not lo.shape[-1]:
        none = torch.zeros(lo.shape[:3], dtype=torch.int64, device=lo.device)
        return pack_spans([none], [none], [True], moving=False)
    q = frame.of_tiles(lo.device)
    q = q.laid_out(*lo.shape[:2])
    first, last, live = q.low[..., None], q.high[..., None], (q.high >= q.low)[..., None]
    hi = torch.where(live, hi, lo)
    if frame.k_order is not None:
        found = RangeExtremes(frame.k_order)(lo.flatten(2), hi.flatten(2))
        low, high, sure = (x.view(lo.shape) for x in vars(found).values())
        gone = high < low
        if frame.causal:
            gone, sure = gone | (low > last), sure & (high <= first)
        cut = torch.where(gone, lo, torch.where(sure, hi, lo)), torch.where(gone, lo, hi)
    elif frame.causal:  # all rows see keys up to the first row's position, none those after the last's
        middle = torch.minimum(torch.maximum(lo, first + 1), hi)
        cut = middle, torch.maximum(torch.minimum(hi, last + 1), middle)
    else:
        return pack_spans(
            list(lo.unbind(-1)), list(hi.unbind(-1)), [True] * lo.shape[-1], moving=False, most=capacity
        )
    middle, end = cut
    return pack_spans(
        [*lo.unbind(-1), *middle.unbind(-1)],
        [*middle.unbind(-1), *end.unbind(-1)],
        [True] * lo.shape[-1] + [False] * lo.shape[-1],
        moving=False,
        most=capacity,
    )
