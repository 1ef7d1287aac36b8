"""What can be read off a plan's lists: the keys of one tile, figures, checks, the transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    q_token [B,H,tile] and k_token [B,H,n] are token numbers (-1: no token); keep [B,H,tile,n].
    """

    q_token: Tensor
    k_token: Tensor
    k_row: Tensor
    keep: Tensor
    covered: Tensor


def _at(x: Tensor, batch: int, heads: int) -> Tensor:
    return spread_heads(x, heads).expand(batch, -1, *x.shape[2:])


def _entries(plan: Plan, r: int, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries of tile r as ranges: lo, hi, is_full, bits row (-1: none), each [B,H,m]; unused ones are empty."""
    parts = []
    if plan.spans is not None:
        start, full, count = (_at(x[..., r], batch, heads) for x in (plan.span_start, plan.span_full, plan.span_count))
        slot = torch.arange(int(count.max()) if count.numel() else 0, device=count.device)
        live = slot < count[..., None]
        pair = plan.spans[torch.where(live, start[..., None] + slot, 0)].long() if len(plan.spans) else None
        if pair is not None and slot.numel():
            lo, hi = (torch.where(live, x, 0) for x in pair.unbind(-1))
            parts.append((lo, hi, slot < full[..., None], torch.full_like(lo, -1)))
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
        parts.append((lo, hi, is_full, row))
    if not parts:
        none = torch.zeros(batch, heads, 0, dtype=torch.int64, device=plan.device)
        return none, none, none.bool(), none
    return tuple(torch.cat(x, -1) for x in zip(*parts, strict=True))  # type: ignore[return-value]


def tile_view(plan: Plan, r: int, batch: int, heads: int) -> TileView:
    """Everything tile r sees, by the formula, with the work and memory of what it visits."""
    device = plan.device
    lo, hi, is_full, bits_row = _entries(plan, r, batch, heads)
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
    sure = torch.zeros((batch * heads, n), dtype=torch.bool, device=device)
    sure[owner, column] = is_full.flatten()[entry]
    k_row, sure = k_row.view(batch, heads, n), sure.view(batch, heads, n)

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
        lane[owner, column] = torch.where(bits_row.flatten()[entry] >= 0, inside, 0)  # a span may be longer than bits
        bit_row, lane = bit_row.view(batch, heads, n), lane.view(batch, heads, n)
        words = plan.bits[bit_row.clamp(min=0), :, lane // 32][..., : q_token.shape[-1]].transpose(-1, -2)
        keep = keep & ((((words >> (lane % 32)[..., None, :]) & 1) != 0) | (bit_row < 0)[..., None, :])
    keep = keep & covered[..., None, :]
    return TileView(q_token, k_token, k_row, keep, sure)


def visible(plan: Plan, q_token: Tensor, k_token: Tensor) -> Tensor:
    """The formula of visibility, for tokens q [B,H,m] and k [B,H,n] (-1 is no token): bool [B,H,m,n]."""
    batch, heads = q_token.shape[:2]

    def of(x: Tensor, token: Tensor) -> Tensor:
        if not x.shape[-1]:  # no tokens: all lanes are empty
            return torch.zeros_like(token)
        return _at(x, batch, heads).gather(-1, token.clamp(min=0)).long()

    keep = (q_token >= 0)[..., :, None] & (k_token >= 0)[..., None, :]
    if plan.q_pos is not None:
        q = of(plan.q_pos, q_token)
    elif isinstance(plan.q_offset, Tensor):
        q = q_token + plan.q_offset.long().reshape(-1, 1, 1)
    else:
        q = q_token + plan.q_offset
    k = k_token if plan.k_pos is None else of(plan.k_pos, k_token)
    q, k = q[..., :, None], k[..., None, :]
    if plan.causal:
        keep = keep & ((q >= k) if plan.include_self else (q > k))
    elif not plan.include_self:
        keep = keep & (q != k)
    if plan.window is not None:
        left, right = plan.window
        inside = torch.ones_like(keep)
        if left is not None:
            inside = inside & (q - k <= left)
        if right is not None:
            inside = inside & (k - q <= right)
        keep = keep & (inside | (k < plan.sink))
    if plan.k_end is not None:
        keep = keep & (q < of(plan.k_end, k_token)[..., None, :])
    if plan.q_seg is not None or plan.k_seg is not None:
        blank = torch.full((), ANY, dtype=torch.int64, device=q.device)
        a = blank if plan.q_seg is None else of(plan.q_seg, q_token)[..., :, None]
        b = blank if plan.k_seg is None else of(plan.k_seg, k_token)[..., None, :]
        keep = keep & (a != NONE) & (b != NONE) & ((a == b) | (a == ANY) | (b == ANY))
    return keep


def to_dense(plan: Plan) -> Tensor:
    batch, heads = plan.extent()
    mask = torch.zeros(batch, heads, plan.Tq + 1, plan.Tk + 1, dtype=torch.bool, device=plan.device)
    b = torch.arange(batch, device=plan.device)[:, None, None, None]
    h = torch.arange(heads, device=plan.device)[None, :, None, None]
    for r in range(plan.tiles):
        view = tile_view(plan, r, batch, heads)
        q = torch.where(view.q_token < 0, plan.Tq, view.q_token)
        k = torch.where(view.k_token < 0, plan.Tk, view.k_token)
        cell = (b, h, q[..., :, None], k[..., None, :])
        mask[cell] = mask[cell] | view.keep
    return mask[:, :, : plan.Tq, : plan.Tk]


def visible_pairs(plan: Plan) -> int:
    batch, heads = plan.extent()
    return sum(int(tile_view(plan, r, batch, heads).keep.sum()) for r in range(plan.tiles))


def visited_area(plan: Plan) -> int:
    batch, heads = plan.extent()
    area = 0
    for r in range(plan.tiles):
        lo, hi, _, _ = _entries(plan, r, batch, heads)
        area += int((hi - lo).sum()) * min(plan.tile, plan.q_rows - r * plan.tile)
    return area


def dense_pairs(plan: Plan) -> int:
    """Pairs that causality and the window alone allow between the plan's positions (token indices)."""
    q = torch.arange(plan.Tq, dtype=torch.int64)
    offset = plan.q_offset
    q = q + (int(offset.flatten()[0]) if isinstance(offset, Tensor) else offset)
    left, right = plan.window or (None, None)
    zero = torch.zeros_like(q)
    lo = zero if left is None else q - left
    hi = zero + plan.Tk if right is None else q + right + 1
    past = q + 1 if plan.include_self else q
    lo, hi = lo.clamp(0, plan.Tk), hi.clamp(0, plan.Tk)
    if plan.causal:
        hi = torch.minimum(hi, past.clamp(0, plan.Tk))
    pairs = (hi - lo).clamp(min=0)
    if plan.sink and plan.window:
        reach = zero + plan.Tk
        if plan.causal:
            reach = past.clamp(0, plan.Tk)
        pairs = pairs + torch.minimum(torch.minimum(zero + plan.sink, lo), reach).clamp(min=0)
        if right is not None and not plan.causal:  # sinks beyond the right edge of the band
            pairs = pairs + (torch.minimum(zero + plan.sink, reach) - hi).clamp(min=0)
    if not plan.causal and not plan.include_self:
        pairs = pairs - ((q >= lo) & (q < hi)).long()
    return int(pairs.sum())


def _fail(message: str) -> None:
    raise PlanError(message)


def check(plan: Plan) -> None:
    batch, heads = plan.extent()
    for name, T in (("q_order", plan.Tq), ("k_order", plan.Tk)):
        order = getattr(plan, name)
        if order is None:
            continue
        if order.numel() and (int(order.min()) < -1 or int(order.max()) >= T):
            _fail(f"{name} holds {int(order.min())}..{int(order.max())}: tokens are 0..{T - 1}, -1 is an empty lane")
        sorted_ = order.sort(-1).values
        if bool(((sorted_[..., 1:] == sorted_[..., :-1]) & (sorted_[..., 1:] >= 0)).any()):
            _fail(f"{name} names a token twice: an order is injective; use two plans (a tuple) for repeated tokens")
    for kind, pool in (("span", plan.spans), ("", plan.index)):
        if pool is None:
            continue
        pre = f"{kind}_" if kind else ""
        start, full, count = (getattr(plan, pre + n) for n in ("start", "full", "count"))
        if bool((full < 0).any()) or bool((full > count).any()):
            _fail(f"{pre}full must lie in 0..{pre}count")
        if bool((start < 0).any()) or bool((start + count > len(pool)).any()):
            _fail(f"{pre}start + {pre}count runs past the {len(pool)} entries of {'spans' if kind else 'index'}")
    if plan.bits is not None:
        partial = plan.count - plan.full
        if bool((plan.bits_start < 0).any()) or bool((plan.bits_start + partial > len(plan.bits)).any()):
            _fail(f"bits_start + partial units runs past the {len(plan.bits)} entries of bits")
    for r in range(plan.tiles):
        lo, hi, _, _ = _entries(plan, r, batch, heads)
        bad = (lo < 0) | (hi > plan.k_rows) | (hi < lo)
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            _fail(f"tile {r} (batch {at[0]}, head {at[1]}) lists keys [{int(lo[tuple(at)])}, {int(hi[tuple(at)])}): "
                  f"key rows are 0..{plan.k_rows - 1}")
        begin, order = torch.where(hi > lo, lo, plan.k_rows + 1).sort(-1)
        end = torch.where(hi > lo, hi, plan.k_rows + 1).gather(-1, order)
        if bool(((begin[..., 1:] < end[..., :-1]) & (begin[..., 1:] <= plan.k_rows)).any()):
            _fail(f"tile {r} lists a key twice: the entries of a row are disjoint")
        view = tile_view(plan, r, batch, heads)
        real = view.q_token >= 0
        if plan.q_seg is not None:
            real = real & (_at(plan.q_seg, batch, heads).gather(-1, view.q_token.clamp(min=0)) != NONE)
        if bool((view.covered[..., None, :] & real[..., :, None] & ~view.keep).any()):
            _fail(f"tile {r}: an entry marked full holds a pair that the rules hide; count it as partial")


def _owners(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(row number, entry number) of every listed entry, rows numbered through [B,H,R]."""
    flat = count.flatten().long()
    row = torch.repeat_interleave(torch.arange(flat.numel(), device=flat.device), flat)
    inside = torch.arange(row.numel(), device=flat.device) - (flat.cumsum(0) - flat)[row]
    return row, start.flatten()[row] + inside


def _transpose(
    plan: Plan, shape: torch.Size, row: Tensor, column: Tensor, full: Tensor, source: Tensor, columns: int, group: int
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
        start=(count.cumsum(0) - count).view(lead), count=count.int().view(lead), full=n_full.int().view(lead),
        index=(row % R)[order].int(), source=source[order], group=group,
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
    return _transpose(plan, plan.count.shape, row, plan.index[source].long(), is_full, source, columns, plan.unit)


def unpack(plan: Plan) -> Tensor:
    """The bits of a plan's partial units as bool [Nb, tile, unit]."""
    return unpack_bits(plan.bits, plan.unit)
