"""What can be read off a plan's lists: the keys of one tile, figures, checks, the transpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PlanError
from .build import spread_heads, unpack_bits

if TYPE_CHECKING:
    from .core import KeyLists, Plan

ANY, NONE = -1, -2
KEY_GROUP = 128


@dataclass(frozen=True)
class TileView:
    """The keys that one tile visits, for every (batch, head): tokens, and what each row sees of them.

    q_token [B,H,tile] and k_token [B,H,n] are token numbers (-1: no token); keep [B,H,tile,n]; entry [B,H,n] is
    the place of a key's entry in the tile's lists, spans before units (-1: no key).
    """

    q_token: Tensor
    k_token: Tensor
    k_row: Tensor
    keep: Tensor
    entry: Tensor


def _at(x: Tensor, batch: int, heads: int) -> Tensor:
    return spread_heads(x, heads).expand(batch, -1, *x.shape[2:])


def _entries(plan: Plan, r: int, batch: int, heads: int) -> tuple[Tensor, ...]:
    """Entries of tile r as ranges: lo, hi, bits row (-1: none), place in the lists, each [B,H,m]; rest empty."""
    parts = []
    before: Tensor | int = 0
    if plan.spans is not None:
        start, count = (_at(x[..., r], batch, heads) for x in (plan.span_start, plan.span_count))
        slot = torch.arange(int(count.max()) if count.numel() else 0, device=count.device)
        live = slot < count[..., None]
        pair = plan.spans[torch.where(live, start[..., None] + slot, 0)].long() if len(plan.spans) else None
        if pair is not None and slot.numel():
            lo, hi = (torch.where(live, x, 0) for x in pair.unbind(-1))
            parts.append((lo, hi, torch.full_like(lo, -1), slot.expand_as(lo)))
        before = count[..., None].long()
    if plan.index is not None and len(plan.index):
        start, full, count = (_at(x[..., r], batch, heads) for x in (plan.start, plan.full, plan.count))
        slot = torch.arange(int(count.max()) if count.numel() else 0, device=count.device)
        live = slot < count[..., None]
        unit = plan.index[torch.where(live, start[..., None] + slot, 0)].long()
        lo = torch.where(live, unit * plan.unit, 0)
        hi = torch.where(live, ((unit + 1) * plan.unit).clamp(max=plan.k_rows), 0)
        is_full = slot < full[..., None]
        if plan.bits is None:
            row = torch.full_like(lo, -1)
        else:
            first = _at(plan.bits_start[..., r], batch, heads)[..., None]
            row = torch.where(live & ~is_full, first + slot - full[..., None], -1)
        parts.append((lo, hi, row, before + slot.expand_as(lo)))
    if not parts:
        none = torch.zeros(batch, heads, 0, dtype=torch.int64, device=plan.device)
        return none, none, none, none
    return tuple(torch.cat(x, -1) for x in zip(*parts, strict=True))


def tile_view(plan: Plan, r: int, batch: int, heads: int) -> TileView:
    """Everything tile r sees, by the formula, with the work and memory of what it visits."""
    device = plan.device
    lo, hi, bits_row, place = _entries(plan, r, batch, heads)
    size = hi - lo
    flat = size.flatten()
    entry = torch.repeat_interleave(torch.arange(flat.numel(), device=device), flat)
    inside = torch.arange(entry.numel(), device=device) - (flat.cumsum(0) - flat)[entry]
    total = size.sum(-1).flatten()
    n = int(total.max()) if total.numel() else 0
    owner = entry // max(size.shape[-1], 1)
    column = torch.arange(entry.numel(), device=device) - (total.cumsum(0) - total)[owner]
    k_row = torch.full((batch * heads, n), -1, dtype=torch.int64, device=device)
    k_row[owner, column] = lo.flatten()[entry] + inside
    listed = torch.full_like(k_row, -1)
    listed[owner, column] = place.flatten()[entry]
    k_row, listed = k_row.view(batch, heads, n), listed.view(batch, heads, n)

    row = torch.arange(r * plan.tile, min((r + 1) * plan.tile, plan.q_rows), device=device)
    if plan.q_order is None:
        q_token = row.expand(batch, heads, -1)
    else:
        q_token = _at(plan.q_order[..., row], batch, heads).long()
    covered = k_row >= 0
    safe = k_row.clamp(min=0)
    if plan.k_order is None:
        k_token = k_row
    else:
        k_token = torch.where(covered, _at(plan.k_order, batch, heads).gather(-1, safe).long(), -1)
    keep = visible(plan, q_token, k_token)
    if plan.bits is not None and len(plan.bits):
        bit_row = torch.full((batch * heads, n), -1, dtype=torch.int64, device=device)
        bit_row[owner, column] = bits_row.flatten()[entry]
        lane = torch.zeros((batch * heads, n), dtype=torch.int64, device=device)
        lane[owner, column] = torch.where(
            bits_row.flatten()[entry] >= 0, inside, 0
        )  # a span may be longer than bits
        bit_row, lane = bit_row.view(batch, heads, n), lane.view(batch, heads, n)
        words = plan.bits[bit_row.clamp(min=0), :, lane // 32][..., : q_token.shape[-1]].transpose(-1, -2)
        keep = keep & ((((words >> (lane % 32)[..., None, :]) & 1) != 0) | (bit_row < 0)[..., None, :])
    keep = keep & covered[..., None, :]
    return TileView(q_token, k_token, k_row, keep, listed)


def visible(plan: Plan, q_token: Tensor, k_token: Tensor) -> Tensor:
    """The formula of visibility, for tokens q [B,H,m] and k [B,H,n] (-1 is no token): bool [B,H,m,n]."""
    batch, heads = q_token.shape[:2]

    def q(x: Tensor) -> Tensor:
        return _read(_at(x, batch, heads), q_token)[..., :, None]

    def k(x: Tensor) -> Tensor:
        return _read(_at(x, batch, heads), k_token)[..., None, :]

    shift = plan.q_offset.long().reshape(-1, 1, 1, 1) if isinstance(plan.q_offset, Tensor) else plan.q_offset
    return _formula(plan, q_token[..., :, None], k_token[..., None, :], shift, q, k)


def _read(x: Tensor, token: Tensor) -> Tensor:
    if not x.shape[-1]:  # no tokens: all lanes are empty
        return torch.zeros_like(token)
    return x.gather(-1, token.clamp(min=0)).long()


def _formula(
    plan: Plan,
    q_token: Tensor,
    k_token: Tensor,
    shift: Tensor | int,
    of_q: Callable[[Tensor], Tensor],
    of_k: Callable[[Tensor], Tensor],
) -> Tensor:
    """The one formula, for tokens that broadcast; `of_q` and `of_k` read a token tensor at them."""
    keep = (q_token >= 0) & (k_token >= 0)
    q = q_token + shift if plan.q_pos is None else of_q(plan.q_pos)
    k = k_token if plan.k_pos is None else of_k(plan.k_pos)
    if plan.causal:
        keep = keep & ((q >= k) if plan.include_self else (q > k))
    elif not plan.include_self:
        keep = keep & (q != k)
    if plan.window is not None:
        left, right = plan.window
        outside = k >= plan.sink
        if left is not None and right is not None:
            outside = outside & ((q - k > left) | (k - q > right))
        else:
            outside = outside & ((k - q > right) if left is None else (q - k > left))  # type: ignore[operator]
        keep = keep & ~outside
    if plan.head_window is not None:
        left, right, sink = (of_k(x) for x in _head_rules(plan))
        outside = (left >= 0) & (q - k > left) | (right >= 0) & (k - q > right)
        keep = keep & ~(outside & (k >= sink))
    if plan.k_end is not None:
        keep = keep & (q < of_k(plan.k_end))
    if plan.q_seg is not None or plan.k_seg is not None:
        blank = torch.full((), ANY, dtype=torch.int64, device=q_token.device)
        a = blank if plan.q_seg is None else of_q(plan.q_seg)
        b = blank if plan.k_seg is None else of_k(plan.k_seg)
        keep = keep & (a != NONE) & (b != NONE) & ((a == b) | (a == ANY) | (b == ANY))
    return keep


def _head_rules(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Left, right and sink of each head, laid out like key tokens: [1,H,Tk] without memory of their own."""
    pair, sink = plan.head_window, plan.head_sink
    assert pair is not None
    last = torch.zeros_like(pair[..., :1]) if sink is None else sink
    return tuple(x.expand(-1, -1, plan.Tk) for x in (pair[..., :1], pair[..., 1:], last))  # type: ignore[return-value]


