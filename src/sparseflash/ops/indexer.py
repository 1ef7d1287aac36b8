"""`indexer_topk`: the keys a learned indexer selects for each query, without materialising its scores."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import Choice, state_dtype
from ..common.errors import SparseFlashError
from ..plan.options import INTEGERS, is_count, narrow, normal_offset
from ._arguments import DTYPES, as_backend, autocast, describe, is_finite, said
from ._register import register


def _forward(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    keep: Tensor | None,
    options: Choice,
) -> tuple[Tensor, Tensor]:
    run = choose("indexer_topk", options.backend, q, k).indexer_topk
    return run(q, k, weights, low, high, keep, options)


def _empty(
    q: Any, k: Any, weights: Any, low: Any, high: Any, keep: Any, options: Choice
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], options.topk)
    scores = q.new_empty(shape if options.scored else (0,), dtype=state_dtype(q))
    return q.new_empty(shape, dtype=torch.int32), scores


_topk = register("indexer_topk", _forward, _empty)


def check_indexer(q_index: Tensor, k_index: Tensor, weights: Tensor, scale: float) -> None:
    """Check shapes, dtypes and devices of an indexer's inputs."""
    given = {"q_index": q_index, "k_index": k_index, "weights": weights}
    good = all(isinstance(x, Tensor) for x in given.values()) and (
        (q_index.dim(), k_index.dim(), weights.dim()) == (4, 3, 3)
    )
    if not good:
        raise SparseFlashError(
            f"{said(**given)}; expected tensors q_index [B,H,Tq,D], k_index [B,Tk,D], weights [B,H,Tq]"
        )
    B, H, Tq, D = q_index.shape
    if q_index.dtype not in DTYPES:
        raise SparseFlashError(f"{said(**given)}; expected fp32, fp16, bf16 (or fp64, reference only)")
    if q_index.dtype != k_index.dtype or not weights.is_floating_point():
        raise SparseFlashError(
            f"{said(**given)}; expected one dtype for q_index and k_index, and floating point weights"
        )
    if not (q_index.device == k_index.device == weights.device):
        raise SparseFlashError(f"{said(**given)}; expected one device")
    if k_index.shape[0] != B or k_index.shape[2] != D or tuple(weights.shape) != (B, H, Tq):
        raise SparseFlashError(
            f"{said(**given)}; expected q_index [B,H,Tq,D], k_index [B,Tk,D] and weights [B,H,Tq]: heads "
            "come before tokens (transpose(1, 2) where a model has them after), and share one key"
        )
    if H < 1 or not 1 <= D <= 256:
        raise SparseFlashError(f"{said(**given)}; expected at least one head, and D of 1..256")
    if not is_finite(scale) or scale <= 0:
        raise SparseFlashError(f"scale={scale!r}: expected a positive number")


def check_keep(k_keep: Tensor | None, k_index: Tensor) -> None:
    """Check a padding mask."""
    if k_keep is not None:
        good = (
            isinstance(k_keep, Tensor)
            and k_keep.dtype == torch.bool
            and k_keep.shape == k_index.shape[:2]
            and k_keep.device == k_index.device
        )
        if not good:
            raise SparseFlashError(
                f"k_keep: {describe(k_keep)}; expected bool [B, Tk] = {list(k_index.shape[:2])} on "
                f"{k_index.device}, True = a real key"
            )


