"""Restrict a plan to some queries and keys, on its lists alone (`Plan.restrict`): the share of one rank.

The rows of tokens that stay are compacted in order, so a range stays a range. Units stay units where whole
units stay; otherwise they become ranges or, if they have bits, shorter units. Tiles of which few queries stay
are merged where the rules alone separate what each row sees: a bucket spread over ranks then takes few tiles
on each rank. Work and memory follow the lists and the rows, never Tq x Tk.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..common.errors import PlanError, require
from .bits import bit, pack_bits
from .entries import ranges, read
from .lists import Lists, Spans, Units
from .options import FAR, INTEGERS, Fields, host, laid_out, shape_of, shift_of
from .ragged import begins, expand
from .record import LISTS, Record
from .rules import Rules

P = TypeVar("P", bound=Record)
CHUNK = 1 << 24
"""Bits that are moved in one chunk."""
LEAST, MORE = 32, 1.15
"""Tiles are halved, down to LEAST rows, while they visit more than MORE times the pairs their rows need."""


def restrict(plan: P, q_tokens: Tensor | None, k_tokens: Tensor | None) -> P:
    """`Plan.restrict`."""
    q, k = _chosen(q_tokens, plan.Tq, "q_tokens", plan), _chosen(k_tokens, plan.Tk, "k_tokens", plan)
    keys = _Keys.of(plan, k)
    lists = _Lists(plan, _rows(plan.q_order, plan.Tq, q, plan.device), keys)
    Tq, Tk = (T if x is None else len(x) for x, T in ((q, plan.Tq), (k, plan.Tk)))
    return plan._changed(
        Tq=Tq,
        Tk=Tk,
        tile=lists.tile,
        unit=keys.unit,
        q_order=_plain(lists.q_order, Tq),
        k_order=_plain(keys.order, Tk),
        **lists.made,
        **_rules(plan.rules, q, k).fields(),
    )


def _chosen(tokens: object, T: int, name: str, plan: Record) -> Tensor | None:
    """Validate distinct tokens and move them to the plan's device as int64; None means all."""
    if tokens is None:
        return None
    if not (isinstance(tokens, Tensor) and tokens.dim() == 1 and tokens.dtype in INTEGERS):
        raise PlanError(f"{name}: {shape_of(tokens)}; expected integers [n], the tokens that stay, or None")
    tokens = tokens.long().to(plan.device)
    if host(tokens) and tokens.numel():
        low, high = (int(x) for x in torch.aminmax(tokens))
        require(
            (low >= 0 and high < T, lambda: f"{name} holds {low}..{high}: expected tokens 0..{T - 1}"),
            (int(tokens.bincount().max()) == 1, lambda: f"{name} names a token twice: expected each once"),
            error=PlanError,
        )
    return tokens


def _run(tokens: Tensor | None) -> int | None:
    """The first token if the tokens are consecutive, 0 for None (all) or no tokens; otherwise None."""
    if tokens is None or not len(tokens):
        return 0
    first = int(tokens[0])
    one = torch.equal(tokens, torch.arange(first, first + len(tokens), device=tokens.device))
    return first if one else None


def _rules(rules: Rules, q: Tensor | None, k: Tensor | None) -> Rules:
    """Rules for the tokens that stay; all positions stay the same or shift by the same amount."""
    rules = rules.of(q, k)
    made: Fields = {}
    first = 0 if k is None or rules.k_pos is not None else _run(k)
    if k is not None and first is None:
        made["k_pos"] = k.int().view(1, 1, -1)
    if q is not None and rules.q_pos is None:
        begin = _run(q)
        if begin is None:
            made |= {"q_pos": q.view(1, 1, -1) + shift_of(rules.q_offset, 2), "q_offset": 0}
        else:
            offset = rules.q_offset
            made["q_offset"] = (offset.long() if isinstance(offset, Tensor) else offset) + begin
    # consecutive keys are renumbered from 0, so every other position shifts with them
    return rules.changed(made).shift(first or 0)


