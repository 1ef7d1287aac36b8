"""Extreme positions of tiles and units: they decide whether a tile sees all, some or none of a unit.

If rows are tokens, both extremes are arithmetic; under a row order they are reduced once per tile and unit,
never per pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...common.errors import PlanError
from ..checks import check_order
from ..options import FAR, INTEGERS, host, narrow, shape_of, shift_of, spread_heads


@dataclass(frozen=True)
class Extremes:
    """Positions of groups of rows: smallest and largest [B|1, H|1, n], and whether every lane holds a token.

    A group without a token has `low` beyond and `high` before every position.
    """

    low: Tensor
    high: Tensor
    whole: Tensor

    def laid_out(self, batch: int, heads: int) -> Extremes:
        """Expand to [batch, heads, n]."""
        given = (self.low, self.high, self.whole)
        return Extremes(*(spread_heads(x, heads).expand(batch, -1, -1) for x in given))


def rows_of(T: int, order: Tensor | None) -> int:
    """Number of rows: the length of the order, or T without one."""
    return T if order is None else order.shape[-1]


def as_order(order: object, T: int, name: str) -> Tensor | None:
    """Validate an order of T tokens, int32 [B|1, H|1, rows]."""
    if order is None:
        return None
    if not (isinstance(order, Tensor) and order.dim() == 3 and order.shape[1] > 0):
        raise PlanError(f"{name}: {shape_of(order)}; expected integers [B|1, H|1, rows], -1 is an empty lane")
    if order.dtype not in INTEGERS:
        raise PlanError(f"{name} has dtype {order.dtype}: expected integers; try {name}.int()")
    order = narrow(order, f"{name} holds")
    if host(order):
        check_order(order, T, name)
    return order


def extremes(
    T: int, size: int, *, order: Tensor | None = None, offset: int | Tensor = 0, device: torch.device
) -> Extremes:
    """Extremes of consecutive groups of `size` rows; token t sits at position t + offset."""
    shift = shift_of(offset, 2)
    if order is None:
        begin = torch.arange(0, T, size, device=device).view(1, 1, -1)
        end = begin + size
        return Extremes(begin + shift, end.clamp(max=T) - 1 + shift, end <= T)
    groups = -(-order.shape[-1] // size)
    lanes = pad(order, (0, groups * size - order.shape[-1]), value=-1).long()
    lanes = lanes.view(*order.shape[:2], groups, size)
    real = lanes >= 0
    low, high = torch.where(real, lanes, FAR).amin(-1), torch.where(real, lanes, -FAR).amax(-1)
    some = high >= 0
    return Extremes(torch.where(some, low + shift, FAR), torch.where(some, high + shift, -FAR), real.all(-1))


class RangeExtremes:
    """Range minimum and maximum of positions over key rows (sparse table). O(T log T) memory.

    Level p holds the extremes of the 2^p rows from each row on; two entries of the largest level that fits
    cover a range.
    """

    def __init__(self, order: Tensor) -> None:
        token = order.long()
        self.holes = pad((token < 0).cumsum(-1), (1, 0))
        low, high = torch.where(token < 0, FAR, token), token
        self.low, self.high = [low], [high]
        size = 1
        while 2 * size <= token.shape[-1]:
            low, high = (
                join(x[..., : x.shape[-1] - size], x[..., size:])
                for join, x in ((torch.minimum, low), (torch.maximum, high))
            )
            self.low.append(pad(low, (0, token.shape[-1] - low.shape[-1])))
            self.high.append(pad(high, (0, token.shape[-1] - high.shape[-1])))
            size *= 2

    def __call__(self, lo: Tensor, hi: Tensor) -> Extremes:
        """Extremes of ranges `[lo, hi)` of shape [B, H, n]; an empty range has those of no token."""
        some = hi > lo
        size = torch.where(some, hi - lo, 1)
        level = size.double().log2().long().clamp(max=len(self.low) - 1)
        tables = torch.stack(self.low, -2), torch.stack(self.high, -2)
        if not tables[0].shape[-1]:
            return Extremes(torch.full_like(lo, FAR), torch.full_like(lo, -FAR), ~some)
        rows = tables[0].shape[-1]
        first = level * rows + lo.clamp(0, rows - 1)
        last = level * rows + (lo + size - (torch.ones_like(level) << level)).clamp(0, rows - 1)
        batch, heads = lo.shape[:2]
        flat = [spread_heads(x, heads).expand(batch, -1, -1, -1).flatten(2) for x in tables]
        low = torch.minimum(flat[0].gather(-1, first), flat[0].gather(-1, last))
        high = torch.maximum(flat[1].gather(-1, first), flat[1].gather(-1, last))
        holes = spread_heads(self.holes, heads).expand(batch, -1, -1)
        whole = holes.gather(-1, torch.maximum(lo, hi)) == holes.gather(-1, lo)
        none = ~some | (high < 0)
        return Extremes(torch.where(none, FAR, low), torch.where(none, -FAR, high), whole)
