"""Exact set algebra on plans: `&`, `-`, `|`, and the same set on another grid (`retile`).

One mechanism: walk the pairs that one plan visits, look each up in the other, and write what remains as
units, with bits where a unit is not all or nothing. Work and memory follow the visited area, never Tq x Tk.
Two shorter ways need no bits: a plan that is nothing but its rules (a window, say) hands them to the other
plan, and ranges in the same row space are cut where their rules join into one formula.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import PlanError, require
from .bits import bit
from .checks import surely_full
from .entries import cells, fetch, formula, ranges, real_rows
from .figures import by_position, dense_pairs, visible_pairs
from .options import check_options, host, laid_out, shift_at
from .ragged import begins, expand
from .record import LISTS, Record
from .restrict import uses_positions

LIMIT = 2 << 30
"""Bytes of bits that an operation may build before it refuses."""

_ROWS = ("spans", "index", "bits", "unit", "q_order", "k_order")
_POSITIONS = ("q_pos", "k_pos")
P = TypeVar("P", bound=Record)
Keep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Lookup:
    """Whether a plan of `heads` query heads lets query tokens see key tokens, pair by pair."""

    def __init__(self, plan: Record, heads: int) -> None:
        self.plan, self.heads = plan, heads
        self.batch, self.own = plan.extent()
        entries = ranges(plan)
        entries = entries.of(entries.hi > entries.lo)
        self.wide = plan.k_rows + 1
        key = entries.cell * self.wide + entries.lo
        order = torch.argsort(key)
        self.entries, self.key = entries.of(order), key[order]
        self.q_row = None if plan.q_order is None else _inverse(plan.q_order, plan.Tq)
        self.k_row = None if plan.k_order is None else _inverse(plan.k_order, plan.Tk)

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Broadcast batch, head, query and key tokens (-1: no token) to bool."""
        plan, heads = self.plan, self.heads
        b, h, q, k = torch.broadcast_tensors(b, h, q, k)  # type: ignore[no-untyped-call]
        q_row = q if self.q_row is None else torch.where(q >= 0, fetch(self.q_row, b, h, q, heads), -1)
        k_row = k if self.k_row is None else torch.where(k >= 0, fetch(self.k_row, b, h, k, heads), -1)
        keep = (q_row >= 0) & (k_row >= 0)
        if not len(self.key) or not plan.tiles:
            return torch.zeros_like(keep)
        own_b = b if self.batch > 1 else torch.zeros_like(b)
        cell = (own_b * self.own + h * self.own // heads) * plan.tiles + q_row.clamp(min=0) // plan.tile
        # the last range of the query's tile that begins at or before the key
        at = torch.searchsorted(self.key, cell * self.wide + k_row.clamp(min=0), right=True) - 1
        known = at.clamp(min=0)
        keep = keep & (at >= 0) & (self.entries.cell[known] == cell) & (k_row < self.entries.hi[known])
        shift = shift_at(plan.q_offset, b)
        keep = keep & formula(
            plan, q, k, shift, lambda x: fetch(x, b, h, q, heads), lambda x: fetch(x, b, h, k, heads)
        )
        if plan.bits is not None and len(plan.bits):
            row = self.entries.bits[known]
            lane = torch.where(row >= 0, k_row - self.entries.lo[known], 0).clamp(0, plan.unit - 1)
            word = plan.bits[row.clamp(min=0), q_row.clamp(min=0) % plan.tile, lane // 32]
            keep = keep & (bit(word, lane) | (row < 0))
        return keep


def _inverse(order: Tensor, T: int) -> Tensor:
    """Row of each token of an order [B,H,rows], -1 for a dropped one: [B,H,T]."""
    row = torch.full((*order.shape[:2], T + 1), -1, dtype=torch.int64, device=order.device)
    place = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    row.scatter_(-1, torch.where(order >= 0, order, T).long(), place)
    return row[..., :T]


def widen(plan: P, batch: int, heads: int) -> P:
    """The same plan with lists of its own for every batch slot and head."""
    lists: dict[str, Any] = {
        n: laid_out(x, batch, heads).contiguous() for n in LISTS if (x := getattr(plan, n)) is not None
    }
    return plan._changed(**lists)


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
    return max(ba, bb), math.lcm(ha, hb)


def refine(plan: P, keep: Keep | None, *, tile: int, unit: int, extent: tuple[int, int]) -> P:
    """The plan's visible pairs that `keep(b, h, q, k)` lets through, as units of another grid.

    `tile` must divide the plan's tile or be a multiple of it.
    """
    plan = widen(plan, *extent)
    entries = ranges(plan)
    entries = entries.of(entries.hi > entries.lo)
    tiles, words = -(-plan.q_rows // tile), -(-unit // 32)
    split, join = max(1, plan.tile // tile), max(1, tile // plan.tile)
    columns = -(-plan.k_rows // unit)

    # 1. the units touched: new tile and unit of every (entry, unit it overlaps)
    first, last = entries.lo // unit, (entries.hi - 1) // unit + 1
    n = last - first
    pick, place = expand(n)
    column = first[pick] + place
    head, old = entries.cell[pick] // max(plan.tiles, 1), entries.cell[pick] % max(plan.tiles, 1)
    part = torch.arange(split, device=n.device)
    new = (old[:, None] * split + part) // join
    touched = ((head[:, None] * tiles + new) * columns + column[:, None])[new < tiles]
    slot = torch.unique(touched)
    size = len(slot) * tile * words * 8
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

    # 2. their bits
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
            new = (old * split + s) // join
            live = new < tiles
            at = torch.searchsorted(slot, (head * tiles + new) * columns + row // unit)
            mine = seen[:, s * tile : (s + 1) * tile] if split > 1 else seen
            count.index_add_(0, at[live], mine[live].sum(1))
            at = at * words + lane // 32
            value = mine[live].long() << (lane[live] % 32)[:, None]
            if join == 1:
                bits.index_add_(0, at[live], value)
            else:
                offset = (old[live] % join) * plan.tile
                place = offset[:, None] + torch.arange(plan.tile, device=at.device)
                flat = (at[live][:, None] * tile + place).reshape(-1)
                bits.view(-1).index_add_(0, flat, value.reshape(-1))
    bits = bits.view(len(slot), words, tile).transpose(1, 2)

    # 3. full, partial or gone
    cell, column = slot // max(columns, 1), slot % max(columns, 1)
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


def _real_rows(plan: Record, tile: int, tiles: int) -> Tensor:
    """Rows with a real token of each tile of another grid, [B*H*tiles]."""
    batch, heads = plan.extent()
    real = real_rows(plan).flatten(2)
    short = tiles * tile - real.shape[-1]
    real = torch.nn.functional.pad(real, (0, short)) if short > 0 else real[..., : tiles * tile]
    return real.reshape(batch * heads * tiles, tile).sum(-1)


def retile(plan: P, tile: int, unit: int) -> P:
    """The same visible set with other tiles and units."""
    check_options(tile=tile, unit=unit)
    if tile == plan.tile and (unit == plan.unit or plan.index is None):
        return plan if unit == plan.unit else plan._changed(unit=unit)
    if plan.index is None and plan.tile % tile == 0:  # ranges of a tile serve each part of it
        ratio, tiles = plan.tile // tile, -(-plan.q_rows // tile)
        lists = {
            n: getattr(plan, n).repeat_interleave(ratio, -1)[..., :tiles].contiguous() for n in LISTS[:3]
        }
        return plan._changed(tile=tile, unit=unit, **lists)
    if max(tile, plan.tile) % min(tile, plan.tile):
        plan = retile(plan, math.gcd(tile, plan.tile), unit)
    return refine(plan, None, tile=tile, unit=unit, extent=plan.extent())


def intersect(a: P, b: P) -> P:
    """`a & b`."""
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
    """`a - b`."""
    extent = _shared_extent(a, b)
    a = a._changed(overflow=_overflow(a, b))
    if _one_grid(a, b) and _alike(a, b):  # what both list, both see alike: the rest is the difference
        mine, theirs = (_units(widen(p, *extent)) for p in (a, b))
        return _of_units(widen(a, *extent), mine.of(~torch.isin(mine.key, theirs.key)))
    look = Lookup(b, extent[1])
    return refine(a, lambda *at: ~look(*at), tile=a.tile, unit=a.unit, extent=extent)


def unite(a: P, b: P) -> tuple[P, ...]:
    """`a | b` as disjoint plans: one where one holds the other, else two."""
    if _area(b) > _area(a):
        a, b = b, a
    rest = subtract(b, a)
    return (a, rest) if rest.index is not None and len(rest.index) else (a,)


def _overflow(a: Record, b: Record) -> Tensor | None:
    """What lists of either plan have lost, their combination lacks."""
    given = [p.overflow for p in (a, b) if p.overflow is not None]
    return torch.stack([x.reshape(-1).amax() for x in given]).amax() if given else None


def _area(plan: Record) -> float:
    entries = ranges(plan)
    batch, heads = plan.extent()
    return float((entries.hi - entries.lo).sum()) * plan.tile / (batch * heads)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


def _join_rules(a: Record, b: Record) -> dict[str, Any] | None:
    """The rules of both in one formula, or None where one formula cannot say it."""
    rules: dict[str, Any] = {
        "causal": a.causal or b.causal,
        "include_self": a.include_self and b.include_self,
    }
    placed = [p for p in (a, b) if uses_positions(p)]
    if len(placed) == 2:
        if not all(_same(getattr(a, n), getattr(b, n)) for n in _POSITIONS):
            return None
        tensors = [p.q_offset for p in placed if isinstance(p.q_offset, Tensor)]
        if tensors and not (len(tensors) == 2 and _same(*tensors)):
            return None
        if not tensors and a.q_offset != b.q_offset:
            return None
    if placed:
        rules |= {n: getattr(placed[0], n) for n in (*_POSITIONS, "q_offset")}
    windowed = [p for p in (a, b) if p.window is not None or p.head_window is not None]
    if len(windowed) == 2:
        if a.head_window is not None or b.head_window is not None:
            if not (_same(a.head_window, b.head_window) and _same(a.head_sink, b.head_sink)):
                return None
            rules |= {"head_window": a.head_window, "head_sink": a.head_sink}
        elif a.sink != b.sink:
            return None
        else:
            sides = zip(a.window or (), b.window or (), strict=True)
            rules["window"] = tuple(
                min(x) if (x := [s for s in pair if s is not None]) else None for pair in sides
            )
            rules["sink"] = a.sink
    elif windowed:
        rules |= {n: getattr(windowed[0], n) for n in ("window", "sink", "head_window", "head_sink")}
    if a.k_end is not None and b.k_end is not None:
        if a.k_end.shape != b.k_end.shape:
            return None
        rules["k_end"] = torch.minimum(a.k_end, b.k_end)
    else:
        rules["k_end"] = a.k_end if a.k_end is not None else b.k_end
    labelled = [p for p in (a, b) if p.q_seg is not None or p.k_seg is not None]
    if len(labelled) == 2 and not (_same(a.q_seg, b.q_seg) and _same(a.k_seg, b.k_seg)):
        return None
    if labelled:
        rules |= {"q_seg": labelled[0].q_seg, "k_seg": labelled[0].k_seg}
    return rules


def _join_ranges(a: P, b: P, extent: tuple[int, int]) -> P | None:
    """Intersection of two plans of ranges in one row space whose rules join; None where it is not that."""
    if a.index is not None or b.index is not None or a.spans is None or b.spans is None:
        return None
    if not (_same(a.q_order, b.q_order) and _same(a.k_order, b.k_order)):
        return None
    if max(a.tile, b.tile) % min(a.tile, b.tile):
        return None
    rules = _join_rules(a, b)
    if rules is None:
        return None
    tile = min(a.tile, b.tile)
    a, b = (widen(retile(p, tile, p.unit), *extent) for p in (a, b))
    (lo_a, hi_a, full_a), (lo_b, hi_b, full_b) = _padded(a), _padded(b)
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
        **rules,
    )


@dataclass(frozen=True)
class _Units:
    """Listed units: tile and unit as one key, and whether they need no test."""

    key: Tensor
    full: Tensor

    def of(self, some: Tensor) -> _Units:
        return _Units(self.key[some], self.full[some])


def _units(plan: Record) -> _Units:
    assert plan.start is not None and plan.full is not None
    assert plan.count is not None and plan.index is not None
    count = plan.count.flatten().long()
    cell, slot = expand(count)
    unit = plan.index[plan.start.flatten()[cell] + slot]
    return _Units(cell * -(-plan.k_rows // plan.unit) + unit, slot < plan.full.flatten()[cell])


def _of_units(plan: P, units: _Units, **rules: Any) -> P:
    """The plan with these units as its lists, full ones first."""
    columns = max(-(-plan.k_rows // plan.unit), 1)
    cell = units.key // columns
    order = torch.argsort(cell * 2 + (~units.full).long(), stable=True)
    count = torch.bincount(cell, minlength=plan.tiles * math.prod(plan.extent()))
    full = torch.bincount(cell[units.full], minlength=len(count))
    lead = (*plan.extent(), plan.tiles)
    return plan._changed(
        start=begins(count).view(lead),
        full=full.int().view(lead),
        count=count.int().view(lead),
        index=(units.key % columns)[order].int(),
        **rules,
    )


def _one_grid(a: Record, b: Record) -> bool:
    """Whether both plans are lists of units of one grid, and nothing but lists and rules."""
    listed = all(p.index is not None and p.spans is None and p.bits is None for p in (a, b))
    rows = _same(a.q_order, b.q_order) and _same(a.k_order, b.k_order)
    return listed and rows and (a.tile, a.unit) == (b.tile, b.unit)


def _alike(a: Record, b: Record) -> bool:
    """Whether both plans have the same rules."""
    offsets = (a.q_offset, b.q_offset)
    if any(isinstance(x, Tensor) for x in offsets):
        if not _same(*(x if isinstance(x, Tensor) else torch.tensor(x) for x in offsets)):
            return False
    elif offsets[0] != offsets[1]:
        return False
    numbers = ("causal", "include_self", "window", "sink")
    tensors = ("head_window", "head_sink", "q_pos", "k_pos", "k_end", "q_seg", "k_seg")
    equal = all(getattr(a, n) == getattr(b, n) for n in numbers)
    return equal and all(_same(getattr(a, n), getattr(b, n)) for n in tensors)


def _join_units(a: P, b: P, extent: tuple[int, int]) -> P | None:
    """Intersection of two plans of units of one grid whose rules join; None where it is not that."""
    rules = _join_rules(a, b) if _one_grid(a, b) else None
    if rules is None:
        return None
    a, b = widen(a, *extent), widen(b, *extent)
    mine, theirs = _units(a), _units(b)
    theirs = theirs.of(torch.argsort(theirs.key))
    mine = mine.of(torch.isin(mine.key, theirs.key))
    at = torch.searchsorted(theirs.key, mine.key)
    return _of_units(a, _Units(mine.key, mine.full & theirs.full[at]), **rules)


def _hand_rules(a: P, b: P, extent: tuple[int, int]) -> P | None:
    """Intersection where one plan is nothing but its rules: the other one's lists under the rules of both."""
    for listed, ruling in ((a, b), (b, a)):
        rules = _join_rules(listed, ruling) if _only_rules(ruling) else None
        if rules is None:
            continue
        listed = widen(listed, *extent)
        own = (*LISTS, *_ROWS)
        probe = ruling._changed(tile=listed.tile, **{n: getattr(listed, n) for n in own})
        return demoted(listed, surely_full(probe, ranges(probe)))._changed(**rules)
    return None


def _only_rules(plan: Record) -> bool:
    """Whether the lists hide nothing that the rules on positions let see."""
    if plan.q_order is not None or not by_position(plan):
        return False
    return visible_pairs(plan) == dense_pairs(plan)


def demoted(plan: P, sure: Tensor) -> P:
    """The plan with only those entries full (in the order of `ranges`) that stay so, the others tested."""
    changed: dict[str, Any] = {}
    at = 0
    for pre, pool, name in (("span_", plan.spans, "spans"), ("", plan.index, "index")):
        if pool is None:
            continue
        start, full, count = (getattr(plan, pre + n) for n in ("start", "full", "count"))
        batch, heads = plan.extent()
        start, full, count = (laid_out(x, batch, heads).long() for x in (start, full, count))
        flat = count.reshape(-1)
        cell, slot = expand(flat)
        was = slot < full.reshape(-1)[cell]
        still = was & sure[at : at + len(cell)]
        at += len(cell)
        order = torch.argsort(cell * 2 + (~still).long(), stable=True)
        left = torch.bincount(cell[still], minlength=len(flat))
        changed |= {
            pre + "start": begins(flat).view(count.shape),
            pre + "full": left.int().view(count.shape),
            pre + "count": count.int(),
            name: pool[start.reshape(-1)[cell] + slot][order],
        }
        if not pre and plan.bits is not None and plan.bits_start is not None:
            first = laid_out(plan.bits_start, batch, heads).reshape(-1)
            row = torch.where(was, len(plan.bits), first[cell] + slot - full.reshape(-1)[cell])
            part = order[~still[order]]  # what was full lets all its bits through
            changed["bits"] = torch.cat([plan.bits, torch.full_like(plan.bits[:1], -1)])[row[part]]
            changed["bits_start"] = begins(flat - left).view(count.shape)
    return plan._changed(**changed)


def joined(spans: P, units: P, *, disjoint: bool) -> P:
    """A plan of ranges and a plan of units of the same rows and rules as one: both in the lists of a tile."""
    extent = _shared_extent(spans, units)
    for plan, name, other in ((spans, "spans", "index"), (units, "index", "spans")):
        if getattr(plan, name) is None or getattr(plan, other) is not None:
            raise PlanError(f"{name}=: expected a plan with {name} and no {other}, got {plan!r}")
    if not (spans.tile == units.tile and _alike(spans, units)):
        raise PlanError(
            f"spans and index stand under one rule, in tiles of one size; given {spans!r} and {units!r}"
        )
    if not (_same(spans.q_order, units.q_order) and _same(spans.k_order, units.k_order)):
        raise PlanError("spans and index have rows in different orders: use | or a tuple of the two")
    spans, units = widen(spans, *extent), widen(units, *extent)
    lists = {n: getattr(spans, n) for n in (*LISTS[:3], "spans")}
    both = units._changed(**lists, overflow=_overflow(spans, units))
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


_RULES = (
    "causal", "include_self", "window", "sink", "q_offset", "q_pos", "k_pos", "k_end", "q_seg", "k_seg",
)  # fmt: skip


def with_rules(plan: P, rules: dict[str, Any]) -> P:
    """`Plan.with_rules`."""
    for name in rules:
        if name not in _RULES:
            raise PlanError(f"with_rules() has no rule {name!r}; there are {', '.join(_RULES)}")
    if plan.head_window is not None and rules.keys() & {"window", "sink"}:
        if "window" not in rules:
            raise PlanError("sink= beside windows that differ from head to head: give window= too")
        plan = plan._changed(head_window=None, head_sink=None)
    ruled: P = dataclasses.replace(plan, **rules)  # checked as a new plan is
    if all(host(x) for x in ruled.tensors().values()):
        entries = ranges(ruled)
        return demoted(ruled, ~entries.full | surely_full(ruled, entries))
    if ruled.bits is not None:
        return demoted(ruled, torch.zeros_like(ranges(ruled).full))
    none = {n: torch.zeros_like(x) for n in ("span_full", "full") if (x := getattr(ruled, n)) is not None}
    return ruled._changed(**none)


def _padded(plan: Record) -> tuple[Tensor, Tensor, Tensor]:
    """lo, hi, full of the ranges of each tile, [B,H,R,m], empty ones behind."""
    start, full, count, spans = plan.span_start, plan.span_full, plan.span_count, plan.spans
    if start is None or full is None or count is None or spans is None:
        raise PlanError("no ranges")
    slot = torch.arange(int(count.max()) if count.numel() else 0, device=count.device)
    live = slot < count[..., None]
    place = torch.where(live, start[..., None] + slot, 0)
    if not len(spans):
        none = torch.zeros_like(place)
        return none, none, none.bool()
    lo, hi = (torch.where(live, x, 0) for x in spans[place].long().unbind(-1))
    return lo, hi, slot < full[..., None]