@dataclass(frozen=True)
class _Rows:
    """Rows of an order: new token of each, -1 if dropped, [b,h,rows]; exclusive prefix count of kept rows."""

    token: Tensor
    seen: Tensor

    def laid_out(self, batch: int, heads: int) -> tuple[Tensor, Tensor]:
        """Expand both tensors to every list: [lists, rows], [lists, rows + 1]."""
        token, seen = (laid_out(x, batch, heads) for x in (self.token, self.seen))
        return token.reshape(batch * heads, -1), seen.reshape(batch * heads, -1)


def _rows(order: Tensor | None, T: int, tokens: Tensor | None, device: torch.device) -> _Rows:
    stays = torch.arange(T + 1, device=device)
    if tokens is not None:
        stays = torch.full((T + 1,), -1, dtype=torch.int64, device=device)
        stays[tokens] = torch.arange(len(tokens), device=device)
    stays[T] = -1  # the token of an empty lane
    token = stays[None, None, :T] if order is None else stays[order.long()]
    return _Rows(token, torch.nn.functional.pad((token >= 0).cumsum(-1), (1, 0)))


def _placed(token: Tensor, place: Tensor, rows: int) -> Tensor:
    """Scatter tokens to rows `place`: an order [..., rows]; tokens below 0 are dropped."""
    order = torch.full((*token.shape[:-1], rows + 1), -1, dtype=torch.int32, device=token.device)
    order.scatter_(-1, torch.where(token >= 0, place, rows), token.int())
    order[..., rows] = -1
    return order[..., :rows]


def _plain(order: Tensor, T: int) -> Tensor | None:
    """Return the order, or None if it is the identity."""
    same = order.shape[:2] == (1, 1) and order.shape[-1] >= T
    if same and torch.equal(order[0, 0, :T], torch.arange(T, dtype=torch.int32, device=order.device)):
        return None if order.shape[-1] == T or bool((order[..., T:] < 0).all()) else order
    return order


class _Numbers(NamedTuple):
    """For each old unit [b,h,C]: its new number, and how many of its rows stay."""

    number: Tensor
    inside: Tensor