# ---------------------------------------------------------------- all entries at once

CELLS = 1 << 22
"""Pairs of query and key that are looked at in one go."""


@dataclass(frozen=True)
class Ranges:
    """Every listed range of every (batch, head, tile), flattened: `[lo, hi)` in key rows.

    `cell` numbers the tiles through [B,H,R]; `bits` is a row of the plan's bits, -1 for none; `ragged` marks
    units that the end of the keys cuts off.
    """

    cell: Tensor
    lo: Tensor
    hi: Tensor
    full: Tensor
    bits: Tensor
    ragged: Tensor

    def of(self, which: Tensor) -> Ranges:
        """Some of them."""
        return Ranges(*(getattr(self, f.name)[which] for f in dataclasses.fields(self)))


def ranges(plan: Plan) -> Ranges:
    """All entries of a plan, spans and units."""
    batch, heads = plan.extent()
    parts = []
    for pre, pool in (("span_", plan.spans), ("", plan.index)):
        if pool is None:
            continue
        start, full, count = (
            _at(getattr(plan, pre + n), batch, heads).reshape(-1).long() for n in ("start", "full", "count")
        )
        cell = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
        slot = torch.arange(cell.numel(), device=cell.device) - (count.cumsum(0) - count)[cell]
        is_full, entry = slot < full[cell], pool[start[cell] + slot].long()
        bits, ragged = torch.full_like(cell, -1), torch.zeros_like(is_full)
        if pre:
            lo, hi = entry.unbind(-1)
        else:
            lo, hi = entry * plan.unit, (entry + 1) * plan.unit
            ragged, hi = hi > plan.k_rows, hi.clamp(max=plan.k_rows)
            if plan.bits is not None:
                first = _at(plan.bits_start, batch, heads).reshape(-1)
                bits = torch.where(is_full, -1, first[cell] + slot - full[cell])
        parts.append((cell, lo, hi, is_full, bits, ragged))
    return Ranges(*(torch.cat(x) for x in zip(*parts, strict=True)))


