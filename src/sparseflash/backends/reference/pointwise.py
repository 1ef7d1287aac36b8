"""Pointwise attention over a plan: a weight f(score) for every visible pair, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.entries import tile_view
from ..numerics import Pointwise, empty_like_layout
from .rows import Rows


def _weight(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """f(x) and its derivative."""
    if activation == "silu":
        share = torch.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    up = x.clamp(min=0)
    return up * up, 2 * up


def pointwise_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    options: Pointwise,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """out [B,Hq,Tq,Dv] of `out_dtype`."""
    B, H = q.shape[:2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = empty_like_layout(q, v.shape[-1], out_dtype).zero_()
    for r in range(plan.tiles):
        view = tile_view(plan, r, B, H)
        seen, live = view.keep.any(-2), view.keep.any(-1)  # keys that no query sees may be NaN
        queries, keys = Rows(view.q_token, H), Rows(view.k_token, k.shape[1])
        x = queries.read(q, work, live) @ keys.read(k, work, seen).transpose(-1, -2) * options.scale
        weight = torch.where(view.keep, _weight(x, options.activation)[0] * options.out_scale, 0)
        rows = weight @ Rows(view.k_token, v.shape[1]).read(v, work, seen)
        queries.write(out, torch.where(live[..., None], rows, 0))
    return out


def pointwise_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    options: Pointwise,
    *,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `grad_dtype`."""
    B, H = q.shape[:2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=q.device) for x in (q, k, v))
    for r in range(plan.tiles):
        view = tile_view(plan, r, B, H)
        seen, live = view.keep.any(-2), view.keep.any(-1)
        queries, keys = Rows(view.q_token, H), Rows(view.k_token, k.shape[1])
        qr, kr, vr = (
            rows.read(x, work, on) for rows, x, on in ((queries, q, live), (keys, k, seen), (keys, v, seen))
        )
        do = queries.read(dout, work, live) * options.out_scale
        weight, slope = _weight(qr @ kr.transpose(-1, -2) * options.scale, options.activation)
        ds = torch.where(view.keep, slope * (do @ vr.transpose(-1, -2)), 0) * options.scale
        keys.add(dv, torch.where(view.keep, weight, 0).transpose(-1, -2) @ do)
        keys.add(dk, ds.transpose(-1, -2) @ qr)
        queries.write(dq, torch.where(live[..., None], ds @ kr, 0))
    return dq.to(grad_dtype), dk.to(grad_dtype), dv.to(grad_dtype)
