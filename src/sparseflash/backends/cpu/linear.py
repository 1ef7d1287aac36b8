"""Linear attention on the CPU (`native/linear.h`): fp32 sums and states for every storage type."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..numerics import Linear, empty_like_layout
from .call import CODES, SMALL, View, empty, view
from .library import run


class Call(ctypes.Structure):
    """SfLinear."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "B", "Hq", "Hkv", "T", "D", "Dv")]
        + [("dtype", ctypes.c_int32), ("threads", ctypes.c_int32), ("scale", ctypes.c_float)]
        + [(n, View) for n in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")]
        + [(n, ctypes.c_void_p) for n in ("rate", "first", "dlast", "last", "dfirst")]
    )


def _address(x: Tensor | None, alive: list[Tensor]) -> int | None:
    """Address of a tensor as contiguous fp32, which is kept in `alive`; None for None."""
    if x is None:
        return None
    x = x.detach().to(torch.float32).contiguous()
    alive.append(x)
    return x.data_ptr()


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor | None,
    initial: Tensor | None,
    scale: float,
    alive: list[Tensor],
) -> Call:
    c = Call(size=ctypes.sizeof(Call), dtype=CODES[q.dtype], scale=scale, q=view(q), k=view(k), v=view(v))
    (c.B, c.Hq, c.T, c.D), c.Hkv, c.Dv = q.shape, k.shape[1], v.shape[3]
    work = c.B * c.Hq * c.T * (c.D + c.Dv) * 64
    c.threads = 1 if work < SMALL else max(1, torch.get_num_threads())
    c.rate, c.first = _address(rate, alive), _address(initial, alive)
    return c


def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, initial: Tensor | None, options: Linear
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,T,Dv] and the state after the last token, fp32 [B,Hq,D,Dv]."""
    alive: list[Tensor] = []
    call = _call(q, k, v, rate, initial, options.scale, alive)
    out = empty_like_layout(q, v.shape[3])
    last = empty((*q.shape[:2], q.shape[3], v.shape[3]), dtype=torch.float32)
    call.out, call.last = view(out), last.data_ptr()
    run("sf_linear_forward", call, q.dtype)
    return out, last


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
    """dq, dk, dv in the dtype of the inputs, and the gradient of the initial state in fp32."""
    alive: list[Tensor] = []
    call = _call(q, k, v, rate, initial, options.scale, alive)
    dout = dout.to(q.dtype)
    dq, dk, dv = (empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    dinitial = empty((*q.shape[:2], q.shape[3], v.shape[3]), dtype=torch.float32)
    call.dout, call.dq, call.dk, call.dv = view(dout), view(dq), view(dk), view(dv)
    call.dlast, call.dfirst = _address(dstate, alive), dinitial.data_ptr()
    run("sf_linear_backward", call, q.dtype)
    return dq, dk, dv, dinitial
