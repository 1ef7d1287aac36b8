"""Softmax attention over a plan, its gradients and its statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.entries import TileView, standing, tile_parts, tile_view
from ..numerics import (
    NEVER,
    Numbers,
    Softmax,
    Statistics,
    bends,
    blocks,
    dropout_bar,
    empty_like_layout,
    over_plans,
    unit_of,
)
from . import dropout, skipping
from .rows import Rows

STREAMED = 1 << 19
"""Maximum number of pairs whose weights `stats` holds at a time."""
ROUNDING = 2.0**-16
"""Lower bound of 1 - P, the rest of a row beside one weight: anything less is rounding."""


def _logits(
    q: Tensor,
    k: Tensor,
    view: TileView,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The x of a tile's masked logits `unit * x` (see `numerics`), and the softcap's tanh or None."""
    x = q @ k.transpose(-1, -2)
    bent = None
    if bends(scale, softcap, bias, pairs):
        x = x * scale
    if softcap:
        bent = torch.tanh(x / softcap)
        x = bent * softcap
    if bias is not None:
        x = x + bias[..., None, :]
    if pairs is not None:
        x = x + pairs
    return x.masked_fill_(~view.keep, NEVER), bent


def _weights(x: Tensor, norm: Tensor, unit: float, seen: Tensor) -> Tensor:
    """exp(unit * x - lse), in place, 0 for unseen pairs; lse is subtracted in its two parts, top and rest."""
    top, rest = norm[..., None]
    return x.sub_(top).mul_(unit).sub_(rest).exp_().masked_fill_(~(seen & (top > NEVER)), 0)


def _factor(seed: Tensor, options: Softmax, numbers: Numbers | None, view: TileView, like: Tensor) -> Tensor:
    """Dropout's factor of each weight of a tile: 0, or one over the share that is kept."""
    q, k = view.q_token, view.k_token
    if numbers is not None:
        q, k = (own.to(x.device)[x.clamp(min=0)] for x, own in zip((q, k), numbers))
    keep = dropout.left(seed, dropout_bar(options.dropout), q, k, options.head)
    return keep.to(like.dtype) / (1 - options.dropout)


