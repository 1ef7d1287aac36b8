"""Linear attention with decay, chunk by chunk: a masked product inside a chunk, a state between chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics import Linear, empty_like_layout

CHUNK = 64


def _work(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _chunks(q: Tensor, rate: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield each chunk's slice and its decay factors.

    They are: between its tokens [H,n,n] (0 towards the future), from the token before the chunk [H,n,1], and
    to its last token [H,n,1].
    """
    H, T = q.shape[1], q.shape[2]
    rate = torch.zeros(H, device=q.device) if rate is None else rate
    slope = rate.to(torch.float64)[:, None, None]
    for first in range(0, T, CHUNK):
        n = min(CHUNK, T - first)
        at = torch.arange(n, device=q.device)
        apart = (at[:, None] - at).clamp(min=0)
        between = torch.exp(-slope * apart).tril()
        before = torch.exp(-slope * (at[:, None] + 1))
        after = torch.exp(-slope * (n - 1 - at[:, None]))
        yield slice(first, first + n), *(x.to(_work(q)) for x in (between, before, after))


def _heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Repeat k or v for every query head."""
    return x.to(dtype).repeat_interleave(heads // x.shape[1], 1)


def _start(initial: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    if initial is not None:
        return initial.to(_work(q), copy=True)
    return torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=_work(q), device=q.device)


def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, initial: Tensor | None, options: Linear
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,T,Dv] and the state after the last token, fp32 (fp64) [B,Hq,D,Dv]."""
    work, H = _work(q), q.shape[1]
    out = empty_like_layout(q, v.shape[-1])
    state = _start(initial, q, v)
    for rows, between, before, after in _chunks(q, rate):
        qc = q[:, :, rows].to(work)
        kc, vc = (_heads(x[:, :, rows], H, work) for x in (k, v))
        inside = (qc @ kc.transpose(-1, -2) * between) @ vc
        out[:, :, rows] = ((inside + before * (qc @ state)) * options.scale).to(out.dtype)
        state = before[:, -1:] * state + (after * kc).transpose(-1, -2) @ vc
    return out, state


def linear_backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor | None,
    initial: Tensor | None,
    options: Linear,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of the inputs, and the gradient of the initial state."""
    (B, H, T, _), work, Hkv = q.shape, _work(q), k.shape[1]
    dq, dk, dv = (torch.zeros(B, H, T, x.shape[-1], dtype=work, device=q.device) for x in (q, k, v))
    chunks = list(_chunks(q, rate))
    state = _start(initial, q, v)
    for rows, between, before, after in chunks:
        kc, vc = (_heads(x[:, :, rows], H, work) for x in (k, v))
        do = dout[:, :, rows].to(work) * options.scale
        weight = (do @ vc.transpose(-1, -2)) * between
        dq[:, :, rows] = weight @ kc + before * (do @ state.transpose(-1, -2))
        state = before[:, -1:] * state + (after * kc).transpose(-1, -2) @ vc
    slope = _start(dstate, q, v)
    for rows, between, before, after in reversed(chunks):
        qc, do = q[:, :, rows].to(work), dout[:, :, rows].to(work) * options.scale
        kc, vc = (_heads(x[:, :, rows], H, work) for x in (k, v))
        weight = (do @ vc.transpose(-1, -2)) * between
        score = (qc @ kc.transpose(-1, -2)) * between
        dk[:, :, rows] = weight.transpose(-1, -2) @ qc + after * (vc @ slope.transpose(-1, -2))
        dv[:, :, rows] = score.transpose(-1, -2) @ do + after * (kc @ slope)
        slope = before[:, -1:] * slope + (before * qc).transpose(-1, -2) @ do
    dk, dv = (x.unflatten(1, (Hkv, H // Hkv)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), slope
