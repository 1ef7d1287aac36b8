"""Products with N:M sparse weights: `native/nm.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..numerics import NM
from .call import SMALL, aligned, empty
from .library import run


class NMCall(ctypes.Structure):
    """SfNM."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "T", "K", "O", "n", "m", "x_row", "w_out", "w_in")]
        + [("threads", ctypes.c_int32)]
        + [(n, ctypes.c_void_p) for n in ("x", "w", "y")]
    )


def nm_product(x: Tensor, weight: Tensor, options: NM) -> Tensor:
    """Product [T,O] of x [T,K] with the n largest of each m neighbouring inputs of weight [O,K]."""
    (T, K), outputs = x.shape, weight.shape[0]
    alive: list[Tensor] = []
    dtype = x.dtype
    x, weight = x.to(torch.float32), weight.to(torch.float32)
    x = aligned(x if x.stride(1) == 1 and x.stride(0) >= 0 else x.contiguous(), alive)
    weight = aligned(weight, alive)
    y = empty((T, outputs), dtype=torch.float32)
    call = NMCall(size=ctypes.sizeof(NMCall), T=T, K=K, O=outputs, n=options.n, m=options.m)
    call.x_row, call.w_out, call.w_in = x.stride(0), weight.stride(0), weight.stride(1)
    call.threads = 1 if T * K * outputs * options.n < SMALL * options.m else max(1, torch.get_num_threads())
    call.x, call.w, call.y = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    run("sf_nm", call, torch.float32)
    return y.to(dtype)