def _pairs(
    plan: Plan, view: TileView, alibi_slopes: Tensor | None, pair_bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Bias of a tile's pairs: ALiBi, -slope * |distance of positions|, plus pair_bias."""
    total = None
    B, H, _ = view.q_token.shape
    if alibi_slopes is not None:
        q, k = standing(plan, view.q_token, view.k_token)
        distance = (q[..., :, None] - k[..., None, :]).abs().to(dtype)
        total = distance * -alibi_slopes.to(dtype).view(-1, H, 1, 1)
    if pair_bias is not None:
        b, h = (torch.arange(n, device=pair_bias.device) for n in (B, H))
        at = view.q_token.clamp(min=0)[..., :, None], view.k_token.clamp(min=0)[..., None, :]
        if pair_bias.dim() == 3:
            whole, at = pair_bias.expand(B, H, -1), (at[1] - at[0] + plan.Tq - 1,)
        else:
            whole = pair_bias.expand(B, H, plan.Tq, plan.Tk)
        given = whole[b[:, None, None, None], h[:, None, None], *at].to(dtype)
        total = given if total is None else total + given
    return total


def _bias_rows(key_bias: Tensor | None, keys: Rows, heads: int, dtype: torch.dtype) -> Tensor | None:
    if key_bias is None:
        return None
    rows = Rows(keys.token, key_bias.shape[1])
    return rows.read(key_bias.expand(keys.token.shape[0], -1, -1), dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    options: Softmax,
    *,
    key_bias: Tensor | None,
    out_dtype: torch.dtype,
    normed: bool,
    seed: Tensor | None = None,
    numbers: Numbers | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    skipped: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B,Hq,Tq,Dv] of `out_dtype`, lse fp32 (fp64) [B,Hq,Tq], and its norm [2,B,Hq,Tq]."""
    B, H, Tq, _ = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale, softcap = options.scale, options.softcap
    unit = unit_of(scale, softcap, key_bias, alibi_slopes, pair_bias)
    out = empty_like_layout(q, v.shape[-1], out_dtype).zero_()
    lse = torch.full((B, H, Tq), NEVER, dtype=work, device=q.device)
    norm = torch.stack([lse, torch.zeros_like(lse)])
    for r in range(plan.tiles):
        view = tile_view(plan, r, B, H)
        if not view.keep.shape[-1]:
            continue
        seen = view.keep.any(-2)  # keys that no query sees may be NaN
        queries, keys, values = (
            Rows(view.q_token, H),
            Rows(view.k_token, k.shape[1]),
            Rows(view.k_token, v.shape[1]),
        )
        x, _ = _logits(
            queries.read(q, work),
            keys.read(k, work, seen),
            view,
            scale,
            softcap,
            _bias_rows(key_bias, keys, H, work),
            _pairs(plan, view, alibi_slopes, pair_bias, work),
        )
        if skipped is not None:
            x = skipping.without_minor(x, view, plan, r, options.skip / unit, skipped)
        top = x.amax(-1)
        p = x.sub_(torch.where(top == NEVER, 0, top)[..., None]).mul_(unit).exp_()
        total = p.sum(-1)
        rest = torch.where(total > 0, total, 1).log()
        if seed is not None:
            p = p * _factor(seed, options, numbers, view, p)
        queries.write(out, p @ values.read(v, work, seen) / total.clamp(min=1)[..., None])
        queries.write(lse, (top.double() * unit + rest).to(work))
        queries.write(norm[0], top)
        queries.write(norm[1], rest)
    return out, lse, norm if normed else None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    options: Softmax,
    *,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decode: the same attention, merged over plans and sinks; backends differ in how fast they read keys."""
    softmax = over_plans(
        forward, q, k, v, plans, options, key_bias=key_bias, sink_logits=sink_logits, normed=False
    )
    return softmax[:2]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    norm: Tensor,
    dlse: Tensor | None,
    plan: Plan,
    options: Softmax,
    *,
    delta: Tensor | None = None,
    key_bias: Tensor | None,
    grad_dtype: torch.dtype | None,
    seed: Tensor | None = None,
    numbers: Numbers | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    dpair: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients for a given norm: dq, dk, dv (in `grad_dtype`), dbias [B,Hq,Tk] fp32|fp64."""
    B, H, Tq, D = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq = torch.zeros(B, H, Tq, D, dtype=work, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=work, device=q.device) for x in (k, v))
    scale, softcap = options.scale, options.softcap
    unit = unit_of(scale, softcap, key_bias, alibi_slopes, pair_bias)
    dbias = torch.zeros(B, H, k.shape[2], dtype=work, device=q.device) if key_bias is not None else None
    for r in range(plan.tiles):
        view = tile_view(plan, r, B, H)
        if not view.keep.shape[-1]:
            continue
        seen, live = view.keep.any(-2), view.keep.any(-1)
        queries, keys, values = (
            Rows(view.q_token, H),
            Rows(view.k_token, k.shape[1]),
            Rows(view.k_token, v.shape[1]),
        )
        qr, kr, vr = queries.read(q, work, live), keys.read(k, work, seen), values.read(v, work, seen)
        do = queries.read(dout, work, live)
        pairs = _pairs(plan, view, alibi_slopes, pair_bias, work)
        x, bent = _logits(qr, kr, view, scale, softcap, _bias_rows(key_bias, keys, H, work), pairs)
        p = _weights(x, torch.stack([queries.read(n, work, live) for n in norm]), unit, view.keep)
        level = (
            (do * queries.read(out, work, live)).sum(-1) if delta is None else queries.read(delta, work, live)
        )
        if dlse is not None:
            level = level - queries.read(dlse, work, live)
        of_weights = do @ vr.transpose(-1, -2)
        if seed is None:
            ds = p * (of_weights - level[..., None])
        else:
            factor = _factor(seed, options, numbers, view, p)
            ds = p * (of_weights * factor - level[..., None])
            p = p * factor
        values.add(dv, p.transpose(-1, -2) @ do)
        if dbias is not None:
            Rows(view.k_token, H).add(dbias, ds.sum(-2))
        if dpair is not None:
            b, h, i, j = at = view.keep.nonzero(as_tuple=True)
            query, key = view.q_token[b, h, i], view.k_token[b, h, j]
            if dpair.dim() == 3:
                dpair.index_put_((b, h, key - query + Tq - 1), ds[at], accumulate=True)
            else:
                dpair[b, h, query, key] = ds[at]
        if bent is not None:
            ds = ds * (1 - bent * bent)
        queries.write(dq, ds @ kr * scale)
        keys.add(dk, ds.transpose(-1, -2) @ qr * scale)
    wanted = grad_dtype or q.dtype
    return dq.to(wanted), dk.to(wanted), dv.to(wanted), dbias


def stats(
    q: Tensor,
    k: Tensor,
    norm: Tensor,
    plan: Plan,
    options: Statistics,
    *,
    key_bias: Tensor | None,
) -> Tensor:
    """Sums (or maxima) of the weights under a norm, by key, row, entry, diagonal or block: [B,Hq,width]."""
    return _stats(q, k, norm, plan, options, key_bias, None)


def influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    norm: Tensor,
    delta: Tensor,
    plan: Plan,
    options: Statistics,
    *,
    key_bias: Tensor | None,
) -> Tensor:
    """Statistics of |P (delta - dP) / (1 - P)|, or of |P dP| where 1 - P is no more than rounding."""
    return _stats(q, k, norm, plan, options, key_bias, (v, dout, delta))


def _stats(
    q: Tensor,
    k: Tensor,
    norm: Tensor,
    plan: Plan,
    options: Statistics,
    key_bias: Tensor | None,
    slopes: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    B, H, Tq, _ = q.shape
    Tk, over, peak, width = k.shape[2], options.over, options.peak, options.width
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale, softcap = options.scale, options.softcap
    unit = unit_of(scale, softcap, key_bias)
    total = torch.zeros(B * H, width + 1, dtype=work, device=q.device)
    owner = torch.arange(B * H, device=q.device).view(B, H, 1, 1)
    most = max(1, STREAMED // max(B * H * plan.tile, 1))
    views = ((r, view) for r in range(plan.tiles) for view in tile_parts(plan, r, B, H, most))
    for r, view in views:
        if not view.keep.shape[-1]:
            continue
        seen, live = view.keep.any(-2), view.keep.any(-1)
        queries, keys = Rows(view.q_token, H), Rows(view.k_token, k.shape[1])
        x, _ = _logits(
            queries.read(q, work, live),
            keys.read(k, work, seen),
            view,
            scale,
            softcap,
            _bias_rows(key_bias, keys, H, work),
        )
        given = torch.stack([queries.read(n, work, live) for n in norm])
        known = view.keep & (given[0] > NEVER)[..., None]
        p = _weights(x, given, unit, known)
        if slopes is not None:
            v, dout, delta = slopes
            values = Rows(view.k_token, v.shape[1]).read(v, work, seen)
            dp = queries.read(dout, work, live) @ values.transpose(-1, -2)
            rest, moved = 1 - p, p * (queries.read(delta, work, live)[..., None] - dp)
            p = torch.where(rest < max(ROUNDING, torch.finfo(q.dtype).eps), p * dp, moved / rest).abs()
            p = p.masked_fill_(~known, 0)
        if over == "key":
            place, p = view.k_token[..., None, :], (p.amax(-2) if peak else p.sum(-2))[..., None, :]
        elif over == "row":
            place, p = view.q_token[..., :, None], (p.amax(-1) if peak else p.sum(-1))[..., :, None]
        elif over == "entry":
            per = width // plan.tiles
            place, p = (
                torch.where(view.entry < 0, -1, r * per + view.entry)[..., None, :],
                (p.amax(-2) if peak else p.sum(-2))[..., None, :],
            )
        elif over == "block":
            units = blocks(Tq, Tk, options.tile, options.unit)[1]
            down, across = view.q_token // options.tile, view.k_token // options.unit
            place = torch.where(known, down[..., :, None] * units + across[..., None, :], width)
        else:
            place = view.q_token[..., :, None] - view.k_token[..., None, :] + Tk - 1
            place = torch.where(known, place, width)
        place = torch.where(place < 0, width, place).expand_as(p)
        flat = (owner * (width + 1) + place).flatten()
        total.view(-1).scatter_reduce_(0, flat, p.flatten().to(work), "amax" if peak else "sum")
    return total[:, :width].contiguous().view(B, H, width)
