"""Exact set algebra on plans: `&`, `-`, `|`, and the same set on another grid (`retile`).

The general case, `refine`: walk the pairs that one plan visits, look each up in the other, and store those
that remain as units; partial units get bits. Work and memory follow the visited area, never Tq x Tk.
Two fast paths need no bits: a plan whose lists add nothing to its rules (a window, say) hands its rules to
the other plan, and ranges in the same row space are intersected if both plans' rules join into one formula.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..common.errors import PlanError, require
from .checks import surely_full
from .entries import Ranges, cells, ranges, real_rows
from .figures import by_position, dense_pairs, visible_pairs
from .lists import Units
from .lookup import Lookup
from .options import Fields, check_options, divisor, host, multiple
from .ragged import begins, expand
from .record import LISTS, Record
from .rules import Rules, same

LIMIT = 2 << 30
"""Most bytes of bits that an operation may build; above it, it raises `PlanError`."""

P = TypeVar("P", bound=Record)
Keep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def widen(plan: P, batch: int, heads: int) -> P:
    """Expand the plan's list tables to `[batch, heads, R]`; the entry pools stay shared."""
    made: Fields = {}
    for lists in plan.lists():
        made |= lists.laid_out(batch, heads).fields()
    return plan._changed(**made)


def _shared_extent(a: Record, b: Record) -> tuple[int, int]:
    (ba, ha), (bb, hb) = a.extent(), b.extent()
    require(
        (
            (a.Tq, a.Tk) == (b.Tq, b.Tk),
            lambda: f"plans of {a.Tq} x {a.Tk} and {b.Tq} x {b.Tk} tokens do not combine",
        ),
        (ba == bb or 1 in (ba, bb), lambda: f"plans of batch size {ba} and {bb} do not combine"),
        (a.device == b.device, lambda: f"plans on {a.device} and {b.device}: move them to one device"),
        error=PlanError,
    )
    return max(ba, bb), multiple(ha, hb)


