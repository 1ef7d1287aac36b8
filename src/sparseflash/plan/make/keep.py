"""Implements `Plan.from_keep`: drops any queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import (
    TILE,
    UNIT,
    Fields,
    Window,
    check_options,
    common_heads,
    same_batch,
    shape_of,
    spread_heads,
)
from .rows import compact_order, tile_ends
from .spans import band_spans, members, pack_spans


def _as_keep(x: Tensor, name: str) -> Tensor:
    require(
        (
            isinstance(x, Tensor) and x.dim() == 3,
            lambda: f"{name}: expected [B|1, H|1, T], got {shape_of(x)}",
        ),
        error=PlanError,
    )
    require(
        (
            x.dtype in (torch.bool, torch.uint8),
            lambda: (
                f"{name} has dtype {x.dtype}: expected bool (or uint8), True = keep; try {name} = {name} > 0"
            ),
        ),
        error=PlanError,
    )
    return x.bool()


def from_keep(
    q_keep: Tensor,
    k_keep: Tensor,
    *,
    causal: bool = True,
    include_self: bool = True,
    tile: int = TILE,
    unit: int = UNIT,
    window: Window | None = None,
) -> Fields:
    """Fields of `Plan.from_keep`."""
    check_options(causal=causal, include_self=include_self, tile=tile, unit=unit)
    window = members(window, causal=causal, include_self=include_self)
    q_keep, k_keep = _as_keep(q_keep, "q_keep"), _as_keep(k_keep, "k_keep")
    batch = same_batch(q_keep, k_keep, "q_keep, k_keep")
    Tq, Tk = q_keep.shape[-1], k_keep.shape[-1]
    q_order, _ = compact_order(q_keep)
    k_order, k_seen = compact_order(k_keep)
    heads = common_heads(q_keep, k_keep)
    order = spread_heads(q_order, heads).expand(batch, -1, -1)
    seen = spread_heads(k_seen, heads).expand(batch, -1, -1)
    first, last, live = tile_ends(order, tile)
    total, nearest = seen[..., -1:].expand_as(first), int(include_self)
    fields: Fields = {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        "include_self": include_self,
        "q_order": q_order,
        "k_order": k_order,
    }
    # number of kept keys not later than a tile's last and first row: each is a prefix of the compact keys
    reach, sure = (seen.gather(-1, (edge + nearest).clamp(0, Tk)) for edge in (last, first))
    zero = torch.zeros_like(reach)
    if window:  # positions become places among the kept keys, so the window counts those
        place = (torch.arange(Tq, device=order.device) + nearest).clamp(max=Tk)
        fields |= {
            "window": window,
            "q_pos": (k_seen[..., place] - nearest).int(),
            "k_pos": k_seen[..., :-1].int(),
        }
        rules: Fields = {"causal": causal, "include_self": include_self, "window": window}
        return fields | band_spans(sure - nearest, reach - nearest, zero, total, sink=0, live=live, **rules)
    if not causal:
        reach, sure = total, total if include_self else zero
    reach, sure = torch.where(live, reach, zero), torch.where(live, sure, zero)
    return fields | pack_spans([zero, sure], [sure, reach], [True, False])
