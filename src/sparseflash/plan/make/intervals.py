"""Plans from a range of keys per query, or of queries per key. Memory follows the visited tiles.

If all ranges of queries begin at key 0, or those of keys at the key's own position, the plan expresses them
as a rule (a position, an expiry) and needs no bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...common.errors import PlanError, require
from ..options import (
    INTEGERS,
    TILE,
    UNIT,
    Fields,
    check_options,
    fit,
    host,
    is_length,
    joint,
    narrow,
    normal_offset,
    shape_of,
)
from .lifetimes import from_lifetimes
from .listed import check_capacity, unit_lists
from .masks import bit_lists, runs, span_lists
from .spans import pack_spans

LANES = 1 << 22
"""Words of bits, times ranges per query, that are computed in one chunk."""


def _numbers(x: object, name: str, dims: tuple[int, ...], said: str) -> Tensor:
    if not (isinstance(x, Tensor) and x.dim() in dims and x.shape[1] > 0):
        raise PlanError(f"{name}: {shape_of(x)}; expected integers {said}")
    require(
        (x.dtype in INTEGERS, lambda: f"{name} has dtype {x.dtype}: expected integers; try {name}.int()"),
        error=PlanError,
    )
    return x if x.dtype in (torch.int32, torch.int64) else x.int()  # small dtypes would overflow in sums


def from_intervals(
    lo: Tensor | None, hi: Tensor, *, Tk: int, moving: bool = False, tile: int = TILE, unit: int = UNIT
) -> Fields:
    """Fields of `Plan.from_intervals`."""
    check_options(tile=tile, unit=unit)
    require((is_length(Tk), lambda: f"Tk={Tk!r}: expected an int >= 0 of 32 bits"), error=PlanError)
    hi = _numbers(hi, "hi", (3, 4), "[B|1, H|1, Tq], or [B|1, H|1, Tq, m] for m ranges a query")
    if lo is not None:
        lo = _numbers(lo, "lo", (hi.dim(),), "of as many dimensions as hi, or None: from the first key on")
        if lo.shape[2:] != hi.shape[2:]:
            raise PlanError(f"lo {list(lo.shape)} and hi {list(hi.shape)} differ in shape")
        if any(joint(sizes) is None for sizes in zip(lo.shape[:2], hi.shape[:2], strict=True)):
            raise PlanError(
                f"lo {list(lo.shape)} and hi {list(hi.shape)}: expected one batch size, or 1, and so of heads"
            )
        if lo.device != hi.device:
            raise PlanError(f"lo is on {lo.device}, hi on {hi.device}: move them to one device")
        lo, hi = (lo, hi) if lo.dtype == hi.dtype else (lo.long(), hi.long())
        lo, hi = (x[..., None] if x.dim() == 3 else x for x in torch.broadcast_tensors(lo, hi))  # type: ignore[no-untyped-call]
    ends = [x for x in (lo, hi) if x is not None and x.numel()]
    if not all(map(host, ends)):  # values that cannot be read are clamped
        lo, hi = lo if lo is None else fit(lo, "lo holds", 0, Tk), fit(hi, "hi holds", 0, Tk)
    elif ends:
        low, high = min(int(x.min()) for x in ends), max(int(x.max()) for x in ends)
        require(
            (
                low >= 0 and high <= Tk,
                lambda: (
                    f"lo and hi hold {low}..{high}: expected ranges [lo, hi) with 0 <= lo and hi <= "
                    f"Tk = {Tk} "
                    "(hi <= lo is empty)"
                ),
            ),
            error=PlanError,
        )
    fields = {"Tq": hi.shape[2], "Tk": Tk, "tile": tile, "unit": unit}
    if moving:
        return fields | _moving(lo, hi, Tk, tile)
    if lo is None:
        reach = hi if hi.dim() == 3 else hi.amax(-1) if hi.shape[-1] else hi.sum(-1)
        return fields | _prefixes(reach, tile)
    return fields | _ranges(lo.long(), hi.long(), Tk, tile, unit)


def _prefixes(reach: Tensor, tile: int) -> Fields:
    """Let each query see its first `reach` keys [B,H,Tq]: a causal plan with `q_pos = reach - 1`."""
    *lead, Tq = reach.shape
    R = -(-Tq // tile)
    rows = pad(reach.long(), (0, R * tile - Tq)).view(*lead, R, tile)
    last = rows.amax(-1)
    real = torch.arange(R * tile, device=reach.device).view(R, tile) < Tq
    first = torch.where(real, rows, torch.iinfo(torch.int64).max).amin(-1)
    zero = torch.zeros_like(first)
    return {
        "causal": True,
        "q_pos": reach.int() - 1,
        **pack_spans([zero, first], [first, last], [True, False], moving=False),
    }


def _moving(lo: Tensor | None, hi: Tensor, Tk: int, tile: int) -> Fields:
    """One range per query with ends that never decrease: query rows `k_pos ... k_end - 1` see a key."""
    hi = hi.flatten(2)
    lo = torch.zeros_like(hi) if lo is None else lo.flatten(2)
    if host(lo) and host(hi):
        still = all(bool((x[..., 1:] >= x[..., :-1]).all()) for x in (lo, hi))
        require((still, "moving=True: lo or hi decreases from one query to the next"), error=PlanError)
    Tq = hi.shape[-1]
    first = torch.arange(0, Tq, tile, device=hi.device)
    last = (first + (tile - 1)).clamp(max=Tq - 1)
    left, right = lo[..., first], hi[..., last]
    inner_left, inner_right = lo[..., last], hi[..., first]
    whole = inner_left < inner_right  # otherwise all rows share no key: one partial range
    a, b = torch.where(whole, inner_left, right), torch.where(whole, inner_right, right)
    spans = pack_spans([a, left, b], [b, a, right], [True, False, False])
    if tile == 1 or (isinstance(Tq, int) and Tq == 1):
        return spans
    key = torch.arange(Tk, dtype=hi.dtype, device=hi.device).expand(*hi.shape[:-1], -1).contiguous()
    k_pos, k_end = (torch.searchsorted(x.contiguous(), key, right=True, out_int32=True) for x in (hi, lo))
    return {"causal": True, "k_pos": k_pos, "k_end": k_end, **spans}


def _ranges(lo: Tensor, hi: Tensor, Tk: int, tile: int, unit: int) -> Fields:
    """Any ranges [B,H,Tq,m]: a sweep along the keys of each tile counts the rows that see each segment.

    Example, tile 2, unit 4, rows [0, 8) and [0, 6): keys 0..5 are seen by 2 rows, 6..7 by 1, so unit 1 is
    mixed (bits), and the full span [0, 6) is cut back to [0, 4).
    """
    lo, order = torch.where(hi > lo, lo, Tk).sort(-1)  # make the ranges of a row disjoint
    hi = hi.gather(-1, order).cummax(-1).values
    lo = torch.maximum(lo, pad(hi[..., :-1], (1, 0)))
    hi = torch.maximum(lo, hi)
    B, H, Tq, m = lo.shape
    R, C = -(-Tq // tile), -(-Tk // unit)
    lead = (B, H, R)
    lo, hi = (pad(x, (0, 0, 0, R * tile - Tq)).reshape(B * H * R, tile, m) for x in (lo, hi))
    rows = (Tq - torch.arange(R, device=lo.device) * tile).clamp(max=tile).repeat(B * H)

    # 1. segments between neighbouring range ends: the same rows see all keys of a segment
    at = torch.arange(B * H * R, device=lo.device)[:, None, None] * (Tk + 1)
    some = hi > lo
    place, order = torch.cat([(at + lo)[some], (at + hi)[some]]).sort()
    n = int(some.sum())
    seen = torch.where(order < n, 1, -1).cumsum(0)
    a, b, seen = place[:-1], place[1:], seen[:-1]
    live = (seen > 0) & (b > a)
    a, b, seen = a[live], b[live], seen[live]
    cell = a // (Tk + 1)
    a, b = a - cell * (Tk + 1), b - cell * (Tk + 1)

    # 2. mixed units: some keys are seen by some rows but not by all
    mixed = seen < rows[cell]
    first, last = a[mixed] // unit, (b[mixed] - 1) // unit + 1
    owner = torch.repeat_interleave(torch.arange(len(first), device=lo.device), last - first)
    inside = torch.arange(len(owner), device=lo.device) - ((last - first).cumsum(0) - (last - first))[owner]
    slot = torch.unique_consecutive(cell[mixed][owner] * C + first[owner] + inside)

    # 3. segments that all rows see, joined and cut back to the edges of mixed units
    span_cell, spans = runs(cell[~mixed], a[~mixed], b[~mixed])
    begin, end = spans.unbind(-1)
    begin = torch.where(_among(span_cell * C + begin // unit, slot), -(-begin // unit) * unit, begin)
    end = torch.where(_among(span_cell * C + (end - 1) // unit, slot), end // unit * unit, end)
    # a range that begins or ends inside a mixed unit leaves that part to the unit's bits
    left = begin < end
    return {
        **span_lists(span_cell[left], torch.stack([begin, end], -1)[left], lead),
        **bit_lists(slot // C, slot % C, _bits(lo, hi, slot, C, tile, unit), lead),
    }


def _among(x: Tensor, ascending: Tensor) -> Tensor:
    if not len(ascending):
        return torch.zeros_like(x, dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, x).clamp(max=len(ascending) - 1)] == x


def _bits(lo: Tensor, hi: Tensor, slot: Tensor, C: int, tile: int, unit: int) -> list[Tensor]:
    """Compute the bits of slots (cell * C + unit) from the ranges [cells, tile, m] of their rows."""
    words, m = -(-unit // 32), lo.shape[-1]
    parts = []
    for piece in torch.split(slot, max(1, LANES // max(tile * words * m, 1))):
        cell, column = piece // C, piece % C
        begin = (column * unit)[:, None] + torch.arange(words, device=lo.device) * 32  # [n, words]
        stop = torch.minimum(begin + 32, ((column + 1) * unit)[:, None])
        begin, stop = begin[:, None, :, None], stop[:, None, :, None]
        a, b = (torch.minimum(torch.maximum(x[cell][:, :, None], begin), stop) - begin for x in (lo, hi))
        one = torch.ones_like(a)
        parts.append(((one << b) - (one << a)).sum(-1).to(torch.int32))
    return parts


def from_expiry(
    k_end: Tensor,
    *,
    Tq: int | None = None,
    q_offset: int | Tensor = 0,
    tile: int = TILE,
    unit: int | None = None,
    capacity: int | None = None,
) -> Fields:
    """Fields of `Plan.from_expiry`."""
    if unit is None:
        return from_lifetimes(None, k_end, Tq=Tq, q_offset=q_offset, tile=tile, capacity=capacity)
    check_options(tile=tile, unit=unit)
    check_capacity(capacity)
    k_end = narrow(_numbers(k_end, "k_end", (3,), "[B|1, H|1, Tk]"))  # clamped: a large number means never
    Tk = k_end.shape[-1]
    Tq = Tk if Tq is None else Tq
    require((is_length(Tq), lambda: f"Tq={Tq!r}: expected an int >= 0 of 32 bits"), error=PlanError)
    q_offset = normal_offset(q_offset)
    R, C = -(-Tq // tile), -(-Tk // unit)
    shift = q_offset.long().reshape(-1, 1, 1, 1) if isinstance(q_offset, Tensor) else q_offset
    first = torch.arange(R, device=k_end.device)[:, None] * tile
    last = (first + (tile - 1)).clamp(max=Tq - 1) + shift
    first = first + shift
    column = torch.arange(C, device=k_end.device)
    begin = column * unit

    end = pad(k_end, (0, C * unit - Tk), value=torch.iinfo(torch.int32).min)  # nobody sees what is no key
    end = end.view(*k_end.shape[:2], 1, C, unit)
    visited = (begin <= last) & (end.amax(-1) > first)
    whole = (begin + (unit - 1) <= first) & (end.amin(-1) > last)
    kind = torch.where(visited, torch.where(whole, 0, 1), 2)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": True,
        "q_offset": q_offset,
        "k_end": k_end,
        **unit_lists(kind, lambda x: (column.expand(x.shape), x), lambda _, kind, __: kind, capacity),
    }
