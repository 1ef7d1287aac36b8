"""Concatenate plans along heads into one plan (`Plan.by_head`).

The entry pools are concatenated. Fields in which the plans differ (row orders, positions, expiries, segments,
windows) become tables with a row for each head. Causality and `include_self` are one flag for all heads, so
tables express them: a causal head among others gets a window with right side 0, a causal head without its
self pair gets query positions one lower. A plan that no table can express gets bits instead of rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.errors import PlanError
from . import algebra
from .options import ANY, SHORT, common, divisor, is_count, laid_out, narrow, same_offset, shift_of
from .record import FLAT, Record
from .rules import Rules

P = TypeVar("P", bound=Record)
_ROOMS = {"span_start": "span_room", "start": "room"}
Heads = Sequence[int | Sequence[int]]


def by_head(plans: Sequence[P], heads: Heads | None = None) -> P:
    """`Plan.by_head`."""
    counts, place = _followers(plans, heads)
    _check_alike(plans)
    tile = divisor(*(p.tile for p in plans))
    unit = divisor(*(p.unit for p in plans if p.index is not None)) or plans[0].unit
    own = [p if _fits(p, tile, unit) else algebra.retile(p, tile, unit) for p in plans]
    own = _with_one_law([p._changed(unit=unit) if p.unit != unit else p for p in own])
    made = _Joined(own, counts, tile, unit).fields()
    if place is not None:  # the heads do not follow the order of the plans
        made = _in_order(made, torch.tensor(place, device=plans[0].device))
    return type(plans[0])._made(**made)


def _followers(plans: Sequence[Record], heads: Heads | None) -> tuple[list[int], list[int] | None]:
    """How many heads follow each plan; and for each head its place in plan order, None for the identity."""
    if not isinstance(plans, (tuple, list)) or not plans or not all(isinstance(p, Record) for p in plans):
        raise PlanError(f"by_head: {plans!r:.80}; expected a list of plans, at least one")
    given: list[Any] = [p.extent()[1] for p in plans] if heads is None else list(heads)
    if len(given) != len(plans):
        raise PlanError(
            f"by_head: {len(plans)} plans, heads for {len(given)}: expected one for each plan, how many "
            "heads follow it, or a list of which"
        )
    counts = [n if isinstance(n, int) else len(n) for n in given]
    for plan, n in zip(plans, counts, strict=True):
        if not is_count(n, 1) or n % plan.extent()[1]:
            raise PlanError(
                f"by_head: {n!r} heads follow a plan of {plan.extent()[1]}: expected a multiple of that"
            )
    if all(isinstance(n, int) for n in given):
        return counts, None
    named = [n for n in given if not isinstance(n, int)]
    flat = [h for n in named for h in n]
    if len(named) != len(given) or sorted(flat) != list(range(sum(counts))):
        raise PlanError(
            f"by_head: heads={given}: expected numbers of heads alone, or lists that name each of "
            f"0..{sum(counts) - 1} once"
        )
    place = [0] * len(flat)
    for at, h in enumerate(flat):
        place[h] = at
    return counts, None if place == sorted(place) else place


def _common(sizes: Sequence[int]) -> int:
    """The first size that is not 1, or 1."""
    other = [n for n in sizes if n != 1]
    return other[0] if other else 1


def _check_alike(plans: Sequence[Record]) -> None:
    first = plans[0]
    batch = _common([p.extent()[0] for p in plans])
    for p in plans:
        if (p.Tq, p.Tk) != (first.Tq, first.Tk):
            raise PlanError(
                f"by_head: plans of {first.Tq} x {first.Tk} and {p.Tq} x {p.Tk} tokens: expected one size"
            )
        if p.extent()[0] not in (1, batch):
            raise PlanError(f"by_head: plans of batch size {p.extent()[0]} and {batch}: expected one, or 1")
        if p.device != first.device:
            raise PlanError(f"by_head: plans on {first.device} and {p.device}: use .to(device)")


def _fits(plan: Record, tile: int, unit: int) -> bool:
    return plan.tile == tile and (plan.index is None or plan.unit == unit)


def _with_one_law(plans: list[P]) -> list[P]:
    """Rewrite the plans so that all have the same `causal` and `include_self`."""
    if len({(p.causal, p.include_self) for p in plans}) == 1:
        return plans
    plans = [_from_earlier(p) if p.causal and not p.include_self else p for p in plans]
    mixed = len({p.causal for p in plans}) > 1
    found = []
    for p in plans:
        exempt = p.causal and mixed and p.rules.windowed and (p.head_sink is not None or p.sink > 0)
        if not p.include_self or exempt:  # sinks are exempt from the window that stands for causality
            found.append(_written_out(p))
        elif p.causal and mixed:
            pair, sink = _window_table(p)
            right = torch.where((pair[..., 1:] < 0) | (pair[..., 1:] > 0), 0, pair[..., 1:])
            table = torch.cat([pair[..., :1], right], -1)
            found.append(p._changed(causal=False, window=None, sink=0, head_window=table, head_sink=sink))
        else:
            found.append(p)
    return found


def _from_earlier(plan: P) -> P:
    """Rewrite a causal plan without self pairs: query positions one lower, `include_self=True`."""
    changed: dict[str, Any] = {"include_self": True}
    if plan.q_pos is not None:
        changed["q_pos"] = narrow(plan.q_pos.long() - 1)
    offset = plan.q_offset
    changed["q_offset"] = narrow(offset.long() - 1) if isinstance(offset, Tensor) else offset - 1
    if plan.k_end is not None:
        changed["k_end"] = narrow(plan.k_end.long() - 1)
    if plan.rules.windowed:  # the left reach shrinks by one too; a reach of 0 cannot, so bits replace it
        pair, sink = _window_table(plan)
        left = torch.where(pair[..., :1] > 0, pair[..., :1] - 1, pair[..., :1])
        if bool((pair[..., :1] == 0).any()):
            return _written_out(plan)
        changed |= {"window": None, "sink": 0, "head_sink": sink}
        changed["head_window"] = torch.cat([left, pair[..., 1:]], -1)
    return plan._changed(**changed)


def _written_out(plan: P) -> P:
    """Return the same visible pairs as units with bits and no rules."""
    bare = algebra.refine(plan, None, tile=plan.tile, unit=plan.unit, extent=plan.extent())
    return bare._changed(**Rules().fields())


def _window_table(plan: Record) -> tuple[Tensor, Tensor]:
    """The window [1,H,2] (-1: unbounded) and sink [1,H,1] of each head, int32."""
    if plan.head_window is not None:
        sink = plan.head_sink
        return plan.head_window, torch.zeros_like(plan.head_window[..., :1]) if sink is None else sink
    sides = [-1 if x is None or x > SHORT.max else x for x in plan.window or (None, None)]
    # torch.full fills on the device: a tensor made of a Python list would be a synchronising copy
    full = [torch.full((1, 1, 1), x, dtype=torch.int32, device=plan.device) for x in sides]
    sink_ = min(plan.sink, SHORT.max) if plan.window is not None else 0
    return torch.cat(full, -1), torch.full_like(full[0], sink_)


class _Joined:
    """Merges plans of one grid, `causal` and `include_self`; `counts` says how many heads follow each."""

    def __init__(self, plans: Sequence[Record], counts: list[int], tile: int, unit: int) -> None:
        self.plans, self.counts, self.tile, self.unit = plans, counts, tile, unit
        self.batch = _common([p.extent()[0] for p in plans])
        self.heads = sum(counts)
        rows = max(p.q_rows for p in plans)
        self.ordered = any(p.q_order is not None for p in plans)
        self.tiles = max(p.tiles for p in plans)
        self.rows = self.tiles * tile if self.ordered else rows
        self.device = plans[0].device

    def fields(self) -> dict[str, Any]:
        """Fields of the merged plan."""
        first = self.plans[0]
        made: dict[str, Any] = {n: getattr(first, n) for n in ("Tq", "Tk", "causal", "include_self")}
        made |= {"tile": self.tile, "unit": self.unit, **self.orders(), **self.spans(), **self.units()}
        made |= {**self.positions(), **self.windows()}
        made["k_end"] = self.tokens("k_end", SHORT.max)
        made["q_seg"], made["k_seg"] = self.tokens("q_seg", ANY), self.tokens("k_seg", ANY)
        lost = [p.overflow for p in self.plans if p.overflow is not None]
        made["overflow"] = torch.stack(lost).amax() if lost else None
        return made

    # -------------------------------------------------------------- tables

    def table(self, of: Callable[[Record], Tensor], batch: int | None = None) -> Tensor:
        """Concatenate the tables `of(plan)` along heads, each expanded to the heads that follow its plan."""
        batch = self.batch if batch is None else batch
        parts = [laid_out(of(p), batch, n) for p, n in zip(self.plans, self.counts, strict=True)]
        return torch.cat(parts, 1)

    def grouped(self, tables: Sequence[Tensor | None], plain: Tensor) -> Tensor:
        """Concatenate tables along as few heads as possible: a row per group of heads that share it."""
        own = [1 if x is None else x.shape[1] for x in tables]
        group = common(*(n // h for n, h in zip(self.counts, own, strict=True)))
        filled = [plain if x is None else x for x in tables]
        batch = _common([x.shape[0] for x in filled])
        return torch.cat(
            [laid_out(x, batch, n // group) for x, n in zip(filled, self.counts, strict=True)], 1
        )

    def orders(self) -> dict[str, Any]:
        """Row orders; a plan without one gets the identity if another plan has one."""
        made: dict[str, Any] = {}
        for name, T, rows in (
            ("q_order", self.plans[0].Tq, self.rows),
            ("k_order", self.plans[0].Tk, max(p.k_rows for p in self.plans)),
        ):
            tables = [getattr(p, name) for p in self.plans]
            if all(x is None for x in tables):
                made[name] = None
                continue
            plain = torch.arange(T, dtype=torch.int32, device=self.device).view(1, 1, -1)
            wide = [None if x is None else pad(x, (0, rows - x.shape[-1]), value=-1) for x in tables]
            made[name] = self.grouped(wide, pad(plain, (0, rows - T), value=-1))
        return made

    def tokens(self, name: str, neutral: int) -> Tensor | None:
        """A table of tokens that some plans have; where a plan has none, what changes nothing."""
        tables = [getattr(p, name) for p in self.plans]
        given = [x for x in tables if x is not None]
        if not given:
            return None
        return self.grouped(tables, torch.full_like(given[0][:1, :1], neutral))

    def positions(self) -> dict[str, Any]:
        """One `q_offset` if all plans have the same; otherwise a `q_pos` for every token of every head."""
        first = self.plans[0]
        made: dict[str, Any] = {"q_offset": first.q_offset, "q_pos": None, "k_pos": None}
        if any(p.q_pos is not None for p in self.plans) or not all(
            same_offset(p.q_offset, first.q_offset) for p in self.plans
        ):
            token = torch.arange(first.Tq, device=self.device).view(1, 1, -1)
            own = [
                narrow(token + shift_of(p.q_offset, 2)) if p.q_pos is None else p.q_pos for p in self.plans
            ]
            made |= {"q_offset": 0, "q_pos": self.grouped(own, own[0])}
        if any(p.k_pos is not None for p in self.plans):
            plain = torch.arange(first.Tk, dtype=torch.int32, device=self.device).view(1, 1, -1)
            made["k_pos"] = self.grouped([p.k_pos for p in self.plans], plain)
        return made

    def windows(self) -> dict[str, Any]:
        """One window if all plans have the same; otherwise `head_window` and `head_sink`."""
        first = self.plans[0]
        alike = all(
            p.head_window is None and (p.window, p.sink) == (first.window, first.sink) for p in self.plans
        )
        if alike:
            return {"window": first.window, "sink": first.sink}
        pairs, sinks = zip(*(_window_table(p) for p in self.plans), strict=True)
        if first.causal:  # causality bounds the right side already
            pairs = tuple(torch.cat([x[..., :1], torch.full_like(x[..., 1:], -1)], -1) for x in pairs)
        at = {id(p): n for n, p in enumerate(self.plans)}
        return {
            "head_window": self.table(lambda p: pairs[at[id(p)]], 1),
            "head_sink": self.table(lambda p: sinks[at[id(p)]], 1),
        }

    # -------------------------------------------------------------- lists

    def numbers(self, name: str) -> Tensor:
        """The table `name` (a count, or a number of full entries) of all heads; 0 if a plan has no list."""

        def own(p: Record) -> Tensor:
            x = getattr(p, name)
            none = torch.zeros(1, 1, self.tiles, dtype=torch.int32, device=self.device)
            return none if x is None else pad(x, (0, self.tiles - p.tiles))

        return self.table(own)

    def starts(self, name: str, pools: Sequence[Tensor | None]) -> Tensor:
        """Where each list begins in the concatenated pools."""
        before, at = 0, {}
        for p, pool in zip(self.plans, pools, strict=True):
            at[id(p)], before = before, before + (0 if pool is None else len(pool))

        def own(p: Record) -> Tensor:
            x = getattr(p, name)
            none = torch.zeros(1, 1, self.tiles, dtype=torch.int64, device=self.device)
            return none if x is None else pad(x, (0, self.tiles - p.tiles)) + at[id(p)]

        return self.table(own)

    def spans(self) -> dict[str, Any]:
        """The span lists: of one fixed capacity if all plans' lists have one, otherwise compact."""
        if all(p.spans is None for p in self.plans):
            return {}
        made: dict[str, Any] = {
            "span_full": self.numbers("span_full"),
            "span_count": self.numbers("span_count"),
        }
        return made | self.pooled("span_start", "spans", "span_room")

    def pooled(self, start: str, pool: str, room: str) -> dict[str, Any]:
        """Concatenate the pools; if all lists have a fixed capacity, so has the result (the largest)."""
        given = [getattr(p, pool) for p in self.plans if getattr(p, pool) is not None]
        rooms = [getattr(p, room) for p in self.plans if getattr(p, pool) is not None]
        if not all(rooms):
            pools = [getattr(p, pool) for p in self.plans]
            return {start: self.starts(start, pools), pool: torch.cat(given)}
        most, width = max(rooms), given[0].shape[1:]

        def own(p: Record) -> Tensor:
            x = getattr(p, pool)
            if x is None:
                return torch.zeros(1, 1, self.tiles, most, *width, dtype=torch.int32, device=self.device)
            lists = x.view(*getattr(p, start).shape, getattr(p, room), *width)
            ends = (0, most - getattr(p, room), 0, self.tiles - p.tiles)
            return pad(lists, (*[0, 0] * len(width), *ends))

        lists = self.table(own)
        lead = lists.shape[:3]
        begin = torch.arange(0, math.prod(lead) * most, most, device=self.device)
        return {start: begin.view(lead), pool: lists.reshape(-1, *width), room: most}

    def units(self) -> dict[str, Any]:
        """The unit lists; where only some plans have bits, the others get words with all bits set."""
        if all(p.index is None for p in self.plans):
            return {}
        made: dict[str, Any] = {"full": self.numbers("full"), "count": self.numbers("count")}
        made |= self.pooled("start", "index", "room")
        if all(p.bits is None for p in self.plans):
            return made
        most = 0  # partial units of a list without bits
        for p in self.plans:
            if p.bits is None and p.count is not None and p.full is not None and p.count.numel():
                most = max(most, p.room or int((p.count - p.full).max()))
        words = [p.bits for p in self.plans if p.bits is not None]
        seen = torch.full((most, *words[0].shape[1:]), -1, dtype=torch.int32, device=self.device)
        bits = torch.cat([*words, seen])
        begins = self.starts("bits_start", [p.bits for p in self.plans])
        without = self.table(
            lambda p: torch.full((1, 1, self.tiles), int(p.bits is None), device=self.device)
        )
        return made | {"bits": bits, "bits_start": torch.where(without == 1, len(bits) - most, begins)}


def _in_order(made: dict[str, Any], at: Tensor) -> dict[str, Any]:
    """Permute the heads of the tables and of pools with fixed capacity; other pools are left as they are."""
    heads, done = len(at), dict(made)
    for start, pool, room in (("span_start", "spans", "span_room"), ("start", "index", "room")):
        if made.get(room):
            lists = made[pool].view(*made[start].shape, made[room], *made[pool].shape[1:])
            done[pool] = lists[:, at].reshape(made[pool].shape)
    for name, x in made.items():
        kept = name in FLAT or not isinstance(x, Tensor)
        if not kept and not made.get(_ROOMS.get(name, "")):
            done[name] = laid_out(x, x.shape[0], heads)[:, at]
    return done
