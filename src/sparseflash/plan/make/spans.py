"""Span lists: pack candidate ranges of every tile into padded lists; the candidates of a band."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.errors import PlanError
from ..options import Fields, Window, normal_window


def members(window: Window | None, *, causal: bool, include_self: bool) -> Window | None:
    """Validate a window that counts members of a bucket, or kept keys, from the nearest visible one on."""
    window = normal_window(window)
    if window and not (causal or include_self):
        raise PlanError(
            "window= counts members, where a query without itself has no place: expected causal=True, or "
            "include_self=True"
        )
    return window


def pack_spans(
    lo: list[Tensor], hi: list[Tensor], full: list[bool], *, moving: bool = True, most: int | None = None
) -> Fields:
    """Pack candidate ranges `[lo, hi)`, each [B,H,R], into padded lists: full first, empty ones removed.

    `moving` says that ranges hardly jump from tile to tile, so that the tiles that visit a key group are
    consecutive: the lists then get `span_room`. `most` bounds the ranges of a tile: further ones are dropped,
    and `overflow` is set.
    """
    first = torch.stack([x.expand_as(lo[0]) for x in lo], -1)
    last = torch.stack([x.expand_as(lo[0]) for x in hi], -1)
    width = len(lo)
    alive = last > first
    # full_like fills on the device: a tensor made of a Python list would be a synchronising copy
    kind = [torch.full_like(lo[0], int(not sure)) for sure in full]
    is_full = torch.stack(kind, -1) == 0
    rank = torch.where(alive, torch.where(is_full, 0, 1), 2)
    order = torch.argsort(rank, dim=-1, stable=True)
    some = rank.gather(-1, order) < 2
    ends = [(x.gather(-1, order) * some)[..., :most] for x in (first, last)]
    sure, count = (x.sum(-1, dtype=torch.int32) for x in (alive & is_full, alive))
    bound: Fields = {}
    if most is not None:
        width = min(width, most)
        bound = {"overflow": (count > width).any().int()}
        sure, count = sure.clamp(max=width), count.clamp(max=width)
    start = torch.arange(count.numel(), device=first.device) * width
    return {
        "span_start": start.view(first.shape[:-1]),
        "span_full": sure,
        "span_count": count,
        "spans": torch.stack([x.reshape(-1) for x in ends], -1).to(torch.int32),
        "span_room": width if moving else 0,
        **bound,
    }


def band_spans(
    first: Tensor,
    last: Tensor,
    low: Tensor | int,
    high: Tensor | int,
    *,
    causal: bool,
    window: Any,
    sink: int | Tensor,
    include_self: bool = True,
    live: Tensor | None = None,
) -> Fields:
    """Spans of tiles whose rows have positions `first..last`, over keys at positions `low..high-1`.

    Row p sees `[p-left, p+right]` (right = 0 if causal, -1 without itself) and the sink; the union over the
    tile's rows is visited, the intersection is full. Example, causal, left = 4, rows 8..9: row 8 sees 4..8,
    row 9 sees 5..9: full [5, 9), partial [4, 5) and [9, 10).
    """
    left, right = window or (None, None)
    if causal:
        right = 0 if include_self else -1
    low = low.expand_as(first) if isinstance(low, Tensor) else torch.full_like(first, low)
    high = high.expand_as(first) if isinstance(high, Tensor) else torch.full_like(first, high)

    def clamp(x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, low), high)

    outer_lo = low if left is None else clamp(first - left)
    inner_lo = low if left is None else clamp(last - left)
    outer_hi = high if right is None else clamp(last + right + 1)
    inner_hi = high if right is None else clamp(first + right + 1)
    if live is not None:  # tiles without a real row visit nothing
        outer_hi, inner_hi = torch.where(live, outer_hi, low), torch.where(live, inner_hi, low)
        outer_lo, inner_lo = torch.where(live, outer_lo, low), torch.where(live, inner_lo, low)
    whole = inner_lo < inner_hi  # otherwise all rows share no key: one partial range
    a, b = torch.where(whole, inner_lo, outer_hi), torch.where(whole, inner_hi, outer_hi)
    lo, hi, full = [a, outer_lo, b], [b, a, outer_hi], [True, False, False]
    if window is not None and (isinstance(sink, Tensor) or sink):  # sinks outside the band are full
        edge = clamp(sink.expand_as(low) if isinstance(sink, Tensor) else torch.full_like(low, sink))
        lo, hi, full = [low, *lo], [torch.minimum(edge, outer_lo), *hi], [True, *full]
        if not causal and right is not None:
            lo, hi, full = [outer_hi, *lo], [edge, *hi], [True, *full]
        if live is not None:
            hi = [torch.where(live, x, low) for x in hi]
    return pack_spans(lo, hi, full)