@dataclass(frozen=True)
class _Keys:
    """The key rows that stay: `place` [b,h,n] is the new row of the n-th of them, `order` the new k_order.

    `units` is the renumbering if units stay units (of `unit` rows each), None if they become ranges.
    """

    rows: _Rows
    place: Tensor
    order: Tensor
    unit: int
    units: _Numbers | None = None

    @classmethod
    def of(cls, plan: Record, tokens: Tensor | None) -> _Keys:
        """Select the key rows of a plan that hold one of the tokens (None: all)."""
        rows = _rows(plan.k_order, plan.Tk, tokens, plan.device)
        lead, n = rows.token.shape[:2], int(rows.seen[..., -1].max()) if rows.seen.numel() else 0
        packed = torch.arange(n, device=rows.token.device).expand(*lead, n)
        if plan.index is None:
            return cls(rows, packed, _placed(rows.token, rows.seen[..., :-1], n), plan.unit)
        unit, columns = plan.unit, -(-plan.k_rows // plan.unit)
        edge = (torch.arange(columns + 1, device=rows.token.device) * unit).clamp(max=plan.k_rows)
        inside = rows.seen[..., edge].diff(dim=-1)
        size = edge.diff()
        whole = bool(((inside == 0) | (inside == size)).all())
        most = int(inside.max()) if inside.numel() else 0
        if plan.bits is None and not whole:
            return cls(rows, packed, _placed(rows.token, rows.seen[..., :-1], n), unit)
        if not whole:  # shrink units to the most lanes that any keeps, in steps of 16
            unit = min(unit, -(-most // 16) * 16)
        number = (inside > 0).cumsum(-1) - 1
        column = torch.arange(plan.k_rows, device=edge.device) // plan.unit
        slot = number[..., column] * unit + rows.seen[..., :-1] - rows.seen[..., edge[column]]
        used = int(torch.where(rows.token >= 0, slot, -1).max()) + 1 if slot.numel() else 0
        place = torch.zeros(*lead, n + 1, dtype=torch.int64, device=edge.device)
        place.scatter_(-1, torch.where(rows.token >= 0, rows.seen[..., :-1], n), slot)
        return cls(rows, place[..., :n], _placed(rows.token, slot, used), unit, _Numbers(number, inside))


@dataclass(frozen=True)
class _Entries:
    """Entries of lists, flat: list (b * H + h), old tile, range in old key rows, whether full."""

    list_: Tensor
    tile: Tensor
    lo: Tensor
    hi: Tensor
    full: Tensor

    def of(self, some: Tensor) -> _Entries:
        """Select entries by mask or index."""
        return _Entries(*(getattr(self, f.name)[some] for f in dataclasses.fields(self)))


class _Lists:
    """Builds the lists of the restricted plan."""

    def __init__(self, plan: Record, q: _Rows, keys: _Keys) -> None:
        named = ("span_count", "count", "q_order", "k_order", "head_window")
        given = [x for n in named if (x := getattr(plan, n)) is not None]
        self.plan, self.keys = plan, keys
        self.batch = next((x.shape[0] for x in given if x.shape[0] != 1), 1)
        self.heads = math.lcm(*(x.shape[1] for x in given))
        self.k_seen = keys.rows.laid_out(self.batch, self.heads)[1]
        token, seen = q.laid_out(self.batch, self.heads)
        edge = (torch.arange(plan.tiles + 1, device=plan.device) * plan.tile).clamp(max=plan.q_rows)
        self.stay = seen[:, edge].diff(dim=-1)  # [lists, R]: queries of each old tile that stay
        self.spans = self._entries(plan.span_lists)
        self.units = self._entries(plan.unit_lists)
        self.token, self.seen, self.edge = token, seen, edge
        self.made = self._best()

    def _best(self) -> Fields:
        """Build rows and lists with the largest tile that visits at most MORE times the needed pairs."""
        self.old_list, self.old_tile = (self.stay > 0).nonzero().unbind(-1)  # old tiles that keep a query
        self.number = torch.full_like(self.stay, -1)
        self.number[self.old_list, self.old_tile] = torch.arange(len(self.old_list), device=self.plan.device)
        chain = self._chains()
        asked = self._asked()
        self.tile = self.plan.tile
        while True:
            self._cut(chain)
            made = self.fields()
            if self.tile % 2 or self.tile // 2 < LEAST or self._visits(made) <= MORE * asked:
                return made
            self.tile //= 2

    def _asked(self) -> float:
        """Pairs that the old lists visit once both axes are restricted: what the new lists must visit."""
        total = 0
        for part in (self.spans, self._as_ranges()):
            if part is not None:
                length = self.k_seen[part.list_, part.hi] - self.k_seen[part.list_, part.lo]
                total += int((length * self.stay[part.list_, part.tile]).sum())
        return total

    def _visits(self, made: Fields) -> float:
        """Pairs that the new lists visit."""
        part = self.plan._changed(
            tile=self.tile, unit=self.keys.unit, q_order=self.q_order, k_order=self.keys.order, **made
        )
        rows = min(self.tile, self.q_order.shape[-1])
        entries = ranges(part)
        own = part.extent()
        return int((entries.hi - entries.lo).sum()) * rows * self.batch * self.heads / (own[0] * own[1])

    def _entries(self, lists: Lists | None) -> _Entries | None:
        """Flatten the entries of tiles that keep a query; for units lo is the unit, hi its bits row or -1."""
        if lists is None:
            return None
        own = lists.laid_out(self.batch, self.heads)
        stays = self.stay.view(own.count.shape) > 0
        e = dataclasses.replace(own, count=torch.where(stays, own.count, 0)).listed()
        lo, hi = (e.entry, own.bit_rows(e)) if isinstance(own, Units) else own.rows(e.entry)
        tiles = self.plan.tiles
        return _Entries(e.cell // tiles, e.cell % tiles, lo, hi, e.full)

    # ---------------------------------------------------------------- tiles

    def _chains(self) -> Tensor:
        """Mark the old tiles that begin a chain; the rows of a chain may share new tiles."""
        plan, list_ = self.plan, self.old_list
        chain = torch.ones_like(list_, dtype=torch.bool)
        if plan.index is None and self.spans is not None and self._worth():
            chain[1:] = list_[1:] != list_[:-1]
            chain[1:] |= ~self._linked(self.spans)
        return chain

    def _cut(self, chain: Tensor) -> None:
        """Assign queries to new tiles: each chain is cut into tiles of `tile` rows.

        Example: tile 4, a chain of three old tiles with n = 3, 2, 4 queries left: before = 0, 3, 5; new tiles
        low..high = 0..0, 0..1, 1..2; 9 rows, cut = 3 tiles.
        """
        plan, device, tile = self.plan, self.plan.device, self.tile
        list_, old = self.old_list, self.old_tile
        n = self.stay[list_, old]
        first = torch.ones_like(chain)
        first[1:] = list_[1:] != list_[:-1]
        of = chain.cumsum(0) - 1
        before = n.cumsum(0) - n
        before = before - before[chain][of]  # rows of the chain before this old tile
        rows = torch.zeros(int(chain.sum()), dtype=torch.int64, device=device).index_add_(0, of, n)
        cut = (rows + tile - 1) // tile
        base = cut.cumsum(0) - cut
        base = base - base[of[first]][(first.cumsum(0) - 1)[chain]]  # tile numbers restart at 0 in each list
        made = torch.zeros(self.batch * self.heads, dtype=torch.int64, device=device)
        made.index_add_(0, list_[chain], cut)
        self.R = int(made.max()) if made.numel() else 0
        self.low = base[of] + before // tile  # each old tile's rows go to new tiles low..high
        self.high = base[of] + (before + n - 1) // tile
        begin = torch.zeros_like(self.stay)
        begin[list_, old] = base[of] * tile + before
        row_tile = torch.arange(plan.q_rows, device=device) // plan.tile
        self.place = begin[:, row_tile] + self.seen[:, :-1] - self.seen[:, self.edge[row_tile]]
        used = int(torch.where(self.token >= 0, self.place, -1).max()) + 1 if self.token.numel() else 0
        order = _placed(self.token, self.place, used)
        self.q_order = order.view(self.batch, self.heads, -1)
        if used and bool((order == order[:1]).all()):
            self.q_order = self.q_order[:1, :1]

    def _spread(self, e: _Entries) -> tuple[Tensor, Tensor]:
        """Repeat each entry for every new tile that has rows of its old tile: index into e, and new cell."""
        number = self.number[e.list_, e.tile]
        entry, nth = expand(self.high[number] - self.low[number] + 1)
        return entry, e.list_[entry] * self.R + self.low[number][entry] + nth

    def _worth(self) -> bool:
        """Whether merging could leave fewer tiles."""
        list_ = self.old_list
        n = self.stay[list_, self.old_tile]
        total = torch.zeros(self.batch * self.heads, dtype=torch.int64, device=n.device)
        total.index_add_(0, list_, n)
        return int(((total + self.plan.tile - 1) // self.plan.tile).sum()) < len(n)

    def _linked(self, spans: _Entries) -> Tensor:
        """Whether each old tile and the next can share a list because the rules hide the other's keys.

        True if query positions ascend, the keys that only the next tile lists are in the future of the first,
        and the keys that only the first lists are too far in the past for the next. It is transitive, so it
        holds along a chain.
        """
        plan, list_, old = self.plan, self.old_list, self.old_tile
        if any(x is not None for x in (plan.k_end, plan.q_seg, plan.k_seg)):
            return torch.zeros(max(len(list_) - 1, 0), dtype=torch.bool, device=plan.device)
        number = self.number[spans.list_, spans.tile]
        pair = torch.cat([number, number - 1])
        second = torch.arange(2, device=pair.device).repeat_interleave(len(number))
        some = (pair >= 0) & (pair < len(list_) - 1)
        lo, hi = spans.lo.repeat(2)[some], spans.hi.repeat(2)[some]
        part, (cover, ahead) = _sweep(pair[some], lo, hi, plan.k_rows + 1, second[some])
        alone = cover == 1
        at, lo, hi, ahead = (x[alone] for x in (part.group, part.lo, part.hi, ahead == 1))
        k_low, k_high, ordered = self._k_positions(list_[at], lo, hi)
        q_low, q_high = self._q_positions()
        q_low, q_high = (x[list_, old] for x in (q_low, q_high))
        heads = plan.extent()[1]
        left, right, sink = plan.rules.band(list_[at] % self.heads * (heads // self.heads), heads)
        if plan.causal:
            future = k_low > q_high[at] - int(not plan.include_self)
        else:
            future = (k_low > q_high[at] + right) & (k_low >= sink)
        past = (q_low[at + 1] - k_high > left) & (k_low >= sink)
        fits = q_high[:-1] <= q_low[1:]
        fits[at[~(torch.where(ahead, future, past) & ordered)]] = False
        return fits

    def _q_positions(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest position of the staying queries of each old tile, [lists, R]."""
        plan = self.plan
        if plan.q_order is None:
            own = torch.arange(plan.Tq, device=plan.device).view(1, 1, -1)
        else:
            own = plan.q_order.long()
        own = laid_out(own, self.batch, self.heads)
        if plan.q_pos is not None:
            batch, heads = max(self.batch, plan.q_pos.shape[0]), math.lcm(self.heads, plan.q_pos.shape[1])
            if (batch, heads) != (self.batch, self.heads):  # lists are shared, positions not: no merging
                none = torch.zeros_like(self.stay)
                return none + FAR, none - FAR
            own = read(laid_out(plan.q_pos, batch, heads), own)
        else:
            offset = plan.q_offset
            if isinstance(offset, Tensor) and offset.numel() > 1 and self.batch == 1:
                low, high = (int(x) for x in torch.aminmax(offset))
                same = low == high
                offset = low if same else offset[:1]
                if not same:
                    none = torch.zeros_like(self.stay)
                    return none + FAR, none - FAR
            own = own + shift_of(offset, 2)
        own = own.reshape(self.batch * self.heads, -1)
        pad = (0, plan.tiles * plan.tile - plan.q_rows)
        real = torch.nn.functional.pad(self.token >= 0, pad, value=False).view(
            len(own), plan.tiles, plan.tile
        )
        own = torch.nn.functional.pad(own, pad).view(len(own), plan.tiles, plan.tile)
        return torch.where(real, own, FAR).amin(-1), torch.where(real, own, -FAR).amax(-1)

    def _k_positions(self, list_: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First and last position of ranges of key rows, and whether positions ascend within each range."""
        plan = self.plan
        if plan.k_order is None and plan.k_pos is None:
            return lo, hi - 1, torch.ones_like(lo, dtype=torch.bool)
        if plan.k_order is None:
            at = torch.arange(plan.Tk, device=plan.device).view(1, 1, -1)
        else:
            at = plan.k_order.long()
        at = laid_out(at, self.batch, self.heads)
        if plan.k_pos is not None:
            if (plan.k_pos.shape[0] > self.batch) or self.heads % plan.k_pos.shape[1]:
                return lo, hi, torch.zeros_like(lo, dtype=torch.bool)
            at = torch.where(at >= 0, read(laid_out(plan.k_pos, self.batch, self.heads), at), -FAR)
        at = torch.where(at >= 0, at, -FAR) if plan.k_pos is None else at
        at = at.reshape(self.batch * self.heads, -1)
        down = torch.zeros_like(at)
        down[:, 1:] = ((at[:, 1:] < at[:, :-1]) | (at[:, :-1] == -FAR)).long()
        down = down.cumsum(-1)
        ordered = (down[list_, lo] == down[list_, hi - 1]) & (at[list_, lo] > -FAR)
        return at[list_, lo], at[list_, hi - 1], ordered

    # ---------------------------------------------------------------- lists

    def fields(self) -> Fields:
        """Build all lists of the restricted plan."""
        made: Fields = dict.fromkeys((*LISTS, "spans", "index", "bits"))
        if self.keys.units is not None and self.units is not None:
            made |= self._of_units(self.units, self.keys.units)
            spans = [] if self.spans is None else [self.spans]
        else:
            spans = [x for x in (self.spans, self._as_ranges()) if x is not None]
        if spans:
            made |= self._of_spans(spans)
        return made

    def _as_ranges(self) -> _Entries | None:
        """The unit entries as ranges of key rows."""
        units, unit = self.units, self.plan.unit
        if units is None:
            return None
        lo, hi = units.lo * unit, ((units.lo + 1) * unit).clamp(max=self.plan.k_rows)
        return dataclasses.replace(units, lo=lo, hi=hi)

    def _of_spans(self, parts: list[_Entries]) -> Fields:
        """Unite the ranges of all old tiles that a new tile comes from; full only where all of them are."""
        columns = zip(*([getattr(x, f.name) for f in dataclasses.fields(x)] for x in parts), strict=True)
        e = _Entries(*(torch.cat(x) for x in columns))
        e = e.of(self.k_seen[e.list_, e.lo] < self.k_seen[e.list_, e.hi])
        lo, hi = (self.k_seen[e.list_, x] for x in (e.lo, e.hi))
        place = laid_out(self.keys.place, self.batch, self.heads).flatten(0, 1)
        n = hi - lo
        if len(n):
            lo, hi = place[e.list_, lo], place[e.list_, hi - 1] + 1
        full = e.full & (hi - lo == n)  # and no empty lane lies inside
        entry, group = self._spread(e)
        members = torch.zeros(self.batch * self.heads * self.R, dtype=torch.int64, device=lo.device)
        tile, nth = expand(self.high - self.low + 1)
        at = self.old_list[tile] * self.R + self.low[tile] + nth
        members.index_add_(0, at, torch.ones_like(at))
        part, (cover, sure) = _sweep(
            group, lo[entry], hi[entry], self.keys.order.shape[-1] + 1, full[entry].long()
        )
        seen = cover > 0
        part = part.of(seen)
        whole = sure[seen] == members[part.group]
        fresh = torch.ones_like(whole)
        fresh[1:] = (part.group[1:] != part.group[:-1]) | (part.lo[1:] != part.hi[:-1])
        fresh[1:] |= whole[1:] != whole[:-1]
        begin = fresh.nonzero()[:, 0]
        end = torch.cat([begin[1:], begin.new_full((1,), len(fresh))])[: len(begin)] - 1
        values = torch.stack([part.lo[begin], part.hi[end]], -1)
        return Spans.arranged(part.group[begin], whole[begin], values, self._shape)[0]

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.R

    def _of_units(self, units: _Entries, numbers: _Numbers) -> Fields:
        """Renumber the units and keep the bits of the rows and lanes that stay."""
        number, inside = (laid_out(x, self.batch, self.heads).flatten(0, 1) for x in numbers)
        e = units.of(inside[units.list_, units.lo] > 0)
        entry, cell = self._spread(e)
        e = e.of(entry)
        full = e.full & (inside[e.list_, e.lo] == self.keys.unit)
        made, order = Units.arranged(cell, full, number[e.list_, e.lo], self._shape)
        if self.plan.bits is None:
            return made
        order = order[~full[order]]
        made["bits_start"] = begins(made["count"].long() - made["full"].long())
        made["bits"] = self._bits(self.plan.bits, e.of(order), cell[order], numbers)
        return made

    def _bits(self, words: Tensor, e: _Entries, cell: Tensor, numbers: _Numbers) -> Tensor:
        """Gather the bits of partial units at the kept rows and lanes; units that were full get all ones."""
        plan, source = self.plan, e.hi
        if not len(e.lo):
            shape = (0, self.tile, -(-self.keys.unit // 32))
            return torch.zeros(shape, dtype=torch.int32, device=plan.device)
        bits = torch.cat([words, torch.full_like(words[:1], -1)])  # source -1 (was full) reads this last row
        row = self._row_of(cell)
        lane = self._lane_of(e, numbers.inside)
        if row is None and lane is None:
            return bits[source]
        done = []
        for at in range(0, len(source), max(1, CHUNK // (plan.tile * plan.unit))):
            part = slice(at, at + max(1, CHUNK // (plan.tile * plan.unit)))
            own = bits[source[part]]
            if row is not None:
                own = own.gather(1, row[part, :, None].expand(-1, -1, own.shape[-1]))
            if lane is not None:
                where = lane[part, None].expand(-1, self.tile, -1)
                own = pack_bits(bit(own.gather(2, where // 32), where))
            done.append(own)
        return torch.cat(done)

    def _row_of(self, cell: Tensor) -> Tensor | None:
        """For each row of the new tiles `cell`, its row in the old tile; None if rows do not move."""
        plan, tile = self.plan, self.tile
        if tile == plan.tile and int(self.stay.sum()) == self.stay.shape[0] * plan.q_rows:
            return None
        at = torch.zeros(len(self.stay), self.R * tile + 1, dtype=torch.int64, device=plan.device)
        own = (torch.arange(plan.q_rows, device=plan.device) % plan.tile).expand(len(self.stay), -1)
        at.scatter_(1, torch.where(self.token >= 0, self.place, self.R * tile), own)
        return at[:, :-1].reshape(-1, tile)[cell]

    def _lane_of(self, e: _Entries, inside: Tensor) -> Tensor | None:
        """For each entry and new lane, the old lane; None if lanes do not move."""
        plan, keys = self.plan, self.keys
        if keys.unit == plan.unit and bool(((inside == 0) | (inside == plan.unit)).all()):
            return None
        token = keys.rows.laid_out(self.batch, self.heads)[0]
        token = torch.nn.functional.pad(token, (0, -plan.k_rows % plan.unit), value=-1)
        left = token.view(len(token), -(-plan.k_rows // plan.unit), plan.unit)[e.list_, e.lo] >= 0
        return torch.argsort(~left, dim=-1, stable=True)[:, : keys.unit]


@dataclass(frozen=True)
class _Parts:
    """Segments `[lo, hi)`, each of one group."""

    group: Tensor
    lo: Tensor
    hi: Tensor

    def of(self, some: Tensor) -> _Parts:
        """Select segments by mask or index."""
        return _Parts(self.group[some], self.lo[some], self.hi[some])


def _sweep(
    group: Tensor, lo: Tensor, hi: Tensor, wide: int, mark: Tensor
) -> tuple[_Parts, tuple[Tensor, Tensor]]:
    """Split each group at all ends of its ranges; count the ranges, and sum their marks, on each segment."""
    own, at = group.repeat(2), torch.cat([lo, hi])
    order = torch.argsort(own * wide + at)
    own, at = own[order], at[order]
    change = torch.ones_like(lo)
    levels = [torch.cat([x, -x])[order].cumsum(0)[:-1] for x in (change, mark)]
    some = (own[1:] == own[:-1]) & (at[1:] > at[:-1])
    part = _Parts(own[:-1][some], at[:-1][some], at[1:][some])
    return part, (levels[0][some], levels[1][some])
