"""`decode`: few queries of each sequence over its key cache. Inference only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..dispatch import choose
from ..errors import SparseFlashError
from ..numerics import Softmax, empty_like_layout, state_dtype
from ..plan import Plan
from ._arguments import (
    WIDEST,
    AnyPlan,
    as_backend,
    as_dtype,
    as_plans,
    as_scale,
    as_softcap,
    autocast,
    check_bias,
    check_inputs,
    check_plan,
    check_sink,
    describe,
)
from ._register import learning, register, untraced


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    plans: Sequence[Plan],
    options: Softmax,
) -> tuple[Tensor, Tensor]:
    run = choose("decode", options.backend, q, k, v).decode
    return run(q, k, v, plans, options, key_bias=key_bias, sink_logits=sink_logits)


def _empty(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_like_layout(q, v.shape[-1], rest[-1].dtype), q.new_empty(q.shape[:3], dtype=state_dtype(q))


_decode = register("decode", _forward, _empty)


def _all_keys(Tq: int, Tk: int, device: torch.device) -> Plan:
    return Plan.from_lengths(torch.full((1,), Tk, device=device), Tk=Tk, Tq=Tq)


_all_keys_again = functools.lru_cache(32)(_all_keys)
"""For the layers of a step, which ask for one plan: making it takes as long as reading a megabyte."""


def _plans_of(given: Any, q: Tensor, k: Tensor) -> tuple[Plan, ...]:
    (B, _, Tq, _), Tk = q.shape, k.shape[2]
    if given is None:
        # a CUDA graph must not hold what a cache may drop
        again = q.device.type == "cpu" and untraced(q) and not learning(q)
        return ((_all_keys_again if again else _all_keys)(Tq, Tk, q.device),)
    if isinstance(given, Tensor) and given.dtype != torch.bool:
        if given.dim() != 1 or len(given) not in (1, B) or given.device != q.device:
            raise SparseFlashError(
                f"lengths: {describe(given)}; expected integers [B={B}] on {q.device}, the keys in use of "
                "each sequence"
            )
    else:
        numbers = given if isinstance(given, (list, tuple)) else (given,)
        if any(isinstance(x, int) for x in numbers):
            raise SparseFlashError(
                f"plan_or_lengths is {describe(given)}: lengths are a tensor of integers [B={B}], on "
                f"{q.device}"
            )
        return as_plans(given)
    return (Plan.from_lengths(given, Tk=Tk, Tq=Tq),)


class _Options(TypedDict, total=False):
    scale: float | None
    softcap: float | None
    key_bias: Tensor | None
    sink_logits: Tensor | None
    out_dtype: torch.dtype | None
    backend: str | None


@overload
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan_or_lengths: AnyPlan | Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan_or_lengths: AnyPlan | Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan_or_lengths: AnyPlan | Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of the last few tokens of each sequence over its key cache, as fast as memory allows.

    The same result as `sparseflash.attention` under the same plan. Keys are read once, where they lie, for
    all heads of a group and for all sequences that share them; the work is cut into equal pieces however much
    the lengths differ, and the result does not depend on how many threads there are. No gradients.

    Parameters
    ----------
    q : Tensor
        `[B,Hq,Tq,D]`: the last Tq tokens of each sequence; any Tq is right, up to 16 is what this is for.
    k, v : Tensor
        The cache, `[B,Hkv,Tk,D]` and `[B,Hkv,Tk,Dv]`, any strides; or a pool of batch size 1. fp32, fp16,
        bf16 (fp64 on the reference backend).
    plan_or_lengths : Tensor, Plan or tuple of Plan, optional
        Integers `[B]`: how many keys of each sequence are in use; query i sits at position
        `length - Tq + i` and sees the keys up to there. Or what is seen, as plans: `Plan.from_pages` for a
        paged cache, `(prefix, own)` with a prefix of batch size 1 that all sequences share, or any other;
        made once, they serve all layers of a step. None: all Tk keys are in use.
    scale, softcap, key_bias, sink_logits, out_dtype, return_lse, backend
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`, and lse fp32 `[B,Hq,Tq]`: 0 and -inf for a query that sees nothing.

    Raises
    ------
    SparseFlashError
        Saying what was given, what was expected and how to mend it; where gradients are wanted, too.

    References
    ----------
    LeanAttention (arXiv 2405.10480), section IV: equal shares of all key tiles, merged exactly. Bifurcated
    attention (arXiv 2403.08845), section 4: one product for the prefix that samples share.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, cache_k, cache_v = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 512, 64), torch.randn(2, 2, 512, 64)
    >>> sf.decode(q, cache_k, cache_v, torch.tensor([17, 512])).shape
    torch.Size([2, 8, 1, 64])
    """
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v, WIDEST)
    bias, sinks = (x if isinstance(x, Tensor) else None for x in (key_bias, sink_logits))
    if learning(q, k, v, bias, sinks):
        raise SparseFlashError(
            "decode() has no gradients, but an input requires some: use sparseflash.attention (it takes the "
            "same plans; lengths become one by Plan.from_lengths), or call it under torch.no_grad()"
        )
    plans = _plans_of(plan_or_lengths, q, k)
    for one in plans:
        check_plan(one, q, k)
    if key_bias is not None:
        check_bias(key_bias, q, k)
    if sink_logits is not None:
        check_sink(sink_logits, q)
    wanted = as_dtype("out_dtype", out_dtype, q)
    options = Softmax(as_scale(scale, q.shape[-1]), as_softcap(softcap), as_backend(backend), wanted)
    out, lse = _decode(q, k, v, key_bias, sink_logits, plans, options)
    return (out, lse) if return_lse else out