def ranges(
    B: int,
    Tq: int,
    Tk: int,
    causal: bool,
    q_offset: int | Tensor,
    first_key: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Bounds of the keys low..high - 1 that each query may select, int32 [B,Tq] each."""
    if not isinstance(causal, bool):
        raise SparseFlashError(f"causal={causal!r}: expected True or False")
    if isinstance(q_offset, Tensor):
        if q_offset.dtype not in INTEGERS or q_offset.numel() not in (1, B) or q_offset.device != device:
            raise SparseFlashError(
                f"q_offset: {describe(q_offset)}; expected an int, or integers [B={B}] on {device}"
            )
        q_offset = narrow(q_offset.reshape(-1, 1), "q_offset holds").long()
    elif not isinstance(q_offset, (int, torch.SymInt)) or isinstance(q_offset, bool):
        raise SparseFlashError(f"q_offset={q_offset!r}: expected an int, or a tensor of them")
    else:
        q_offset = normal_offset(q_offset)
    low = torch.zeros((B, Tq), dtype=torch.int32, device=device)
    high = torch.full_like(low, Tk)
    if causal:
        at = torch.arange(1, Tq + 1, device=device)
        high = (at[None] + q_offset).clamp(0, Tk).to(torch.int32).expand(B, Tq)
    if first_key is not None:
        good = (
            isinstance(first_key, Tensor)
            and first_key.dtype in INTEGERS
            and first_key.dim() == 2
            and first_key.shape[0] in (1, B)
            and first_key.shape[1] == Tq
            and first_key.device == device
        )
        if not good:
            raise SparseFlashError(
                f"first_key: {describe(first_key)}; expected integers [B|1, Tq={Tq}] on {device}: where the "
                "document of each query begins"
            )
        low = narrow(first_key).clamp(0, Tk).expand(B, Tq)
    return low.contiguous(), high.contiguous()


class _Options(TypedDict, total=False):
    causal: bool
    q_offset: int | Tensor
    first_key: Tensor | None
    k_keep: Tensor | None
    scale: float
    backend: str | None


@overload
def indexer_topk(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    topk: int,
    *,
    return_scores: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def indexer_topk(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    topk: int,
    *,
    return_scores: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
def indexer_topk(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    topk: int,
    *,
    causal: bool = True,
    q_offset: int | Tensor = 0,
    first_key: Tensor | None = None,
    k_keep: Tensor | None = None,
    scale: float = 1.0,
    return_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Select the `topk` keys with the best scores of a learned ("lightning") indexer for each query.

    `score[s, t] = sum over h of weights[h, s] * relu(scale * q_index[h, s] . k_index[t])`: DeepSeek-V3.2
    (arXiv 2512.02556, equation 1). Scores are streamed: memory is that of the result and of a copy of K,
    where the plain formula needs `H * Tq * Tk` numbers. The selection has no gradient; `indexer_kl_loss`
    trains the indexer.

    Parameters
    ----------
    q_index : Tensor
        `[B,H,Tq,D]`, any strides; fp32, fp16, bf16 (fp64 on the reference backend). D up to 256.
    k_index : Tensor
        `[B,Tk,D]`: one key that all heads share.
    weights : Tensor
        `[B,H,Tq]`, any floating point: weight of a head for a query, of either sign.
    topk : int
        Most keys that a query selects.
    causal : bool
        Query i, at position `q_offset + i`, sees keys up to its own position.
    q_offset : int or Tensor
        Position of the first query; integers `[B]` if sequences differ.
    first_key : Tensor, optional
        Integers `[B|1,Tq]`: the first key that each query sees, such as the begin of its document.
    k_keep : Tensor, optional
        bool `[B,Tk]`, True = a real key: padding is never selected, and may hold anything.
    scale : float
        Factor of the products, > 0.
    return_scores : bool
        Also return the scores of the selected keys.
    backend : str, optional
        "reference" or "cpu"; None chooses the fastest usable one.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        index int32 `[B,Tq,min(topk,Tk)]`, ascending, padded with -1 if a query sees fewer keys. Of equal
        scores the lower index wins (a ReLU leaves many zeros); NaN ranks last. The scores are fp32 (fp64) of
        the same shape, -inf at padding.

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given, what is expected and how to fix it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, weights = torch.randn(1, 4, 100, 32), torch.randn(1, 100, 32), torch.rand(1, 4, 100)
    >>> index = sf.indexer_topk(q, k, weights, 16)
    >>> plan = sf.Plan.from_keys(index[:, None], Tq=100, Tk=100, unique=True)
    >>> out = sf.attention(*torch.randn(3, 1, 8, 100, 64), plan)
    """
    q_index, k_index = autocast(q_index, k_index)
    check_indexer(q_index, k_index, weights, scale)
    check_keep(k_keep, k_index)
    if not is_count(topk, 1):
        raise SparseFlashError(f"topk={topk!r}: expected a positive int")
    if not isinstance(return_scores, bool):
        raise SparseFlashError(f"return_scores={return_scores!r}: expected True or False")
    B, _, Tq, _ = q_index.shape
    Tk = k_index.shape[1]
    low, high = ranges(B, Tq, Tk, causal, q_offset, first_key, q_index.device)
    q, k, weights = q_index.detach(), k_index.detach(), weights.detach()
    weights = weights.to(state_dtype(q)) * scale
    options = Choice(min(topk, Tk), return_scores, as_backend(backend))
    index, scores = _topk(q, k, weights, low, high, k_keep, options)
    return (index, scores) if return_scores else index
