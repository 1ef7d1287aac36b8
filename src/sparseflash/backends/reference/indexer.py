"""A learned indexer's choice of keys and its KL loss, some queries at a time: the definition."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics import Choice, Likeness

HELD = 1 << 22
"""Maximum number of (query, head, key) products held at a time."""


def indexer_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    keep: Tensor | None,
    options: Choice,
) -> tuple[Tensor, Tensor]:
    """index int32 [B,Tq,topk] and, where `scored`, the scores in fp32 (fp64)."""
    (B, H, Tq, _), Tk, topk, scored = q.shape, k.shape[1], options.topk, options.scored
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    at = torch.arange(Tk, device=q.device)
    columns = k.to(work)[:, None].transpose(-1, -2)
    if keep is not None:
        columns = columns.masked_fill(~keep[:, None, None], 0)
    index = torch.empty((B, Tq, topk), dtype=torch.int32, device=q.device)
    scores = torch.empty((B, Tq, topk) if scored else (0,), dtype=work, device=q.device)
    step = max(1, HELD // max(1, B * H * Tk))
    for first in range(0, Tq, step):
        rows = slice(first, first + step)
        products = (q[:, :, rows].to(work) @ columns).relu()
        score = (products * weights[:, :, rows, None].to(work)).sum(1)
        score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        seen = (at >= low[:, rows, None]) & (at < high[:, rows, None])
        if keep is not None:
            seen = seen & keep[:, None]
        # order: visible keys first, then the larger score, then the lower index
        order = score.argsort(stable=True, dim=-1, descending=True)
        order = order.gather(-1, seen.gather(-1, order).byte().argsort(stable=True, dim=-1, descending=True))
        chosen = order[..., :topk].masked_fill(~seen.gather(-1, order[..., :topk]), Tk).sort(-1).values
        missing = chosen == Tk
        index[:, rows] = chosen.masked_fill(missing, -1).int()
        if scored:
            found = score.gather(-1, chosen.clamp(max=max(Tk - 1, 0)))
            scores[:, rows] = found.masked_fill(missing, -torch.inf)
    return index, scores


def _pieces(
    index: Tensor | None, low: Tensor, high: Tensor, keep: Tensor | None, Tk: int, step: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield some queries at a time: slice, keys to compare [B|1,1|n,m], and which a query sees [B,n,m]."""
    B, Tq = low.shape
    for first in range(0, Tq, step):
        rows = slice(first, min(first + step, Tq))
        lo, hi = low[:, rows, None], high[:, rows, None]
        if index is None:
            top = max(1, int(hi.max())) if hi.device.type == "cpu" else Tk
            at = torch.arange(top, device=low.device)[None, None]
            seen = (at >= lo) & (at < hi)
        else:
            at = index[:, rows].long().sort(-1).values
            seen = (at >= lo) & (at < hi)  # excludes -1, an empty place
            seen[..., 1:] &= at[..., 1:] != at[..., :-1]
            at = at.clamp(0, Tk - 1)
        if keep is not None:
            real = keep[:, None].expand(-1, at.shape[1], -1)
            seen = seen & real.gather(-1, at.expand(B, -1, -1))
        yield rows, at, seen


def _target(q: Tensor, own: Tensor, lse: Tensor, scale: float, softcap: float) -> Tensor:
    """Unnormalised target p [B,n,m], summed over heads, for each query's keys [B,Hkv,n|1,m,D]."""
    q = q.unflatten(1, (own.shape[1], -1)).transpose(2, 3).to(own.dtype)  # [B,Hkv,n,group,D]
    s = (q @ own.transpose(-1, -2) * scale).transpose(2, 3).flatten(1, 2)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    lse = lse.to(s.dtype).masked_fill(lse == -math.inf, math.inf)  # a head that saw nothing counts nothing
    return (s - lse[..., None]).exp_().sum(1)


def indexer_loss(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index: Tensor | None,
    low: Tensor,
    high: Tensor,
    keep: Tensor | None,
    options: Likeness,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss summed over queries, and its gradients by q_index, k_index and weights, in their shapes."""
    (B, H, Tq, D), Tk = q_index.shape, k_index.shape[1]
    work = torch.float64 if q_index.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=work, device=q.device)
    dq = torch.zeros((B, Tq, H, D), dtype=work, device=q.device)
    dw = torch.zeros((B, Tq, H), dtype=work, device=q.device)
    dk = torch.zeros((B, Tk, D), dtype=work, device=q.device)
    keys, width = k_index.to(work), Tk if index is None else index.shape[-1]
    held = max(H, q.shape[1], 1 if index is None else max(D, k.shape[1] * k.shape[3]))
    step = max(1, HELD // max(1, B * width * held))
    b = torch.arange(B, device=q.device)[:, None, None]
    for rows, at, seen in _pieces(index, low, high, keep, Tk, step) if Tk and width else ():
        if index is None:
            some = seen.any(1)[..., None]
            own = torch.where(some, keys[:, : at.shape[-1]], 0)[:, None]
            main = torch.where(some[:, None], k[:, :, : at.shape[-1]].to(work), 0)[:, :, None]
        else:
            own = torch.where(seen[..., None], keys[b, at], 0)
            main = torch.where(seen[..., None], k.transpose(1, 2)[b, at].movedim(3, 0), 0).movedim(0, 1)
            main = main.to(work)
        p = _target(q[:, :, rows], main, lse[:, :, rows], options.scale, options.softcap)
        p = p.masked_fill(~seen, 0)
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(work).tiny)
        x, w = q_index[:, :, rows].transpose(1, 2).to(work), weights[:, :, rows].transpose(1, 2).to(work)
        products = (x @ own.transpose(-1, -2) * options.index_scale).relu()  # [B,n,H,m]
        score = (w[..., None, :] @ products)[..., 0, :].masked_fill(~seen, -math.inf)
        some = seen.any(-1, keepdim=True)
        log = torch.where(seen, score.masked_fill(~some, 0).log_softmax(-1), 0)
        total += (torch.xlogy(p, p) - p * log).sum()
        slope = torch.where(seen, log.exp() - p, 0)[..., None, :]  # of the loss by the score, [B,n,1,m]
        dw[:, rows] = (products @ slope.transpose(-1, -2))[..., 0]
        slope = slope * (w[..., None] * options.index_scale) * (products > 0)
        dq[:, rows] = slope @ own
        if index is None:
            dk[:, : at.shape[-1]] += slope.flatten(1, 2).transpose(-1, -2) @ x.flatten(1, 2)
        else:
            share = slope.transpose(-1, -2) @ x
            for i in range(B):
                dk[i].index_add_(0, at[i].flatten(), share[i].flatten(0, 1))
    return total, dq.transpose(1, 2), dk, dw.transpose(1, 2)
