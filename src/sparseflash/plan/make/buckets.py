"""Implements `Plan.from_buckets`: queries see the keys of their bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import (
    INTEGERS,
    TILE,
    UNIT,
    Fields,
    Window,
    check_options,
    common_heads,
    host,
    is_count,
    normal_offset,
    same_batch,
    shape_of,
    spread_heads,
)
from .rows import begins_of, edge_rows, tile_ends
from .spans import band_spans, members, pack_spans


def _as_bucket(x: Tensor, name: str) -> Tensor:
    require(
        (
            isinstance(x, Tensor) and x.dim() == 3,
            lambda: f"{name}: expected [B|1, H|1, T], got {shape_of(x)}",
        ),
        error=PlanError,
    )
    require(
        (
            x.dtype in INTEGERS,
            lambda: (
                f"{name} has dtype {x.dtype}: expected integer bucket ids; try {name}.long() (NaN "
                "has no bucket)"
            ),
        ),
        error=PlanError,
    )
    return x


def _in_bucket_order(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort stably along the last axis: ids in ascending order, and their tokens, in time order per bucket."""
    *lead, T = x.shape
    if host(x) and x.numel():
        # sort all lists as one list of small keys: PyTorch then uses a radix sort
        low, high = (int(end) for end in torch.aminmax(x))
        lists, width = x.numel() // T, high - low + 1
        if lists * width < 2**62:
            base = torch.arange(lists, device=x.device)[:, None]
            key = (x.reshape(lists, T).long() - low + base * width).flatten()
            values, at = (key.int() if lists * width < 2**31 else key).sort(stable=True)
            label = values.view(lists, T).long() - (base * width - low)
            return label.view(x.shape), (at.view(lists, T) - base * T).view(x.shape)
    label, token = x.long().sort(dim=-1, stable=True)
    return label, token


def _tiles(q_label: Tensor, q_token: Tensor, tile: int, buckets: int | None) -> tuple[Tensor, Tensor]:
    """Queries in bucket order [B,H,rows], each bucket padded to whole tiles, and the label of each tile.

    Example, tile 2: buckets of 3 and 1 queries take rows 0-2 and 4, and row 3 is an empty lane (-1).
    """
    row = edge_rows(begins_of(q_label), tile)
    if buckets is not None and not host(row):
        rows = q_label.shape[-1] + buckets * (tile - 1)
    else:
        rows = int(row[..., -1].max()) + 1 if row.numel() else 0
    rows = -(-rows // tile) * tile
    q_order = torch.full((*q_label.shape[:2], rows), -1, dtype=torch.int32, device=row.device)
    q_order.scatter_(-1, row, q_token.int())
    label = torch.zeros((*q_label.shape[:2], rows // tile), dtype=torch.int64, device=row.device)
    label.scatter_(-1, row.div(tile, rounding_mode="floor"), q_label)
    return q_order, label


def from_buckets(
    q_bucket: Tensor,
    k_bucket: Tensor,
    *,
    causal: bool = True,
    include_self: bool = True,
    tile: int = TILE,
    unit: int = UNIT,
    buckets: int | None = None,
    q_offset: int | Tensor = 0,
    window: Window | None = None,
) -> Fields:
    """Fields of `Plan.from_buckets`."""
    q_offset = normal_offset(q_offset)
    q_bucket, k_bucket = _as_bucket(q_bucket, "q_bucket"), _as_bucket(k_bucket, "k_bucket")
    check_options(causal=causal, include_self=include_self, tile=tile, unit=unit)
    window = members(window, causal=causal, include_self=include_self)
    known = buckets is None or is_count(buckets, 1)
    require((known, lambda: f"buckets={buckets!r}: expected a positive int, or None"), error=PlanError)
    batch = same_batch(q_bucket, k_bucket, "q_bucket, k_bucket")
    if batch == 1 and isinstance(q_offset, Tensor) and q_offset.dim():
        batch = len(q_offset)
    Tq, Tk = q_bucket.shape[-1], k_bucket.shape[-1]
    q_label, q_token = _in_bucket_order(q_bucket)
    k_label, k_token = (q_label, q_token) if q_bucket is k_bucket else _in_bucket_order(k_bucket)

    q_order, label = _tiles(q_label, q_token, tile, buckets)

    # keys: the run of equal labels, cut at the tile's last (first) query; `keys` = (run begin << 31 | token)
    # ascends, so one binary search finds the cut
    heads = common_heads(q_order, k_label)

    def wide(x: Tensor) -> Tensor:
        return spread_heads(x, heads).expand(batch, -1, -1).contiguous()

    first, last, live = (wide(x) for x in tile_ends(q_order, tile))
    label, labels = wide(label), wide(k_label)
    begin, end = torch.searchsorted(labels, label), torch.searchsorted(labels, label, right=True)
    at = torch.arange(Tk, device=label.device)
    run = torch.where(begins_of(k_label), at, 0).cummax(-1).values if Tk else k_label
    shift = q_offset.long().reshape(-1, 1, 1) if isinstance(q_offset, Tensor) else q_offset
    keys = wide(run << 31 | k_token)

    def until(begin: Tensor, end: Tensor, token: Tensor) -> Tensor:
        """End of the prefix of the bucket's keys [begin, end) that are not later than a query `token`."""
        edge, side = (token + shift).clamp(-1, 2**31 - 1), "right" if include_self else "left"
        return torch.minimum(torch.searchsorted(keys, (begin << 31) + edge, side=side), end)

    fields: Fields = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": causal}
    fields |= {
        "include_self": include_self,
        "q_offset": q_offset,
        "q_order": q_order,
        "k_order": k_token.int(),
    }
    if window:  # positions become places in the bucket, so the window counts its members
        nearest = int(include_self)
        label = wide(q_label)
        own = torch.searchsorted(labels, label), torch.searchsorted(labels, label, right=True)
        place = until(*own, wide(q_token)) - own[0] - nearest
        q_pos = torch.zeros_like(place).scatter_(-1, wide(q_token), place)
        k_pos = torch.zeros_like(run).scatter_(-1, k_token, at - run)
        first, last = (until(begin, end, edge) - nearest for edge in (first, last))
        rules: Fields = {"causal": causal, "include_self": include_self, "window": window}
        spans = band_spans(first, last, begin, end, sink=0, live=live, **rules)
        return fields | {"window": window, "q_pos": q_pos.int(), "k_pos": k_pos.int()} | spans
    if causal:
        reach, sure = (until(begin, end, edge) for edge in (last, first))
    else:
        reach, sure = end, end if include_self else begin
    begin, reach, sure = (torch.where(live, x, 0) for x in (begin, reach, sure))
    return fields | pack_spans([begin, sure], [sure, reach], [True, False])
