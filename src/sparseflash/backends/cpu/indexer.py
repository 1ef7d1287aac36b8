"""A learned indexer's choice on the CPU: `native/indexer.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .call import CODES, SMALL, View, view
from .library import run


class Call(ctypes.Structure):
    """SfIndexer."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "B", "H", "Tq", "Tk", "D", "topk")]
        + [("dtype", ctypes.c_int32), ("threads", ctypes.c_int32), ("q", View), ("k", View)]
        + [(n, ctypes.c_void_p) for n in ("weights", "low", "high", "keep", "index", "scores")]
    )


def indexer_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    keep: Tensor | None,
    *,
    topk: int,
    scored: bool,
) -> tuple[Tensor, Tensor]:
    """index int32 [B,Tq,topk] and, where `scored`, the scores in fp32."""
    B, H, Tq, D = q.shape
    call = Call(size=ctypes.sizeof(Call), B=B, H=H, Tq=Tq, Tk=k.shape[1], D=D, topk=topk)
    call.dtype, call.q, call.k = CODES[q.dtype], view(q), view(k[:, None])
    call.threads = 1 if B * H * Tq * D * k.shape[1] < SMALL else max(1, torch.get_num_threads())
    weights = weights.to(torch.float32).transpose(1, 2).contiguous()
    low, high = (x.to(torch.int32).contiguous() for x in (low, high))
    index = torch.empty((B, Tq, topk), dtype=torch.int32)
    scores = torch.empty((B, Tq, topk) if scored else (0,), dtype=torch.float32)
    call.weights, call.low, call.high = weights.data_ptr(), low.data_ptr(), high.data_ptr()
    call.index, call.scores = index.data_ptr(), scores.data_ptr() if scored else None
    if keep is not None:
        keep = keep.to(torch.uint8).contiguous()
        call.keep = keep.data_ptr()
    if index.numel():
        run("sf_indexer", call, q.dtype)
    return index, scores
