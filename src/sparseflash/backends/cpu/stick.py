"""Stick-breaking attention on the CPU (`native/stick.h`): fp32 arithmetic for every storage type."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Plan
from ..numerics import Stick, empty_like_layout
from .call import aligned, call_of, empty, names_all, view, zeros
from .library import run


def stick_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick) -> tuple[Tensor, Tensor]:
    """out [B,Hq,Tq,Dv] and rem, fp32 [B,Hq,Tq]."""
    alive: list[Tensor] = []
    call = call_of(q, k, v, plan, options.scale, 0.0, None, alive)
    out = empty_like_layout(q, v.shape[-1])
    rem = empty(q.shape[:3], dtype=torch.float32)
    if not names_all(plan):  # tokens without a row see nothing
        out.zero_()
        rem.fill_(1)
    call.out, call.lse = view(out), rem.data_ptr()
    run("sf_stick_forward", call, torch.float32)
    return out, rem


def stick_backward(
    dout: Tensor, drem: Tensor | None, q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of the inputs."""
    alive: list[Tensor] = []
    call = call_of(q, k, v, plan, options.scale, 0.0, None, alive)
    dout = aligned(dout.to(q.dtype), alive)
    make = empty if names_all(plan) else zeros
    dq = make(q.shape, dtype=q.dtype)
    dk, dv = empty(k.shape, dtype=k.dtype), empty(v.shape, dtype=v.dtype)
    call.dout, call.dq, call.dk, call.dv = view(dout), view(dq), view(dk), view(dv)
    if drem is not None:
        drem = aligned(drem.to(torch.float32).contiguous(), alive)
        call.dlse = drem.data_ptr()
    run("sf_stick_backward", call, torch.float32)
    return dq, dk, dv
