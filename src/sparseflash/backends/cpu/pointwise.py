"""Pointwise attention on the native library: attention's kernels with another function of the score."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Plan
from ..numerics import Pointwise, empty_like_layout
from .call import CODES, aligned, call_of, empty, names_all, view, zeros
from .library import run

WEIGHTS = {"silu": 1, "relu2": 2}


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
    alive: list[Tensor] = []
    call = call_of(q, k, v, plan, options.scale, 0.0, None, alive)
    out = empty_like_layout(q, v.shape[-1], out_dtype)
    if not names_all(plan):  # tokens without a row see nothing
        out.zero_()
    call.weights, call.out_scale = WEIGHTS[options.activation], options.out_scale
    call.out_dtype, call.out = CODES[out_dtype], view(out)
    run("sf_forward", call, q.dtype)
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
    alive: list[Tensor] = []
    call = call_of(q, k, v, plan, options.scale, 0.0, None, alive)
    dout = aligned(dout.to(q.dtype), alive)
    make = empty if names_all(plan) else zeros
    dq = make(q.shape, dtype=grad_dtype)
    dk, dv = empty(k.shape, dtype=grad_dtype), empty(v.shape, dtype=grad_dtype)
    call.weights, call.out_scale = WEIGHTS[options.activation], options.out_scale
    call.grad_dtype, call.dout = CODES[grad_dtype], view(dout)
    call.dq, call.dk, call.dv = view(dq), view(dk), view(dv)
    run("sf_backward", call, q.dtype)
    return dq, dk, dv
