"""`attention_quantised`: a reference of attention with INT8 or INT4 products, for inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends.numerics import state_dtype
from ..common.errors import require
from ..plan import Plan
from ..plan.entries import tile_view
from ..plan.options import is_count, spread_heads
from ._arguments import as_scale, check_inputs, describe
from .rows import take_rows


@torch.no_grad()
def attention_quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    qk_bits: int = 8,
    pv_bits: int = 8,
    q_group: int = 32,
    k_group: int = 64,
    centred: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Emulate attention over a plan with q, k, v and the weights rounded to INT8 or INT4.

    Symmetric quantisation: each group of rows has one scale, its largest absolute value over 127 (or 7); v
    has one per channel of a group. Weights `exp(score - row maximum)` are rounded to 127 (or 7) levels of
    [0, 1], and divided by the sum of the rounded weights, so rows still sum to 1. Groups are of rows in the
    plan's order: an order that makes neighbours alike has smaller errors.

    This plain PyTorch code defines the results, not the speed: integer products below 2^24 are exact in
    float32, so it computes with rounded floats. PAROAttention, arXiv 2506.16054, section 3.3; centring from
    SageAttention, 2410.02367.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`.
    plan : Plan
        Visible pairs.
    qk_bits, pv_bits : 8 or 4
        Bits of q and k; bits of weights and v.
    q_group, k_group : int
        Rows that share a scale: of q; of k and v.
    centred : bool
        Subtract the mean key of a head from its keys first: scores of a row change by a constant, and the
        error is smaller if the mean is large.
    scale : float, optional
        As in `attention`.

    Returns
    -------
    Tensor, [B,Hq,Tq,Dv]
        Without gradient.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 256, 64)
    >>> plan = sf.Plan.dense(256, 256)
    >>> off = sf.attention_quantised(q, k, v, plan) - sf.attention(q, k, v, plan)
    >>> float(off.norm() / sf.attention(q, k, v, plan).norm()) < 0.03
    True
    """
    check_inputs(q, k, v)
    require(
        (isinstance(plan, Plan), lambda: f"plan: {describe(plan)}; expected one Plan"),
        *(
            (n in (4, 8), lambda name=name, n=n: f"{name}={n!r}: expected 8 or 4")
            for name, n in (("qk_bits", qk_bits), ("pv_bits", pv_bits))
        ),
        *(
            (is_count(n, 1), lambda name=name, n=n: f"{name}={n!r}: expected rows >= 1")
            for name, n in (("q_group", q_group), ("k_group", k_group))
        ),
    )
    (B, H, Tq, D), wide = q.shape, state_dtype(q)
    factor, top = as_scale(scale, D), 2 ** (pv_bits - 1) - 1
    k, v = (x.expand(B, -1, -1, -1).repeat_interleave(H // k.shape[1], 1).to(wide) for x in (k, v))
    k = k - k.mean(2, keepdim=True) if centred else k
    q = rounded(q.to(wide), qk_bits, q_group, plan.q_order)
    k = rounded(k, qk_bits, k_group, plan.k_order)
    v = rounded(v, pv_bits, k_group, plan.k_order, channels=True)
    out = torch.zeros(B, H, Tq + 1, v.shape[-1], dtype=wide, device=q.device)
    for r in range(plan.tiles):
        view = tile_view(plan, r, B, H)
        rows, keys = (take_rows(x, at) for x, at in ((q, view.q_token), (k, view.k_token)))
        score = (rows @ keys.mT * factor).masked_fill(~view.keep, -torch.inf)
        highest = score.amax(-1, keepdim=True) if score.shape[-1] else score.new_zeros(*score.shape[:-1], 1)
        weight = torch.where(view.keep, (score - highest.clamp(min=-1e38)).exp(), 0)
        weight = (weight * top).round() / top
        found = weight @ take_rows(v, view.k_token) / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        at = torch.where(view.q_token < 0, Tq, view.q_token)
        out.scatter_(2, at[..., None].expand(*at.shape, out.shape[-1]), found)
    return out[:, :, :Tq].to(q.dtype)


def rounded(x: Tensor, bits: int, group: int, order: Tensor | None, *, channels: bool = False) -> Tensor:
    """Round `x [B,H,T,D]` to `bits` bits, with a scale per group of ordered rows (and per channel)."""
    B, H, T, D = x.shape
    if order is None:
        order = torch.arange(T, device=x.device)[None, None]
    at = spread_heads(order.long(), H).expand(B, -1, -1)
    rows = pad(take_rows(x, at) * (at >= 0)[..., None], (0, 0, 0, -at.shape[-1] % group))
    groups = rows.reshape(B, H, rows.shape[2] // group, group, D)
    top = 2 ** (bits - 1) - 1
    size = groups.abs().amax((3,) if channels else (3, 4), keepdim=True) / top
    size = torch.where(size > 0, size, 1.0)
    levels = ((groups / size).round().clamp(-top, top) * size).flatten(2, 3)[:, :, : at.shape[-1]]
    found = torch.cat([x, x[:, :, :1] if T else x.new_zeros(B, H, 1, D)], 2)
    found.scatter_(2, torch.where(at < 0, T, at)[..., None].expand(-1, -1, -1, D), levels)
    return found[:, :, :T]
