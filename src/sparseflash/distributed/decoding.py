"""Decode few replicated queries over a key cache that is sharded over ranks: phase 2 of Star Attention."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from ..backends.numerics import merged
from ..common.errors import SparseFlashError
from ..ops._arguments import AnyPlan, check_inputs
from ..ops.attention import attention
from .context import ContextParallel
from .options import Options


def decode(
    cp: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan | None = None,
    **options: Unpack[Options],
) -> Any:
    """Attend from replicated queries to the keys of all ranks; every rank gets the result.

    Each rank attends to its own keys, and results are merged by log-sum-exp: messages have the size of the
    output, not of the cache. No gradient.

    Parameters
    ----------
    cp : ContextParallel
        The ranks; its layout and plan are not used.
    q : Tensor
        `[B,Hq,n,D]`, the same on every rank.
    k, v : Tensor
        This rank's keys and values, `[B,Hkv,m,D]` and `[B,Hkv,m,Dv]`; m may differ, and be 0.
    plan : Plan or tuple of Plan, optional
        Plan of q over this rank's keys; by default all pairs. With several queries, the rank that holds the
        newest keys passes a causal plan.
    scale, softcap, key_bias, backend, return_lse
        As in `sparseflash.attention`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 32)
    >>> cp = sf.distributed.context_parallel(None)
    >>> torch.allclose(sf.distributed.decode(cp, q, k, v), sf.attention(q, k, v), atol=1e-6)
    True
    """
    known = ("scale", "softcap", "key_bias", "backend", "return_lse")
    for name in options:
        if name not in known:
            raise SparseFlashError(
                f"{name}= of decode over ranks: every rank would count it for itself, among the keys that it "
                f"has; expected {', '.join(known)}"
            )
    check_inputs(q, k, v)
    return_lse = options.pop("return_lse", False)
    with torch.no_grad():
        out, lse = attention(q, k, v, plan, return_lse=True, out_dtype=torch.float32, **options)
        if cp.peers is not None:
            cp.at("merging of a decoding step")
            both = torch.cat([out, lse[..., None]], -1).contiguous()
            parts = cp.peers.gather(both)
            out, lse = merged([(x[..., :-1], x[..., -1]) for x in parts])
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out
