"""`Plan.from_keep`: any queries and keys dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import PlanError, require
from ..options import TILE, UNIT, Fields, check_options, common_heads, same_batch, shape_of, spread_heads
from .rows import compact_order, tile_ends
from .spans import pack_spans


def _as_keep(x: Tensor, name: str) -> Tensor:
    require(
        (isinstance(x, Tensor) and x.dim() == 3, f"{name}: expected [B|1, H|1, T], got {shape_of(x)}"),
        error=PlanError,
    )
    require(
        (
            x.dtype in (torch.bool, torch.uint8),
            f"{name} has dtype {x.dtype}: expected bool (or uint8), True = keep; try {name} = {name} > 0",
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
) -> Fields:
    """Fields of `Plan.from_keep`."""
    check_options(causal=causal, include_self=include_self, tile=tile, unit=unit)
    q_keep, k_keep = _as_keep(q_keep, "q_keep"), _as_keep(k_keep, "k_keep")
    batch = same_batch(q_keep, k_keep, "q_keep, k_keep")
    Tq, Tk = q_keep.shape[-1], k_keep.shape[-1]
    q_order, _ = compact_order(q_keep)
    k_order, k_seen = compact_order(k_keep)
    heads = common_heads(q_keep, k_keep)
    order = spread_heads(q_order, heads).expand(batch, -1, -1)
    seen = spread_heads(k_seen, heads).expand(batch, -1, -1)
    first, last, live = tile_ends(order, tile)
    total = seen[..., -1:].expand_as(first)
    if causal:  # kept keys not later than a row: a prefix of the compact keys
        reach = seen.gather(-1, (last + int(include_self)).clamp(0, Tk))
        sure = seen.gather(-1, (first + int(include_self)).clamp(0, Tk))
    else:
        reach = total
        sure = total if include_self else torch.zeros_like(total)
    zero = torch.zeros_like(reach)
    reach, sure = torch.where(live, reach, zero), torch.where(live, sure, zero)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        "include_self": include_self,
        "q_order": q_order,
        "k_order": k_order,
        **pack_spans([zero, sure], [sure, reach], [True, False]),
    }
