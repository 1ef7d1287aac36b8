"""`indexer_kl_loss`: KL divergence of a learned indexer from the attention it approximates, and gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import Likeness, state_dtype
from ..common.errors import SparseFlashError
from ..plan.options import INTEGERS
from ._arguments import as_backend, as_scale, as_softcap, check_inputs, describe
from ._register import Gradient, once, register
from .indexer import check_indexer, check_keep, ranges


def _forward(
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
    run = choose("indexer_loss", options.backend, q_index, k_index, q, k).indexer_loss
    total, dq, dk, dw = run(q_index, k_index, weights, q, k, lse, index, low, high, keep, options)
    return total, dq.contiguous(), dk.contiguous(), dw.contiguous()


def _empty(q_index: Any, k_index: Any, weights: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = state_dtype(q_index)
    dq, dk, dw = (x.new_empty(x.shape, dtype=work) for x in (q_index, k_index, weights))
    return q_index.new_empty((), dtype=work), dq, dk, dw


def _find(run: None, kept: Any, slopes: Any, options: Likeness) -> Any:
    total, *saved = kept
    if slopes[0] is None:
        return (None,) * 10
    # the saved gradients are constants and `total` is not: through it a second derivative reaches `once`
    return (*(once(slopes[0] * x, total) for x in saved), *(None,) * 7)


_loss = register(
    "indexer_kl_loss",
    _forward,
    _empty,
    gradient=Gradient(_find, lambda given, found: found, constants=3),
)


def indexer_kl_loss(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index: Tensor | None = None,
    *,
    causal: bool = True,
    q_offset: int | Tensor = 0,
    first_key: Tensor | None = None,
    k_keep: Tensor | None = None,
    index_scale: float = 1.0,
    scale: float | None = None,
    softcap: float | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """KL divergence of an indexer's softmax from the attention summed over heads: the indexer's loss.

    For a query, `sum over keys of p (log p - log softmax(score))`: p is the attention summed over heads, as a
    distribution over the keys compared, and score is that of `indexer_topk` (DeepSeek-V3.2, arXiv 2512.02556,
    equations 3 and 4). Without `index` all visible keys are compared: the warm-up, in which the indexer
    learns from dense attention. With `index` the selected keys are compared: the sparse stage. The forward
    processes queries in chunks and computes their gradients too, so extra memory is that of the gradients.
    The attention is a constant: only `q_index`, `k_index` and `weights` get gradients.

    Parameters
    ----------
    q_index, k_index, weights : Tensor
        `[B,H,Tq,D]`, `[B,Tk,D]`, `[B,H,Tq]`, as `indexer_topk` takes them.
    q, k : Tensor
        `[B,Hq,Tq,Dm]`, `[B,Hkv,Tk,Dm]`: queries and keys of the attention.
    lse : Tensor
        `[B,Hq,Tq]`: log-sum-exp from `attention(..., return_lse=True)`: of dense attention in the warm-up, of
        attention over `index` in the sparse stage. A head is weighted by its mass on the compared keys; an
        fp32 lse gives this mass to eps |lse|.
    index : Tensor, optional
        Integers `[B,Tq,n]`: keys of each query; -1, repeated and out-of-range ones are ignored.
    causal, q_offset, first_key, k_keep
        As in `indexer_topk`.
    index_scale : float
        Factor of the indexer's products (`scale` of `indexer_topk`).
    scale, softcap
        Scale and softcap of the attention.
    reduction : "mean" or "sum"
        Reduction over the queries that see a key.
    backend : str, optional
        "reference" or "cpu" for the attention's statistics; None chooses the fastest usable one.

    Returns
    -------
    Tensor
        A number, fp32 (fp64 for fp64 input).

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given, what is expected and how to fix it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 8, 100, 32)
    >>> out, lse = sf.attention(q, k, v, causal=True, return_lse=True)
    >>> q_index = torch.randn(1, 4, 100, 16, requires_grad=True)
    >>> k_index, weights = torch.randn(1, 100, 16), torch.rand(1, 4, 100)
    >>> loss = sf.indexer_kl_loss(q_index, k_index, weights, q, k, lse)
    >>> loss.backward()
    """
    check_indexer(q_index, k_index, weights, index_scale)
    check_keep(k_keep, k_index)
    check_inputs(q, k, k)
    B, _, Tq, _ = q_index.shape
    Tk = k_index.shape[1]
    good = q.shape[0] == k.shape[0] == B and q.shape[2] == Tq and k.shape[2] == Tk
    if not good or q.device != q_index.device:
        raise SparseFlashError(
            f"q: {describe(q)}, k: {describe(k)}; expected the tokens and device of the indexer: q [B={B},Hq,"
            f"Tq={Tq},D], k [B={B},Hkv,Tk={Tk},D] on {q_index.device}"
        )
    if not isinstance(lse, Tensor) or lse.shape != q.shape[:3] or lse.device != q.device:
        raise SparseFlashError(
            f"lse: {describe(lse)}; expected {list(q.shape[:3])} on {q.device}, from return_lse=True"
        )
    if index is not None and not (
        isinstance(index, Tensor)
        and index.dtype in INTEGERS
        and index.dim() == 3
        and index.shape[:2] == (B, Tq)
    ):
        raise SparseFlashError(f"index: {describe(index)}; expected integers [B={B}, Tq={Tq}, n], -1 = none")
    if reduction not in ("mean", "sum"):
        raise SparseFlashError(f"reduction={reduction!r}: expected mean or sum")
    low, high = ranges(B, Tq, Tk, causal, q_offset, first_key, q.device)
    factor, cap = as_scale(scale, q.shape[-1]), as_softcap(softcap)
    total, *_ = _loss(
        q_index,
        k_index,
        weights,
        q.detach(),
        k.detach(),
        lse.detach(),
        index if index is None or index.dtype in (torch.int32, torch.int64) else index.int(),
        low,
        high,
        k_keep,
        Likeness(float(index_scale), factor, cap, as_backend(backend)),
    )
    return total if reduction == "sum" else total / (high > low).sum().clamp(min=1)
