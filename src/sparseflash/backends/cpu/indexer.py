"""A learned indexer on the CPU: its choice (`native/indexer.h`) and its loss (`native/indexer_loss.h`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..numerics import Choice, Likeness
from .call import CODES, SMALL, View, empty, view
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
    options: Choice,
) -> tuple[Tensor, Tensor]:
    """index int32 [B,Tq,topk] and, where `scored`, the scores in fp32."""
    (B, H, Tq, D), topk, scored = q.shape, options.topk, options.scored
    call = Call(size=ctypes.sizeof(Call), B=B, H=H, Tq=Tq, Tk=k.shape[1], D=D, topk=topk)
    call.dtype, call.q, call.k = CODES[q.dtype], view(q), view(k[:, None])
    call.threads = 1 if B * H * Tq * D * k.shape[1] < SMALL else max(1, torch.get_num_threads())
    weights = weights.to(torch.float32).transpose(1, 2).contiguous()
    low, high = (x.to(torch.int32).contiguous() for x in (low, high))
    index = empty((B, Tq, topk), dtype=torch.int32)
    scores = empty((B, Tq, topk) if scored else (0,), dtype=torch.float32)
    call.weights, call.low, call.high = weights.data_ptr(), low.data_ptr(), high.data_ptr()
    call.index, call.scores = index.data_ptr(), scores.data_ptr() if scored else None
    if keep is not None:
        keep = keep.to(torch.uint8).contiguous()
        call.keep = keep.data_ptr()
    if index.numel():
        run("sf_indexer", call, q.dtype)
    return index, scores


class LossCall(ctypes.Structure):
    """SfIndexerLoss."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "B", "H", "Tq", "Tk", "D", "Hq", "Hkv", "Dm", "n")]
        + [(n, ctypes.c_int32) for n in ("index_dtype", "dtype", "threads")]
        + [(n, ctypes.c_float) for n in ("index_scale", "scale", "softcap")]
        + [(n, View) for n in ("q_index", "k_index", "q", "k")]
        + [(n, ctypes.c_void_p) for n in ("weights", "lse", "low", "high", "keep", "index")]
        + [(n, ctypes.c_void_p) for n in ("loss", "dq", "dk", "dw")]
    )


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
    """The loss summed over queries, and its gradients by q_index, k_index, weights in their shapes, fp32."""
    (B, H, Tq, D), Tk = q_index.shape, k_index.shape[1]
    call = LossCall(size=ctypes.sizeof(LossCall), B=B, H=H, Tq=Tq, Tk=Tk, D=D)
    call.Hq, call.Hkv, call.Dm = q.shape[1], k.shape[1], q.shape[3]
    call.index_dtype, call.dtype = CODES[q_index.dtype], CODES[q.dtype]
    call.index_scale, call.scale, call.softcap = options.index_scale, options.scale, options.softcap
    call.q_index, call.k_index, call.q, call.k = view(q_index), view(k_index[:, None]), view(q), view(k)
    weights = weights.to(torch.float32).transpose(1, 2).contiguous()
    lse = lse.to(torch.float32).contiguous()
    low, high = (x.to(torch.int32).contiguous() for x in (low, high))
    call.weights, call.lse, call.low, call.high = (x.data_ptr() for x in (weights, lse, low, high))
    if keep is not None:
        keep = keep.to(torch.uint8).contiguous()
        call.keep = keep.data_ptr()
    keys = Tk
    if index is not None:
        index = index.clamp(-1, Tk).to(torch.int32).contiguous()
        call.n = keys = index.shape[2]
        call.index = index.data_ptr()
    work = B * Tq * keys * (H * D + q.shape[1] * q.shape[3])
    call.threads = 1 if work < SMALL else max(1, torch.get_num_threads())
    loss, dq, dk, dw = (
        empty(s, dtype=torch.float32) for s in ((B, Tq), (B, Tq, H, D), (B, Tk, D), (B, Tq, H))
    )
    call.loss, call.dq, call.dk, call.dw = (x.data_ptr() for x in (loss, dq, dk, dw))
    if keys and loss.numel():
        run("sf_indexer_loss", call, torch.float32)
    else:
        for x in (loss, dq, dk, dw):
            x.zero_()
    return loss.sum(), dq.transpose(1, 2), dk, dw.transpose(1, 2)
