"""Stick-breaking attention over a plan: each key takes a share of what newer keys left, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.entries import tile_view
from ..numerics import Stick, empty_like_layout
from .rows import Rows


@dataclass(frozen=True)
class _Tile:
    """One tile, its keys sorted by row: queries, keys and values, shares b, weights P and what is left."""

    queries: Rows
    keys: Rows
    values: Rows
    live: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    share: Tensor
    weight: Tensor
    rest: Tensor


def _tiles(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Iterator[_Tile]:
    B, H = q.shape[:2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    for r in range(plan.tiles):
        view = tile_view(plan, r, B, H)
        if not view.keep.shape[-1]:
            continue
        place = view.k_row.argsort(-1)
        token = view.k_token.gather(-1, place)
        keep = view.keep.gather(-1, place[..., None, :].expand_as(view.keep))
        seen, live = keep.any(-2), keep.any(-1)
        queries, keys, values = Rows(view.q_token, H), Rows(token, k.shape[1]), Rows(token, v.shape[1])
        qr, kr, vr = queries.read(q, work, live), keys.read(k, work, seen), values.read(v, work, seen)
        z = (qr @ kr.transpose(-1, -2)) * scale
        share = torch.where(keep, torch.sigmoid(z), 0)
        left = torch.where(keep, torch.sigmoid(-z), 1).flip(-1).cumprod(-1).flip(-1)
        newer = torch.nn.functional.pad(left[..., 1:], (0, 1), value=1.0)
        yield _Tile(queries, keys, values, live, qr, kr, vr, share, share * newer, left[..., 0])


def stick_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick) -> tuple[Tensor, Tensor]:
    """out [B,Hq,Tq,Dv] and rem, fp32 (fp64) [B,Hq,Tq]."""
    out = empty_like_layout(q, v.shape[-1]).zero_()
    rem = torch.ones(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for tile in _tiles(q, k, v, plan, options.scale):
        tile.queries.write(out, tile.weight @ tile.v)
        tile.queries.write(rem, tile.rest)
    return out, rem


def stick_backward(
    dout: Tensor, drem: Tensor | None, q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of the inputs."""
    work = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=q.device) for x in (q, k, v))
    for tile in _tiles(q, k, v, plan, options.scale):
        do = tile.queries.read(dout, work, tile.live)
        slope = do @ tile.v.transpose(-1, -2)
        if drem is not None:
            slope = slope - tile.queries.read(drem, work, tile.live)[..., None]
        taken = tile.weight * slope
        dz = (taken - tile.share * taken.cumsum(-1)) * options.scale
        tile.queries.write(dq, dz @ tile.k)
        tile.keys.add(dk, dz.transpose(-1, -2) @ tile.q)
        tile.values.add(dv, tile.weight.transpose(-1, -2) @ do)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
