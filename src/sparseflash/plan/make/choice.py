"""Plans from a selection per query (a learned indexer's top-k): gathered lists, or tiles with bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.errors import PlanError, require
from ..options import INTEGERS, TILE, UNIT, Fields, check_options, host, is_length, normal_offset, shape_of
from .listed import Frame, from_keys
from .masks import from_rows

GATHERED = 3
"""Cost of a pair in a per-query list, in pairs of a tile (measured: AVX-512, forward and backward)."""


def from_choice(
    index: Tensor,
    *,
    Tk: int,
    unit: int = 1,
    causal: bool = True,
    q_offset: int | Tensor = 0,
    k_keep: Tensor | None = None,
    unique: bool = False,
    tile: int | None = None,
) -> Fields:
    """Fields of `Plan.from_choice`."""
    check_options(causal=causal, unit=unit, unique=unique, **({} if tile is None else {"tile": tile}))
    require(
        (
            isinstance(index, Tensor) and index.dim() in (3, 4) and index.dtype in INTEGERS,
            lambda: (
                f"index: {shape_of(index)} {getattr(index, 'dtype', '')}; expected integers [B|1, Tq, n] or "
                "[B|1, H, Tq, n], -1 = none"
            ),
        ),
        (is_length(Tk), lambda: f"Tk={Tk!r}: expected an int >= 0 of 32 bits"),
        error=PlanError,
    )
    index = index[:, None] if index.dim() == 3 else index
    index = index if index.dtype in (torch.int32, torch.int64) else index.int()  # uint8 cannot hold -1
    offset = normal_offset(q_offset)
    at = torch.arange(index.shape[2], device=index.device) + (
        offset.to(index.device).view(-1, 1, 1) if isinstance(offset, Tensor) else offset
    )  # positions of the queries, [Tq] or [B,1,Tq]
    sizes = [index.shape[0], *([at.shape[0]] if at.dim() == 3 else [])]
    batch = next((n for n in sizes if n != 1), 1)
    if k_keep is not None:
        require(
            (
                isinstance(k_keep, Tensor)
                and k_keep.dtype == torch.bool
                and k_keep.dim() == 2
                and k_keep.shape[1] == Tk
                and batch in (1, k_keep.shape[0]),
                lambda: f"k_keep: {shape_of(k_keep)}; expected bool [B, Tk={Tk}], True = a real key",
            ),
            error=PlanError,
        )
        batch = k_keep.shape[0]
    require(
        (
            index.shape[0] in (1, batch) and (at.dim() == 1 or at.shape[0] in (1, batch)),
            lambda: (
                f"index: {shape_of(index)}, q_offset: {shape_of(q_offset)}; expected one batch size, or 1"
            ),
        ),
        error=PlanError,
    )
    chosen = index.expand(batch, -1, -1, -1)
    if causal:
        chosen = chosen.masked_fill(chosen * unit > at[..., None], -1)
    by_rule = k_keep is None  # whether `from_keys` with its rules can express the selection
    if unit == 1:
        if k_keep is not None and Tk:
            real = k_keep[:, None, None].expand(-1, *chosen.shape[1:3], -1)
            chosen = chosen.masked_fill(~real.gather(-1, chosen.clamp(0, Tk - 1).long()), -1)
        causal, by_rule = False, True
    if tile is None:
        tile = _tile(chosen, Tk, unit) if host(chosen) else 1
        tile = tile if by_rule else TILE
    if tile == 1 and by_rule:
        first = offset if causal else 0
        return from_keys(chosen, Frame(index.shape[2], Tk, 1, unit, causal, first), unique=unique)
    return _tiles(chosen, at if causal else None, k_keep, Tk, unit, tile)


def _tile(chosen: Tensor, Tk: int, unit: int) -> int:
    """Choose the tile: TILE if visiting the union of a tile's selections is less work, 1 for own lists."""
    B, H, Tq, n = chosen.shape
    R, C = -(-Tq // TILE), -(-Tk // unit // 64) * 64 + 64
    if Tq < TILE or not n or B * H == 0:
        return 1
    wide = max(1, UNIT // unit)  # entries that one unit of a tile covers
    unions = torch.zeros(B * H, R, C, dtype=torch.bool, device=chosen.device)
    units = torch.where(chosen < 0, C - 1, chosen // wide).long()
    units = torch.nn.functional.pad(units, (0, 0, 0, R * TILE - Tq), value=C - 1)
    unions.scatter_(-1, units.view(B * H, R, TILE * n), True)
    gathered = int((chosen >= 0).sum()) * unit
    shared = int(unions[..., :-1].sum()) * TILE * max(UNIT, unit)
    return TILE if shared < GATHERED * gathered else 1


def _tiles(chosen: Tensor, at: Tensor | None, k_keep: Tensor | None, Tk: int, unit: int, tile: int) -> Fields:
    """Build tiles with bits, a slab of rows at a time."""
    (B, H, Tq, _), C = chosen.shape, -(-Tk // unit)
    keys = torch.arange(Tk, device=chosen.device)
    lists = chosen.flatten(0, 1)
    position = None if at is None else at.expand(B, H, Tq).flatten(0, 1)
    if host(chosen) and chosen.numel():
        low, high = (int(x) for x in torch.aminmax(chosen))
        require(
            (low >= -1 and high < C, lambda: f"index holds {low}..{high}: expected 0..{C - 1}, -1 = none"),
            error=PlanError,
        )

    def slab(of: slice, rows: slice) -> Tensor:
        own = lists[of, rows].long()
        hit = torch.zeros(*own.shape[:2], C + 1, dtype=torch.bool, device=own.device)
        hit = hit.scatter_(-1, torch.where(own < 0, C, own), True)[..., :C]
        if unit > 1:
            hit = hit.repeat_interleave(unit, -1)[..., :Tk]
            if position is not None:
                hit = hit & (keys <= position[of, rows, None])
            if k_keep is not None:
                hit = hit & k_keep.repeat_interleave(H, 0)[of, None]
        return hit

    own = from_rows(slab, (B, H, Tq, Tk), chosen.device, tile=tile, unit=UNIT)
    return {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": UNIT, **own}
