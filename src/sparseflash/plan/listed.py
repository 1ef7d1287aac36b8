"""Constructors from what a method has already listed: blocks, keys, ranges. Static shapes: nothing reaches the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError, require
from .build import TILE, UNIT, Fields, _check_options, _pack_spans, _shape, is_count


def _sizes(Tq: int, Tk: int, **options: object) -> None:
    _check_options(**options)
    require((is_count(Tq) and is_count(Tk), f"Tq={Tq!r}, Tk={Tk!r}: lengths are ints >= 0"), error=PlanError)


def _first_rows(Tq: int, tile: int, tiles: int, device: torch.device) -> Tensor:
    """Position of the first query of each tile."""
    return (torch.arange(tiles, device=device) * tile).clamp(max=max(Tq - 1, 0))


def _kinds(
    unit_id: Tensor, listed: Tensor, *, Tq: int, Tk: int, tile: int, unit: int, causal: bool
) -> Tensor:
    """0 full, 1 partial, 2 not visited, for units [B,H,R,n] of causal or free tiles."""
    last = (unit_id + 1) * unit - 1
    whole = last < Tk
    gone = ~listed
    if causal:
        first = _first_rows(Tq, tile, unit_id.shape[2], unit_id.device)[:, None]
        whole = whole & (last <= first)
        gone = gone | (unit_id * unit > (first + tile - 1).clamp(max=Tq - 1))
    return torch.where(gone, 2, torch.where(whole, 0, 1))


def _units(unit_id: Tensor, kind: Tensor, capacity: int | None) -> Fields:
    """Unit lists from candidates [B,H,R,n]: full ones first, compact on the host, padded on accelerators."""
    order = torch.argsort(kind, dim=-1, stable=True)
    kind, unit_id = kind.gather(-1, order), unit_id.gather(-1, order)
    count, full = (kind < 2).sum(-1), (kind == 0).sum(-1)
    width = unit_id.shape[-1]
    if capacity is not None or unit_id.device.type != "cpu":
        if capacity is not None and capacity < width:
            width = capacity
        over = (count > width).any()
        start = (torch.arange(count.numel(), device=count.device) * width).view(count.shape)
        index = torch.where(kind < 2, unit_id, 0)[..., :width]
        fields: Fields = {"index": index.flatten().int(), "overflow": over.int()}
        count, full = count.clamp(max=width), full.clamp(max=width)
    else:
        flat = count.flatten()
        start, fields = (flat.cumsum(0) - flat).view(count.shape), {"index": unit_id[kind < 2].int()}
    return {"start": start, "full": full.int(), "count": count.int(), **fields}


def from_blocks(
    keep_blocks: Tensor,
    *,
    Tq: int,
    Tk: int,
    tile: int = TILE,
    unit: int = UNIT,
    causal: bool = False,
    capacity: int | None = None,
) -> Fields:
    _sizes(Tq, Tk, tile=tile, unit=unit, causal=causal)
    R, C = -(-Tq // tile), -(-Tk // unit)
    require(
        (
            isinstance(keep_blocks, Tensor)
            and keep_blocks.dim() == 4
            and tuple(keep_blocks.shape[2:]) == (R, C),
            f"keep_blocks: {_shape(keep_blocks)}; expected bool [B|1, H|1, {R} tiles of {tile}, {C} units of {unit}]",
        ),
        (
            keep_blocks.dtype == torch.bool,
            f"keep_blocks has dtype {keep_blocks.dtype}: expected bool, True = attends",
        ),
        (
            capacity is None or (isinstance(capacity, int) and capacity > 0),
            f"capacity={capacity!r}: expected an int > 0",
        ),
        error=PlanError,
    )
    unit_id = torch.arange(C, device=keep_blocks.device).expand(keep_blocks.shape)
    kind = _kinds(unit_id, keep_blocks, Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=causal)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        **_units(unit_id, kind, capacity),
    }


def from_keys(
    index: Tensor,
    *,
    Tq: int,
    Tk: int,
    tile: int = 1,
    unit: int = 1,
    causal: bool = False,
    unique: bool = False,
    capacity: int | None = None,
) -> Fields:
    _sizes(Tq, Tk, tile=tile, unit=unit, causal=causal)
    R, C = -(-Tq // tile), -(-Tk // unit)
    require(
        (
            isinstance(index, Tensor) and index.dim() == 4 and index.shape[2] == R,
            f"index: {_shape(index)}; expected integers [B|1, H|1, {R} tiles of {tile}, n], -1 = none",
        ),
        (
            not index.is_floating_point() and index.dtype != torch.bool,
            f"index has dtype {index.dtype}: expected integers",
        ),
        error=PlanError,
    )
    unit_id = index.long()
    if unit_id.device.type == "cpu" and unit_id.numel():
        low, high = int(unit_id.min()), int(unit_id.max())
        require(
            (low >= -1 and high < C, f"index holds {low}..{high}: units are 0..{C - 1}, -1 = none"),
            error=PlanError,
        )
    listed = unit_id >= 0
    if not unique and unit_id.shape[-1] > 1:  # a key named twice is one key
        unit_id = unit_id.sort(-1).values
        listed = (unit_id >= 0) & torch.nn.functional.pad(
            unit_id[..., 1:] != unit_id[..., :-1], (1, 0), value=True
        )
    kind = _kinds(unit_id, listed, Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=causal)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        **_units(unit_id, kind, capacity),
    }


def from_spans(
    spans: Tensor, *, Tq: int, Tk: int, tile: int = TILE, unit: int = UNIT, causal: bool = False
) -> Fields:
    _sizes(Tq, Tk, tile=tile, unit=unit, causal=causal)
    R = -(-Tq // tile)
    require(
        (
            isinstance(spans, Tensor) and spans.dim() == 5 and spans.shape[2] == R and spans.shape[4] == 2,
            f"spans: {_shape(spans)}; expected integers [B|1, H|1, {R} tiles of {tile}, m, 2], lo = hi is empty",
        ),
        (
            not spans.is_floating_point() and spans.dtype != torch.bool,
            f"spans has dtype {spans.dtype}: expected integers",
        ),
        error=PlanError,
    )
    lo, hi = spans.long().unbind(-1)
    if spans.device.type == "cpu" and spans.numel():
        bad = (lo < 0) | (hi > Tk) | (hi < lo)
        require(
            (not bool(bad.any()), f"spans: every range [lo, hi) must lie in 0..{Tk} with lo <= hi"),
            error=PlanError,
        )
        begin, order = torch.where(hi > lo, lo, Tk + 1).sort(-1)
        end = hi.gather(-1, order)
        overlap = (begin[..., 1:] < end[..., :-1]) & (begin[..., 1:] <= Tk) & (begin[..., :-1] <= Tk)
        require(
            (not bool(overlap.any()), "spans: the ranges of a tile must not overlap; join them"),
            error=PlanError,
        )
    los, his, full = list(lo.unbind(-1)), list(hi.unbind(-1)), [True] * lo.shape[-1]
    if causal:  # keys up to the first row are seen by all, keys after the last by none
        first = _first_rows(Tq, tile, R, spans.device) + 1
        last = (first - 1 + tile).clamp(max=Tq)
        middle = [torch.minimum(torch.maximum(a, first), b) for a, b in zip(los, his, strict=True)]
        ends = [torch.maximum(torch.minimum(b, last), m) for b, m in zip(his, middle, strict=True)]
        los, his, full = los + middle, middle + ends, full + [False] * len(full)
    if not los:
        los = his = [torch.zeros(spans.shape[:3], dtype=torch.int64, device=spans.device)]
        full = [True]
    return {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": causal, **_pack_spans(los, his, full)}