class _Grid(NamedTuple):
    """The grid of units that a plan is refined to."""

    tile: int
    unit: int
    tiles: int
    """New tiles of a head."""
    columns: int
    """Units of a tile's row."""
    split: int
    """New tiles within an old one, or 1."""
    join: int
    """Old tiles within a new one, or 1: e.g. tile 4 -> 2, split 2, makes tiles 6 and 7 of tile 3, and tile
    2 -> 4, join 2, makes tile 1 of tiles 2 and 3."""

    @property
    def words(self) -> int:
        """Words of 32 bits that a row of a unit takes."""
        return -(-self.unit // 32)


def refine(plan: P, keep: Keep | None, *, tile: int, unit: int, extent: tuple[int, int]) -> P:
    """Return the visible pairs for which `keep(b, h, q, k)` is True, as units of a `tile` x `unit` grid.

    `tile` must divide the plan's tile or be a multiple of it. A slot is one touched (cell, unit), with the
    number `cell * columns + unit`; cells number the new tiles through [B,H,R].
    """
    plan = widen(plan, *extent)
    entries = ranges(plan)
    split, join = max(1, plan.tile // tile), max(1, tile // plan.tile)
    grid = _Grid(tile, unit, -(-plan.q_rows // tile), -(-plan.k_rows // unit), split, join)
    slot = _touched(plan, entries, grid)
    bits, count = _bits_of(plan, entries, keep, slot, grid)

    # the kind of each slot: 0 full, 1 partial, 2 empty (dropped)
    tiles, columns = grid.tiles, grid.columns
    cell, column = slot // columns, slot % columns
    real = _real_rows(plan, tile, tiles)[cell] if len(slot) else slot
    whole = (count == real * unit) & ((column + 1) * unit <= plan.k_rows)
    kind = torch.where(count == 0, 2, torch.where(whole, 0, 1))
    order = torch.argsort((cell * 3 + kind) * columns + column)
    order = order[kind[order] < 2]
    cell, column, kind = cell[order], column[order], kind[order]
    lead = (*extent, tiles)
    total = math.prod(lead)
    per, full = torch.bincount(cell, minlength=total), torch.bincount(cell[kind == 0], minlength=total)
    partial = per - full
    packed = bits[order[kind == 1]]
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()
    return plan._changed(
        tile=tile,
        unit=unit,
        span_start=None,
        span_full=None,
        span_count=None,
        spans=None,
        start=begins(per).view(lead),
        full=full.int().view(lead),
        count=per.int().view(lead),
        index=column.int(),
        bits=packed,
        bits_start=begins(partial).view(lead),
    )


def _touched(plan: Record, entries: Ranges, grid: _Grid) -> Tensor:
    """Ascending slots: the new tiles and the unit of every (entry, unit that the entry overlaps)."""
    first, last = entries.lo // grid.unit, (entries.hi - 1) // grid.unit + 1
    n = last - first
    pick, place = expand(n)
    column = first[pick] + place
    head, old = entries.cell[pick] // plan.tiles, entries.cell[pick] % plan.tiles
    part = torch.arange(grid.split, device=n.device)
    new = (old[:, None] * grid.split + part) // grid.join
    touched = (head[:, None] * grid.tiles + new) * grid.columns + column[:, None]
    slot: Tensor = torch.unique(touched[new < grid.tiles])
    size = len(slot) * grid.tile * grid.words * 8
    require(
        (
            size <= LIMIT,
            lambda: (
                f"the result needs {size / 2**30:.2g} GiB of bits while it is built (limit "
                f"{LIMIT / 2**30:.2g}): "
                "use a tuple of disjoint plans, or larger units, or plans whose rules combine"
            ),
        ),
        error=PlanError,
    )
    return slot


def _bits_of(
    plan: Record, entries: Ranges, keep: Keep | None, slot: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor]:
    """Bits of each slot, int64 [slots, tile, words], and how many are set, [slots].

    `index_add_` ORs the bits, because no pair occurs twice.
    """
    tile, unit, split, words = grid.tile, grid.unit, grid.split, grid.words
    bits = torch.zeros(len(slot) * words, tile, dtype=torch.int64, device=plan.device)
    count = torch.zeros(len(slot), dtype=torch.int64, device=plan.device)
    for c in cells(plan, entries):
        seen = c.keep
        if keep is not None:
            seen = seen & keep(c.batch[:, None], c.head[:, None], c.q_token, c.k_token[:, None])
        cell, row = entries.cell[c.entry], c.k_row
        head, old = cell // plan.tiles, cell % plan.tiles
        lane = row % unit
        for s in range(split):
            new = (old * split + s) // grid.join
            live = new < grid.tiles
            at = torch.searchsorted(slot, (head * grid.tiles + new) * grid.columns + row // unit)
            mine = seen[:, s * tile : (s + 1) * tile] if split > 1 else seen
            count.index_add_(0, at[live], mine[live].sum(1))
            at = at * words + lane // 32
            value = mine[live].long() << (lane[live] % 32)[:, None]
            if grid.join == 1:
                bits.index_add_(0, at[live], value)
            else:
                offset = (old[live] % grid.join) * plan.tile
                place = offset[:, None] + torch.arange(plan.tile, device=at.device)
                flat = (at[live][:, None] * tile + place).reshape(-1)
                bits.view(-1).index_add_(0, flat, value.reshape(-1))
    return bits.view(len(slot), words, tile).transpose(1, 2), count


def _real_rows(plan: Record, tile: int, tiles: int) -> Tensor:
    """Count the rows that hold a real token in each tile of `tile` rows: [B*H*tiles]."""
    batch, heads = plan.extent()
    real = real_rows(plan).flatten(2)
    short = tiles * tile - real.shape[-1]
    real = torch.nn.functional.pad(real, (0, short)) if short > 0 else real[..., : tiles * tile]
    return real.reshape(batch * heads * tiles, tile).sum(-1)


def retile(plan: P, tile: int, unit: int) -> P:
    """Return a plan of the same visible pairs with other tile and unit sizes."""
    check_options(tile=tile, unit=unit)
    if tile == plan.tile and (unit == plan.unit or plan.index is None):
        return plan if unit == plan.unit else plan._changed(unit=unit)
    if plan.index is None and plan.tile % tile == 0:  # each smaller tile reuses the ranges of its old tile
        ratio, tiles = plan.tile // tile, -(-plan.q_rows // tile)
        lists = {
            n: getattr(plan, n).repeat_interleave(ratio, -1)[..., :tiles].contiguous() for n in LISTS[:3]
        }
        return plan._changed(tile=tile, unit=unit, **lists)
    if max(tile, plan.tile) % min(tile, plan.tile):
        plan = retile(plan, divisor(tile, plan.tile), unit)
    return refine(plan, None, tile=tile, unit=unit, extent=plan.extent())


def intersect(a: P, b: P) -> P:
    """Return the pairs visible in both plans, `a & b`."""
    extent = _shared_extent(a, b)
    if _area(b) < _area(a):
        a, b = b, a
    overflow = _overflow(a, b)
    for short in (_join_ranges, _join_units, _hand_rules):
        found = short(a, b, extent)
        if found is not None:
            return found._changed(overflow=overflow)
    a = a._changed(overflow=overflow)
    return refine(a, Lookup(b, extent[1]), tile=a.tile, unit=a.unit, extent=extent)


def subtract(a: P, b: P) -> P:
    """Return the pairs visible in a and not in b, `a - b`."""
    extent = _shared_extent(a, b)
    a = a._changed(overflow=_overflow(a, b))
    if _one_grid(a, b) and a.rules.alike(
        b.rules
    ):  # under equal rules a unit in both lists shows the same pairs: the difference is that of the lists
        mine, theirs = (_units(widen(p, *extent)) for p in (a, b))
        return _of_units(widen(a, *extent), mine.of(~torch.isin(mine.key, theirs.key)), a.rules)
    look = Lookup(b, extent[1])
    return refine(a, lambda *at: ~look(*at), tile=a.tile, unit=a.unit, extent=extent)


def unite(a: P, b: P) -> tuple[P, ...]:
    """Return `a | b` as disjoint plans: one if either plan contains the other, else two."""
    if _area(b) > _area(a):
        a, b = b, a
    rest = subtract(b, a)
    return (a, rest) if rest.index is not None and len(rest.index) else (a,)


def _overflow(a: Record, b: Record) -> Tensor | None:
    """Combine the overflow flags: a combination lacks the entries that either operand has dropped."""
    given = [p.overflow for p in (a, b) if p.overflow is not None]
    return torch.stack(given).amax() if given else None


def _area(plan: Record) -> float:
    entries = ranges(plan)
    batch, heads = plan.extent()
    return float((entries.hi - entries.lo).sum()) * plan.tile / (batch * heads)


def _join_ranges(a: P, b: P, extent: tuple[int, int]) -> P | None:
    """Intersect two plans of ranges with equal row orders and rules that join; None if they are not such."""
    if a.index is not None or b.index is not None or a.spans is None or b.spans is None:
        return None
    if not (same(a.q_order, b.q_order) and same(a.k_order, b.k_order)):
        return None
    if max(a.tile, b.tile) % min(a.tile, b.tile):
        return None
    rules = a.rules.join(b.rules)
    if rules is None:
        return None
    tile = min(a.tile, b.tile)
    a, b = (widen(retile(p, tile, p.unit), *extent) for p in (a, b))
    if a.span_lists is None or b.span_lists is None:
        return None
    (lo_a, hi_a, full_a, _), (lo_b, hi_b, full_b, _) = a.span_lists.padded(), b.span_lists.padded()
    width = lo_a.shape[-1] * lo_b.shape[-1]
    if width > 64:
        return None
    lo = torch.maximum(lo_a[..., :, None], lo_b[..., None, :]).flatten(-2)
    hi = torch.minimum(hi_a[..., :, None], hi_b[..., None, :]).flatten(-2)
    full = (full_a[..., :, None] & full_b[..., None, :]).flatten(-2)
    rank = torch.where(hi > lo, torch.where(full, 0, 1), 2)
    order = torch.argsort(rank, dim=-1, stable=True)
    rank = rank.gather(-1, order)
    spans = torch.stack([lo.gather(-1, order), hi.gather(-1, order)], -1)[rank < 2]
    count, n_full = (rank < 2).sum(-1), (rank == 0).sum(-1)
    return a._changed(
        span_start=begins(count),
        span_full=n_full.int(),
        span_count=count.int(),
        spans=spans.int(),
        **rules.fields(),
    )


@dataclass(frozen=True)
class _Units:
    """Listed units: `key` is `cell * columns + unit`; `full` is True where no element test is needed."""

    key: Tensor
    full: Tensor

    def of(self, some: Tensor) -> _Units:
        return _Units(self.key[some], self.full[some])


def _units(plan: Record) -> _Units:
    lists = plan.unit_lists
    if lists is None:
        raise PlanError("no units")
    listed = lists.listed()
    return _Units(listed.cell * -(-plan.k_rows // plan.unit) + listed.entry, listed.full)


def _of_units(plan: P, units: _Units, rules: Rules) -> P:
    """Replace the plan's lists by these units (full ones first) and its rules by `rules`."""
    columns = -(-plan.k_rows // plan.unit)
    shape = (*plan.extent(), plan.tiles)
    made, _ = Units.arranged(units.key // columns, units.full, units.key % columns, shape)
    return plan._changed(**made, **rules.fields())


def _one_grid(a: Record, b: Record) -> bool:
    """Whether both plans are unit lists on the same grid and row orders, without spans or bits."""
    listed = all(p.index is not None and p.spans is None and p.bits is None for p in (a, b))
    rows = same(a.q_order, b.q_order) and same(a.k_order, b.k_order)
    return listed and rows and (a.tile, a.unit) == (b.tile, b.unit)


def _join_units(a: P, b: P, extent: tuple[int, int]) -> P | None:
    """Intersect two plans of units on one grid whose rules join; None if they are not such."""
    rules = a.rules.join(b.rules) if _one_grid(a, b) else None
    if rules is None:
        return None
    a, b = widen(a, *extent), widen(b, *extent)
    mine, theirs = _units(a), _units(b)
    theirs = theirs.of(torch.argsort(theirs.key))
    mine = mine.of(torch.isin(mine.key, theirs.key))
    at = torch.searchsorted(theirs.key, mine.key)
    return _of_units(a, _Units(mine.key, mine.full & theirs.full[at]), rules)


def _hand_rules(a: P, b: P, extent: tuple[int, int]) -> P | None:
    """Intersect where one plan is its rules alone: keep the other plan's lists under the rules of both."""
    for listed, ruling in ((a, b), (b, a)):
        rules = listed.rules.join(ruling.rules) if _only_rules(ruling) else None
        if rules is None:
            continue
        listed = widen(listed, *extent)
        probe = listed._changed(**ruling.rules.fields())
        return demoted(listed, surely_full(probe, ranges(probe)))._changed(**rules.fields())
    return None


def _only_rules(plan: Record) -> bool:
    """Whether the plan shows every pair that its rules on positions allow, so that its lists add nothing."""
    if plan.q_order is not None or not by_position(plan):
        return False
    return visible_pairs(plan) == dense_pairs(plan)


def demoted(plan: P, sure: Tensor) -> P:
    """Keep entries full only where `sure` (a bool for each entry of `ranges`); the others become partial."""
    changed: Fields = {}
    at, shape = 0, (*plan.extent(), plan.tiles)
    for lists in plan.lists():
        own = lists.laid_out(*plan.extent())
        listed = own.listed()
        still = listed.full & sure[at : at + len(listed.cell)]
        at += len(listed.cell)
        made, order = own.arranged(listed.cell, still, listed.entry, shape)
        changed |= made
        if isinstance(own, Units) and own.bits is not None:
            words = torch.cat([own.bits.words, torch.full_like(own.bits.words[:1], -1)])
            row = own.bit_rows(listed)[order[~still[order]]]  # entries that were full have row -1:
            changed["bits"] = words[row]  # the appended last row, whose bits are all set
            changed["bits_start"] = begins(made["count"].long() - made["full"].long())
    return plan._changed(**changed)


def joined(spans: P, units: P, *, disjoint: bool) -> P:
    """Merge a plan of ranges and a plan of units with equal rules, tiles and row orders into one plan."""
    extent = _shared_extent(spans, units)
    ranges_, numbers = spans.span_lists, units.unit_lists
    if ranges_ is None or spans.index is not None:
        raise PlanError(f"spans=: expected a plan with spans and no index, got {spans!r}")
    if numbers is None or units.spans is not None:
        raise PlanError(f"index=: expected a plan with index and no spans, got {units!r}")
    if not (spans.tile == units.tile and spans.rules.alike(units.rules)):
        raise PlanError(
            f"spans and index stand under one rule, in tiles of one size; given {spans!r} and {units!r}"
        )
    if not (same(spans.q_order, units.q_order) and same(spans.k_order, units.k_order)):
        raise PlanError("spans and index have rows in different orders: use | or a tuple of the two")
    lists = ranges_.laid_out(*extent).fields()
    both = widen(units, *extent)._changed(**lists, overflow=_overflow(spans, units))
    if not disjoint and all(host(x) for x in both.tensors().values()):
        entries = ranges(both)
        order = torch.argsort(entries.cell * (both.k_rows + 1) + entries.lo)
        cell, lo, hi = (x[order] for x in (entries.cell, entries.lo, entries.hi))
        twice = (cell[1:] == cell[:-1]) & (lo[1:] < hi[:-1]) & (hi[1:] > lo[1:])
        if bool(twice.any()):
            at = int(twice.nonzero()[0]) + 1
            raise PlanError(
                f"tile {int(cell[at]) % both.tiles} lists key row {int(lo[at])} in spans and in index: "
                "it would count twice; leave it out of one"
            )
    return both


_RULES = tuple(name for name in vars(Rules()) if not name.startswith("head_"))


def with_rules(plan: P, rules: Fields) -> P:
    """`Plan.with_rules`."""
    for name in rules:
        if name not in _RULES:
            raise PlanError(f"with_rules() has no rule {name!r}; there are {', '.join(_RULES)}")
    if plan.head_window is not None and rules.keys() & {"window", "sink"}:
        if "window" not in rules:
            raise PlanError("sink= beside windows that differ from head to head: give window= too")
        plan = plan._changed(head_window=None, head_sink=None)
    ruled: P = dataclasses.replace(plan, **rules)._told(plan.of_inference)  # with a new plan's checks
    if all(host(x) for x in ruled.tensors().values()):
        entries = ranges(ruled)
        return demoted(ruled, ~entries.full | surely_full(ruled, entries))
    if ruled.bits is not None:
        return demoted(ruled, torch.zeros_like(ranges(ruled).full))
    none = {lists.NAMES["full"]: torch.zeros_like(lists.full) for lists in ruled.lists()}
    return ruled._changed(**none)
