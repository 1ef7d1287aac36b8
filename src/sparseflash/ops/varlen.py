"""`attention_varlen`: packed documents with FlashAttention's names and semantics."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan
from ..plan.options import SHORT
from ._arguments import check_unknown, describe
from .attention import attention

_ELSEWHERE = {
    "return_attn_probs": "the probabilities are never formed: return_lse=True returns the log-sum-exp, and "
    "attention_stats() sums or maxima of the probabilities",
    "block_table": "a paged cache is a plan over a pool: decode(q, k, v, Plan.from_pages(...))",
    "seqused_k": "say the lengths in cu_seqlens_k",
    "scale": "the argument is called softmax_scale, as in FlashAttention",
    "window": "the argument is called window_size, as in FlashAttention",
    "learnable_sink": "the argument is called sink_logits",
}


class _Options(TypedDict, total=False):
    sink_logits: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: int | Tensor | None
    plan: Plan | None
    deterministic: bool
    backend: str | None


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    *,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention inside each of many packed documents, forward and backward, without padding.

    Equivalent to `flash_attn_varlen_func`, on every backend, with its arguments in its order. The inputs are
    not copied; documents never see one another, not even through a NaN.

    Parameters
    ----------
    q, k, v : Tensor
        `[total_q, Hq, D]`, `[total_k, Hkv, D]`, `[total_k, Hkv, Dv]`, any strides; `Hq` a multiple of `Hkv`.
    cu_seqlens_q, cu_seqlens_k : Tensor
        Integers `[documents + 1]`: running totals of the lengths, from 0. `cu_seqlens_k` defaults to
        `cu_seqlens_q`. Documents may be empty; outputs of tokens after the last document are 0.
    max_seqlen_q, max_seqlen_k : int, optional
        Accepted for compatibility; not used.
    dropout_p : float
        Probability of dropping a weight, as in `sparseflash.attention`; pass 0 for evaluation.
    causal : bool
        The last query of a document sees all its keys, the one before all but the last, and so on.
    window_size : (left, right)
        Inclusive distances inside the document, -1 = unbounded.
    softmax_scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    softcap : float
        c in `c * tanh(score / c)`; 0 is none.
    sink_logits : Tensor, optional
        `[Hq]`: the logit of an extra key with value 0, with gradient.
    alibi_slopes : Tensor, optional
        `[Hq]`: as in `sparseflash.attention`; the last query of a document has the position of its last key.
    dropout_seed : int or Tensor, optional
        As in `sparseflash.attention`; token numbers run through all documents.
    plan : Plan, optional
        `Plan.from_documents(...)`, made once for all layers and steps; replaces the lengths, `causal` and
        `window_size`.
    return_lse : bool
        Also return the natural-log sum of exponentials, fp32 `[Hq, total_q]`, differentiable.
    deterministic : bool
        Bitwise repeatable results. All present backends always are.
    backend : str, optional
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[total_q, Hq, Dv]`: 0 (lse -inf) for a query that sees nothing.

    Raises
    ------
    SparseFlashError
        If lengths decrease, do not start at 0, exceed the tokens, or differ in number (values are checked
        only on the CPU), or if an argument is not supported; the message says what to use instead.

    References
    ----------
    Dao, FlashAttention-2 (https://arxiv.org/abs/2307.08691); Kundu et al., Enhancing training efficiency
    using packing with Flash Attention (https://arxiv.org/abs/2407.09105).

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 300, 4, 64)  # three documents of 100, 150 and 50 tokens
    >>> cu_seqlens = torch.tensor([0, 100, 250, 300], dtype=torch.int32)
    >>> out = sf.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    >>> first = [x[None, :100].transpose(1, 2) for x in (q, k, v)]
    >>> torch.allclose(out[None, :100].transpose(1, 2), sf.attention(*first, causal=True), atol=1e-5)
    True
    """
    check_unknown(
        "attention_varlen",
        unsupported,
        _ELSEWHERE,
        ("causal", "window_size", "softmax_scale", "softcap", "return_lse", *_Options.__annotations__),
    )
    good = all(isinstance(x, Tensor) and x.dim() == 3 for x in (q, k, v))
    if not good:
        raise SparseFlashError(
            f"q: {describe(q)}, k: {describe(k)}, v: {describe(v)}; expected packed tensors "
            "q [total_q,Hq,D], k [total_k,Hkv,D], v [total_k,Hkv,Dv]; padded ones go to attention()"
        )
    if not isinstance(deterministic, bool):
        raise SparseFlashError(f"deterministic={deterministic!r}: expected True or False")
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        fits = most is None or (isinstance(most, (int, torch.SymInt, Tensor)) and not isinstance(most, bool))
        if not fits:
            raise SparseFlashError(f"{name}={most!r}: expected the longest length, or None")
    window = _window(window_size)
    if plan is None:
        if cu_seqlens_q is None:
            raise SparseFlashError(
                "attention_varlen() needs cu_seqlens_q (or a plan): running totals of the lengths, as in "
                "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
            )
        if alibi_slopes is not None and cu_seqlens_k is not None and not causal and window == (-1, -1):
            window = (SHORT.max, SHORT.max)  # hides nothing, but stores query positions
        plan = Plan.from_documents(
            cu_seqlens_q,
            cu_seqlens_k,
            Tq=q.shape[0],
            Tk=k.shape[0],
            causal=causal,
            window=window,
        )
    else:
        alone = cu_seqlens_q is None and cu_seqlens_k is None and causal is False
        if not alone or window != (-1, -1):
            raise SparseFlashError(
                "plan together with cu_seqlens, causal or window_size: these belong to the plan: "
                "Plan.from_documents(cu_seqlens, causal=True, window=(left, right))"
            )
    out, lse = attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        plan,
        scale=softmax_scale,
        softcap=softcap,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=True,
        backend=backend,
    )
    out = out.squeeze(0).transpose(0, 1)  # not out[0]: the gradient of indexing is a copy
    return (out, lse.squeeze(0)) if return_lse else out


def _window(window_size: Any) -> tuple[int, int]:
    if isinstance(window_size, (tuple, list)) and len(window_size) == 2:
        return tuple(window_size)
    raise SparseFlashError(f"window_size={window_size!r}: expected (left, right), -1 = unbounded")