def query_tokens(plan: Plan) -> Tensor:
    """Token of each row of each tile, -1 where there is none: [B,H,R,tile]."""
    batch, heads = plan.extent()
    if plan.q_order is None:
        rows = torch.arange(plan.Tq, dtype=torch.int32, device=plan.device).view(1, 1, -1)
    else:
        rows = plan.q_order
    rows = torch.nn.functional.pad(rows, (0, plan.tiles * plan.tile - plan.q_rows), value=-1)
    return _at(rows, batch, heads).reshape(batch, heads, plan.tiles, plan.tile)


@dataclass(frozen=True)
class Cells:
    """Lanes of some entries against the rows of their tiles: entry and key token [n], keep [n, tile]."""

    entry: Tensor
    batch: Tensor
    head: Tensor
    k_row: Tensor
    q_token: Tensor
    k_token: Tensor
    keep: Tensor


def _lanes(plan: Plan, entries: Ranges, step: int) -> Iterator[tuple[Tensor, ...]]:
    """Entry, place inside it, batch, head and token of every covered key row, `step` of them at a time."""
    heads = plan.extent()[1]
    size = entries.hi - entries.lo
    ends = size.cumsum(0)
    lanes = int(ends[-1]) if len(ends) else 0
    for begin in range(0, lanes, step):
        lane = torch.arange(begin, min(begin + step, lanes), device=ends.device)
        entry = torch.searchsorted(ends, lane, right=True)
        inside = lane - (ends - size)[entry]
        cell = entries.cell[entry]
        b, h = cell // plan.tiles // heads, cell // plan.tiles % heads
        token = entries.lo[entry] + inside
        if plan.k_order is not None:
            token = _fetch(plan.k_order, b, h, token, heads)
        yield entry, inside, b, h, token


