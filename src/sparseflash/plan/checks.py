"""Checks of a plan's values: nothing out of range, nothing listed twice, full entries really full."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import PlanError
from .entries import CELLS, Ranges, cells, fetch, lanes, query_tokens, ranges, read, real_rows
from .lists import Units
from .options import FAR, laid_out, shift_of
from .record import Record


def _fail(message: str) -> None:
    raise PlanError(message)


def check_order(order: Tensor | None, T: int, name: str) -> None:
    """Check that a row order names existing tokens, each at most once."""
    if order is None or not order.numel():
        return
    low, high = (int(x) for x in torch.aminmax(order))
    if low < -1 or high >= T:
        _fail(f"{name} holds {low}..{high}: tokens are 0..{T - 1}, -1 is an empty lane")
    lists = order.reshape(-1, order.shape[-1]).long()
    token = (lists + T * torch.arange(len(lists), device=order.device)[:, None])[lists >= 0]
    token = token.sort().values
    if bool((token[1:] == token[:-1]).any()):
        _fail(f"{name} names a token twice: an order is injective; use a tuple of plans for repeated tokens")


def check_values(plan: Record) -> None:
    """Check the range of every value, so that no kernel reads out of bounds; no loop over entries."""
    check_order(plan.q_order, plan.Tq, "q_order")
    check_order(plan.k_order, plan.Tk, "k_order")
    for lists in plan.lists():
        pool, names = lists.pool, lists.NAMES
        start, full, count = (x.flatten().long() for x in (lists.start, lists.full, lists.count))
        _bounds(start, full, count, len(pool), names)
        edge = torch.zeros(len(pool) + 1, dtype=torch.int64, device=pool.device)
        some = count > 0
        one = torch.ones_like(start[some])
        edge.index_add_(0, start[some], one).index_add_(0, (start + count)[some], -one)
        live = edge.cumsum(0)[:-1] > 0  # pool slots that no list owns may hold anything
        if isinstance(lists, Units):
            most = -(-plan.k_rows // plan.unit)
            bad, said = live & ((pool < 0) | (pool >= most)), f"unit numbers below {most}"
        else:
            lo, hi = lists.rows(pool)
            bad = live & ((lo < 0) | (hi < lo) | (hi > plan.k_rows))
            said = f"a range [lo, hi) with 0 <= lo <= hi <= {plan.k_rows} key rows"
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            _fail(f"{names['pool']}[{at}] = {pool[at].tolist()}: expected {said}")
        if isinstance(lists, Units) and lists.bits is not None:
            names = {"start": "bits_start", "full": "bits_full", "count": "bits_count", "pool": "bits"}
            start, part = lists.bits.start.flatten(), count - full
            _bounds(start, torch.zeros_like(part), part, len(lists.bits.words), names)


def _place(plan: Record, cell: int) -> str:
    heads = plan.extent()[1]
    return (
        f"tile {cell % plan.tiles} (batch {cell // plan.tiles // heads}, head {cell // plan.tiles % heads})"
    )


def surely_full(plan: Record, entries: Ranges) -> Tensor:
    """True for entries whose extreme positions prove that the rules hide nothing; False is undecided."""
    if any(x is not None for x in (plan.k_end, plan.q_seg, plan.k_seg)):
        return torch.zeros_like(entries.full)
    batch, heads = plan.extent()
    token = query_tokens(plan)
    shift = shift_of(plan.q_offset, 3)
    if plan.q_pos is None:
        q = token.long() + shift
    else:
        q = read(laid_out(plan.q_pos, batch, heads), token.flatten(2).long()).view(token.shape)
    q_low = torch.where(token >= 0, q, FAR).amin(-1).flatten()[entries.cell]
    q_high = torch.where(token >= 0, q, -FAR).amax(-1).flatten()[entries.cell]
    if plan.k_order is None and plan.k_pos is None:
        k_low, k_high = entries.lo, entries.hi - 1
    else:
        k_low, k_high = torch.full_like(entries.lo, FAR), torch.full_like(entries.lo, -FAR)
        for entry, _, b, h, key in lanes(plan, entries, CELLS):
            position = key if plan.k_pos is None else fetch(plan.k_pos, b, h, key, heads)
            hole = key < 0
            k_low.scatter_reduce_(0, entry, torch.where(hole, -FAR, position), "amin")
            k_high.scatter_reduce_(0, entry, torch.where(hole, FAR, position), "amax")
    sure = (k_low > -FAR) & (k_high < FAR)
    if plan.causal:
        sure = sure & ((q_low >= k_high) if plan.include_self else (q_low > k_high))
    elif not plan.include_self:
        sure = sure & ((q_low > k_high) | (q_high < k_low))
    if plan.window is not None or plan.head_window is not None:
        left, right, sink = plan.rules.band(entries.cell // plan.tiles % heads, heads)
        inside = (q_high - k_low <= left) & (k_high - q_low <= right)
        sure = sure & (inside | (k_high < sink))
    return sure | (q_high == -FAR)  # a tile without a real row


def _bounds(start: Tensor, full: Tensor, count: Tensor, size: int, names: dict[str, str]) -> None:
    """Check that lists lie inside their pool of `size` entries; `names` are the field names in the plan."""
    if bool(((full < 0) | (full > count)).any()):
        at = int(((full < 0) | (full > count)).nonzero()[0])
        said = f"{names['full']} = {int(full[at])} of {names['count']} = {int(count[at])}"
        _fail(f"{said}: expected 0 <= full <= count")
    bad = (count > 0) & ((start < 0) | (start > size - count))  # start + count could wrap
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        what = f"{names['start']} = {int(start[at])} with {int(count[at])} entries"
        _fail(f"{what} runs past {names['pool']}, which has {size}")


def check(plan: Record) -> None:
    """Run `check_values`, and check that a tile's entries are disjoint and full ones really full."""
    check_values(plan)
    if plan.overflow is not None and bool(plan.overflow):
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
    doubt = doubt.of(~surely_full(plan, doubt))
    for part in cells(plan, doubt):
        owner = doubt.cell[part.entry]
        hidden = real[owner] & ~part.keep
        if bool(hidden.any()):
            at = int(hidden.any(-1).nonzero()[0])
            _fail(
                f"{_place(plan, int(owner[at]))}: an entry marked full covers key {int(part.k_token[at])}, "
                "which the rules hide from a query of the tile; count it as partial"
            )