def _fetch(x: Tensor, b: Tensor, h: Tensor, at: Tensor, heads: int) -> Tensor:
    """x [B|1,H',T] at (batch, head, place), int64; places below 0 read anything."""
    if not x.shape[-1]:
        return torch.zeros_like(at)
    return x[b if x.shape[0] > 1 else torch.zeros_like(b), h * x.shape[1] // heads, at.clamp(min=0)].long()


def cells(plan: Plan, entries: Ranges) -> Iterator[Cells]:
    """Evaluate the formula on everything that entries cover, CELLS pairs at a time."""
    heads = plan.extent()[1]
    q_tokens = query_tokens(plan).reshape(-1, plan.tile)
    for entry, inside, b, h, k_token in _lanes(plan, entries, max(1, CELLS // plan.tile)):
        q_token = q_tokens[entries.cell[entry]].long()
        shift: Tensor | int = plan.q_offset
        if isinstance(plan.q_offset, Tensor):
            each = plan.q_offset.long().reshape(-1)
            shift = each[b if each.numel() > 1 else torch.zeros_like(b)][:, None]
        rows, keys = (
            (b[:, None], h[:, None], q_token, heads),
            (b[:, None], h[:, None], k_token[:, None], heads),
        )
        keep = _formula(
            plan,
            q_token,
            k_token[:, None],
            shift,
            lambda x, rows=rows: _fetch(x, *rows),
            lambda x, keys=keys: _fetch(x, *keys),
        )
        if plan.bits is not None and len(plan.bits):
            row = entries.bits[entry]
            within = torch.where(row >= 0, inside, 0)
            words = plan.bits[row.clamp(min=0), :, within // 32]
            keep = keep & ((((words >> (within % 32)[:, None]) & 1) != 0) | (row < 0)[:, None])
        yield Cells(entry, b, h, entries.lo[entry] + inside, q_token, k_token, keep)


def _inverse(order: Tensor, T: int) -> Tensor:
    """Row of each token, -1 for a dropped one."""
    row = torch.full((T + 1,), -1, dtype=torch.int64, device=order.device)
    row[torch.where(order >= 0, order, T).long()] = torch.arange(len(order), device=order.device)
    return row[:T]


def sees(plan: Plan, q: Tensor, k: Tensor, *, batch: int = 0, head: int = 0) -> Tensor:
    """Whether each of some query tokens sees each of some key tokens: bool [len(q), len(k)].

    Looked up, pair by pair: linear in the lists and the pairs, not in the area.
    """
    heads = plan.extent()[1]

    def own(x: Tensor) -> Tensor:
        return x[batch if x.shape[0] > 1 else 0, head * x.shape[1] // heads]

    q_row = q if plan.q_order is None else _inverse(own(plan.q_order), plan.Tq)[q]
    k_row = k if plan.k_order is None else _inverse(own(plan.k_order), plan.Tk)[k]
    entries = ranges(plan)
    entries = entries.of((entries.cell // plan.tiles == batch * heads + head) & (entries.hi > entries.lo))
    tile = entries.cell % plan.tiles
    wide = plan.k_rows + 1
    place = torch.argsort(tile * wide + entries.lo)
    entries, tile = entries.of(place), tile[place]
    keep = torch.zeros(len(q), len(k), dtype=torch.bool, device=plan.device)
    if not len(tile) or not keep.numel():
        return keep
    # the last range of the query's tile that begins at or before the key
    want = (q_row // plan.tile)[:, None] * wide + k_row
    entry = torch.searchsorted(tile * wide + entries.lo, want, right=True) - 1
    known = entry.clamp(min=0)
    keep = (entry >= 0) & (tile[known] == (q_row // plan.tile)[:, None]) & (k_row < entries.hi[known])
    keep = keep & (q_row >= 0)[:, None] & (k_row >= 0)
    shift: Tensor | int = plan.q_offset
    if isinstance(plan.q_offset, Tensor):
        each = plan.q_offset.long().reshape(-1)
        shift = each[batch if each.numel() > 1 else 0]
    keep = keep & _formula(
        plan,
        q[:, None],
        k[None],
        shift,
        lambda x: own(x)[q].long()[:, None],
        lambda x: own(x)[k].long()[None],
    )
    if plan.bits is not None and len(plan.bits):
        row = entries.bits[known]
        lane = torch.where(row >= 0, k_row - entries.lo[known], 0).clamp(0, plan.unit - 1)
        row_in_tile = (q_row.clamp(min=0) % plan.tile)[:, None]
        word = plan.bits[row.clamp(min=0), row_in_tile, lane // 32]
        keep = keep & ((((word >> (lane % 32)) & 1) != 0) | (row < 0))
    return keep


def real_rows(plan: Plan) -> Tensor:
    """Rows of [B,H,R,tile] that hold a real token: bool."""
    token = query_tokens(plan)
    real = token >= 0
    if plan.q_seg is not None and plan.Tq:
        batch, heads = plan.extent()
        label = _read(_at(plan.q_seg, batch, heads), token.reshape(batch, heads, -1).long())
        real = real & (label != NONE).view(real.shape)
    return real


def to_dense(plan: Plan) -> Tensor:
    """The mask, bool [B,H,Tq,Tk]."""
    mask = torch.zeros(*plan.extent(), plan.Tq, plan.Tk, dtype=torch.bool, device=plan.device)
    for part in cells(plan, ranges(plan)):
        lane, row = part.keep.nonzero(as_tuple=True)
        mask[part.batch[lane], part.head[lane], part.q_token[lane, row], part.k_token[lane]] = True
    return mask


def visible_pairs(plan: Plan) -> int:
    """Number of visible (query, key) pairs: full entries are counted, partial ones evaluated."""
    entries = ranges(plan)
    rows = real_rows(plan).flatten(0, 2).sum(-1)
    sure = ((entries.hi - entries.lo) * rows[entries.cell])[entries.full].sum()
    return int(sure) + sum(int(part.keep.sum()) for part in cells(plan, entries.of(~entries.full)))


def partial_area(plan: Plan) -> int:
    """Pairs in partial entries: what `visible_pairs` has to evaluate."""
    entries = ranges(plan)
    return int(((entries.hi - entries.lo) * ~entries.full).sum()) * plan.tile


def visited_area(plan: Plan) -> int:
    """Tile rows x listed keys, over all tiles."""
    entries = ranges(plan)
    rows = (plan.q_rows - entries.cell % max(plan.tiles, 1) * plan.tile).clamp(max=plan.tile)
    return int(((entries.hi - entries.lo) * rows).sum())


def dense_pairs(plan: Plan) -> int:
    """Pairs that causality and the window alone allow, over all batches and heads."""
    batch, heads = plan.extent()
    device = plan.device
    if plan.q_pos is not None:
        q = _at(plan.q_pos, batch, heads).long()
    else:
        shift = plan.q_offset.long().reshape(-1, 1, 1) if isinstance(plan.q_offset, Tensor) else plan.q_offset
        q = (torch.arange(plan.Tq, device=device) + torch.as_tensor(shift, device=device)).expand(
            batch, heads, -1
        )
    if plan.k_pos is not None:
        k = _at(plan.k_pos, batch, heads).long().sort(-1).values
    else:
        k = torch.arange(plan.Tk, device=device).expand(batch, heads, -1)
    q, k = q.contiguous(), k.contiguous()

    def below(x: Tensor) -> Tensor:
        """How many keys sit at positions below x."""
        return torch.searchsorted(k, x.contiguous())

    past = below(q + int(plan.include_self)) if plan.causal else torch.full_like(q, plan.Tk)
    left: Any
    right: Any
    left, right = plan.window or (None, None)
    sinks: Any = plan.sink
    if plan.head_window is not None:
        table = _at(plan.head_window, batch, heads).long()
        left, right = (torch.where(x < 0, 1 << 40, x) for x in (table[..., :1], table[..., 1:]))
        sinks = 0 if plan.head_sink is None else _at(plan.head_sink, batch, heads).long()
    lo = torch.zeros_like(q) if left is None else below(q - left)
    hi = torch.full_like(q, plan.Tk) if right is None else below(q + right + 1)
    lo, hi = torch.minimum(lo, past), torch.minimum(hi, past)
    pairs = hi - lo
    if (plan.window is not None and plan.sink) or plan.head_sink is not None:  # before and behind the window
        sink = torch.minimum(below(torch.zeros_like(q) + sinks), past)
        pairs = pairs + torch.minimum(sink, lo) + (sink - hi).clamp(min=0)
    if not plan.causal and not plan.include_self:
        pairs = pairs - (below(q + 1) - below(q))
    return int(pairs.sum())


# ---------------------------------------------------------------- checks


def _fail(message: str) -> None:
    raise PlanError(message)


def check_values(plan: Plan) -> None:
    """Ranges of all values, so that no kernel reads out of bounds; linear in the lists, no loop."""
    for name, T in (("q_order", plan.Tq), ("k_order", plan.Tk)):
        order = getattr(plan, name)
        if order is None or not order.numel():
            continue
        low, high = (int(x) for x in torch.aminmax(order))
        if low < -1 or high >= T:
            _fail(f"{name} holds {low}..{high}: tokens are 0..{T - 1}, -1 is an empty lane")
        lists = order.reshape(-1, order.shape[-1]).long()
        token = (lists + T * torch.arange(len(lists), device=order.device)[:, None])[lists >= 0]
        if token.numel() and int(torch.bincount(token).max()) > 1:
            _fail(
                f"{name} names a token twice: an order is injective; use a tuple of plans for repeated tokens"
            )
    for pre, pool, of in (("span_", plan.spans, "spans"), ("", plan.index, "index")):
        if pool is None:
            continue
        start, full, count = (getattr(plan, pre + n).flatten().long() for n in ("start", "full", "count"))
        _bounds(start, full, count, len(pool), pre, of)
        edge = torch.zeros(len(pool) + 1, dtype=torch.int64, device=pool.device)
        some = count > 0
        one = torch.ones_like(start[some])
        edge.index_add_(0, start[some], one).index_add_(0, (start + count)[some], -one)
        live = edge.cumsum(0)[:-1] > 0  # entries that no list reaches may hold anything
        if pre:
            lo, hi = pool.unbind(-1)
            bad = live & ((lo < 0) | (hi < lo) | (hi > plan.k_rows))
            said = "a range [lo, hi) with 0 <= lo <= hi <= {} key rows"
            most = plan.k_rows
        else:
            most = -(-plan.k_rows // plan.unit)
            bad, said = live & ((pool < 0) | (pool >= most)), "unit numbers below {}"
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            _fail(f"{of}[{at}] = {pool[at].tolist()}: expected {said.format(most)}")
    if plan.bits is not None:
        assert plan.count is not None and plan.full is not None and plan.bits_start is not None
        part = (plan.count - plan.full).flatten().long()
        _bounds(plan.bits_start.flatten(), torch.zeros_like(part), part, len(plan.bits), "bits_", "bits")


def _place(plan: Plan, cell: int) -> str:
    heads = plan.extent()[1]
    return (
        f"tile {cell % plan.tiles} (batch {cell // plan.tiles // heads}, head {cell // plan.tiles % heads})"
    )


def _surely_full(plan: Plan, entries: Ranges) -> Tensor:
    """Entries whose extreme positions alone show that the rules hide nothing; others need a look inside."""
    if any(x is not None for x in (plan.k_end, plan.q_seg, plan.k_seg, plan.head_window)):
        return torch.zeros_like(entries.full)
    batch, heads = plan.extent()
    token = query_tokens(plan)
    shift = plan.q_offset.long().reshape(-1, 1, 1, 1) if isinstance(plan.q_offset, Tensor) else plan.q_offset
    if plan.q_pos is None:
        q = token.long() + shift
    else:
        q = _read(_at(plan.q_pos, batch, heads), token.reshape(batch, heads, -1).long()).view(token.shape)
    far = 1 << 40
    q_low = torch.where(token >= 0, q, far).amin(-1).flatten()[entries.cell]
    q_high = torch.where(token >= 0, q, -far).amax(-1).flatten()[entries.cell]
    if plan.k_order is None and plan.k_pos is None:
        k_low, k_high = entries.lo, entries.hi - 1
    else:
        k_low, k_high = torch.full_like(entries.lo, far), torch.full_like(entries.lo, -far)
        for entry, _, b, h, key in _lanes(plan, entries, CELLS):
            position = key if plan.k_pos is None else _fetch(plan.k_pos, b, h, key, heads)
            hole = key < 0
            k_low.scatter_reduce_(0, entry, torch.where(hole, -far, position), "amin")
            k_high.scatter_reduce_(0, entry, torch.where(hole, far, position), "amax")
    sure = (k_low > -far) & (k_high < far)
    if plan.causal:
        sure = sure & ((q_low >= k_high) if plan.include_self else (q_low > k_high))
    elif not plan.include_self:
        sure = sure & ((q_low > k_high) | (q_high < k_low))
    if plan.window is not None:
        left, right = plan.window
        inside = torch.ones_like(sure)
        if left is not None:
            inside = inside & (q_high - k_low <= left)
        if right is not None:
            inside = inside & (k_high - q_low <= right)
        sure = sure & (inside | (k_high < plan.sink))
    return sure | (q_high == -far)  # a tile without a real row


def _bounds(start: Tensor, full: Tensor, count: Tensor, size: int, pre: str, of: str) -> None:
    if bool(((full < 0) | (full > count)).any()):
        at = int(((full < 0) | (full > count)).nonzero()[0])
        _fail(f"{pre}full = {int(full[at])} of {pre}count = {int(count[at])}: expected 0 <= full <= count")
    bad = (count > 0) & ((start < 0) | (start + count > size))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        what = f"{pre}start = {int(start[at])} with {int(count[at])} entries"
        _fail(f"{what} runs past {of}, which has {size}")


def check(plan: Plan) -> None:
    """`check_values`, and that the entries of a tile are disjoint and the full ones really full."""
    check_values(plan)
    if plan.overflow is not None and bool(plan.overflow.any()):
        _fail("lists of a static capacity overflowed: entries were dropped; raise the capacity")
    entries = ranges(plan)
    entries = entries.of(entries.hi > entries.lo)
    by_place = torch.argsort(entries.cell * (plan.k_rows + 1) + entries.lo)
    cell, lo, hi = (x[by_place] for x in (entries.cell, entries.lo, entries.hi))
    twice = (cell[1:] == cell[:-1]) & (lo[1:] < hi[:-1])
    if bool(twice.any()):
        at = int(twice.nonzero()[0])
        _fail(
            f"{_place(plan, int(cell[at]))} lists key row {int(lo[at + 1])} twice, in [{int(lo[at])}, "
            f"{int(hi[at])}) and [{int(lo[at + 1])}, {int(hi[at + 1])}): the entries of a tile are disjoint"
        )
    real = real_rows(plan).flatten(0, 2)
    cut = entries.cell[entries.full & entries.ragged]
    cut = cut[real[cut].any(-1)]
    if len(cut):
        _fail(
            f"{_place(plan, int(cut[0]))}: the last unit is cut by the end of the keys: count it as partial"
        )
    doubt = entries.of(entries.full)
    doubt = doubt.of(~_surely_full(plan, doubt))
    for part in cells(plan, doubt):
        owner = doubt.cell[part.entry]
        hidden = real[owner] & ~part.keep
        if bool(hidden.any()):
            at = int(hidden.any(-1).nonzero()[0])
            _fail(
                f"{_place(plan, int(owner[at]))}: an entry marked full covers key {int(part.k_token[at])}, "
                "which the rules hide from a query of the tile; count it as partial"
            )


def _owners(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(row number, entry number) of every listed entry, rows numbered through [B,H,R]."""
    flat = count.flatten().long()
    row = torch.repeat_interleave(torch.arange(flat.numel(), device=flat.device), flat)
    inside = torch.arange(row.numel(), device=flat.device) - (flat.cumsum(0) - flat)[row]
    return row, start.flatten()[row] + inside


def _transpose(
    plan: Plan,
    shape: torch.Size,
    row: Tensor,
    column: Tensor,
    full: Tensor,
    source: Tensor,
    columns: int,
    group: int,
) -> KeyLists:
    from .core import KeyLists

    R = shape[-1]
    cell = row // R * columns + column
    key = (cell * 2 + (~full).long()) * R + row % R
    order = torch.argsort(key)
    cells = shape[0] * shape[1] * columns
    count = torch.bincount(cell, minlength=cells)
    n_full = torch.bincount(cell[full], minlength=cells)
    lead = (shape[0], shape[1], columns)
    return KeyLists(
        start=(count.cumsum(0) - count).view(lead),
        count=count.int().view(lead),
        full=n_full.int().view(lead),
        index=(row % R)[order].int(),
        source=source[order],
        group=group,
    )


def transpose_spans(plan: Plan) -> KeyLists:
    """For each group of KEY_GROUP key rows, the tiles whose spans touch it (partial where a span cuts it)."""
    row, source = _owners(plan.span_start, plan.span_count)
    local_full = plan.span_full.flatten().long()[row]
    first_of_row = (plan.span_start.flatten())[row]
    is_full = source - first_of_row < local_full
    lo, hi = plan.spans[source].long().unbind(-1)
    alive = hi > lo
    row, source, is_full, lo, hi = (x[alive] for x in (row, source, is_full, lo, hi))
    c0, c1 = lo // KEY_GROUP, (hi - 1) // KEY_GROUP + 1
    n = c1 - c0
    pick = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
    column = c0[pick] + torch.arange(pick.numel(), device=n.device) - (n.cumsum(0) - n)[pick]
    row, source, lo, hi = row[pick], source[pick], lo[pick], hi[pick]
    columns = -(-plan.k_rows // KEY_GROUP)
    edge = ((column + 1) * KEY_GROUP).clamp(max=plan.k_rows)
    whole = is_full[pick] & (lo <= column * KEY_GROUP) & (hi >= edge)
    return _transpose(plan, plan.span_count.shape, row, column, whole, source, columns, KEY_GROUP)


def transpose_units(plan: Plan) -> KeyLists:
    """For each unit, the tiles that list it."""
    row, source = _owners(plan.start, plan.count)
    is_full = source - plan.start.flatten()[row] < plan.full.flatten().long()[row]
    columns = -(-plan.k_rows // plan.unit)
    return _transpose(
        plan, plan.count.shape, row, plan.index[source].long(), is_full, source, columns, plan.unit
    )


def unpack(plan: Plan) -> Tensor:
    """The bits of a plan's partial units as bool [Nb, tile, unit]."""
    return unpack_bits(plan.bits, plan.unit)
