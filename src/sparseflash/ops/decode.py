"""`decode`: attention of few queries per sequence over its KV cache. Inference only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import Recorded, Softmax, empty_like_layout, state_dtype
from ..backends.records import Form, Records
from ..common.errors import SparseFlashError
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


def _recorded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    plans: Sequence[Plan],
    options: Recorded,
) -> tuple[Tensor, Tensor]:
    keys = Records(k, Form(options.k_dim, options.k_kept, options.k_int8), q.dtype)
    values = Records(v, Form(options.v_dim, options.v_kept, options.v_int8), q.dtype)
    given = Softmax(options.scale, options.softcap, options.backend, options.dtype)
    backend = choose("decode", options.backend, q, keys.like(), values.like())
    own = {"key_bias": key_bias, "sink_logits": sink_logits}
    if hasattr(backend, "decode_records"):
        found: tuple[Tensor, Tensor] = backend.decode_records(q, keys, values, plans, given, **own)
        return found
    return backend.decode(q, keys.unpack(), values.unpack(), plans, given, **own)


def _empty_recorded(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    options = rest[-1]
    out = empty_like_layout(q, options.v_dim, options.dtype)
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q))


_decode_records = register("decode_records", _recorded, _empty_recorded)


def _all_keys(Tq: int, Tk: int, device: torch.device) -> Plan:
    return Plan.from_lengths(torch.full((1,), Tk, device=device), Tk=Tk, Tq=Tq)


_all_keys_again = functools.lru_cache(32)(_all_keys)
"""Cache of that plan for the layers of a step: making it takes as long as reading a megabyte."""


def _plans_of(given: Any, q: Tensor, k: Tensor) -> tuple[Plan, ...]:
    (B, _, Tq, _), Tk = q.shape, k.shape[2]
    if given is None:
        # not on CUDA: a CUDA graph must not hold tensors that the lru_cache may drop
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


def _both_records(k: Tensor | Records, v: Tensor | Records) -> tuple[Records, Records] | None:
    """Return (k, v) if both are `Records`, None if both are tensors; raise if they are mixed."""
    if isinstance(k, Records) and isinstance(v, Records):
        return k, v
    if isinstance(k, Records) or isinstance(v, Records):
        raise SparseFlashError(
            f"k is a {type(k).__name__}, v a {type(v).__name__}: expected tensors, or records of both; "
            "records.pack(x) keeps all items of a tensor as they are"
        )
    return None


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
    k: Tensor | Records,
    v: Tensor | Records,
    plan_or_lengths: AnyPlan | Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def decode(
    q: Tensor,
    k: Tensor | Records,
    v: Tensor | Records,
    plan_or_lengths: AnyPlan | Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
def decode(
    q: Tensor,
    k: Tensor | Records,
    v: Tensor | Records,
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
    """Exact attention of the last few tokens of each sequence over its KV cache, bound by memory bandwidth.

    The result equals `sparseflash.attention` under the same plan. Keys are read once, in place, for all heads
    of a GQA group and for all sequences that share them; the work is split evenly however much the lengths
    differ, and the result does not depend on the number of threads. No gradients.

    Parameters
    ----------
    q : Tensor
        `[B,Hq,Tq,D]`: the last Tq tokens of each sequence; any Tq is correct, Tq up to 16 is the fast case.
    k, v : Tensor
        The cache, `[B,Hkv,Tk,D]` and `[B,Hkv,Tk,Dv]`, any strides; or a pool of batch size 1. fp32, fp16,
        bf16 (fp64 on the reference backend). Or both as compressed `Records` (`sparseflash.records.pack`):
        the result is that of the unpacked rows.
    plan_or_lengths : Tensor, Plan or tuple of Plan, optional
        Integers `[B]`: how many keys of each sequence are in use; query i sits at position
        `length - Tq + i` and sees the keys up to that position. Or plans: `Plan.from_pages` for a paged
        cache, `(prefix, own)` with a prefix of batch size 1 that all sequences share, or any other; made
        once, they serve all layers of a step. None: all Tk keys are in use.
    scale, softcap, key_bias, sink_logits, out_dtype, return_lse, backend
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`, and lse fp32 `[B,Hq,Tq]`: 0 and -inf for a query that sees nothing.

    Raises
    ------
    SparseFlashError
        If an argument is invalid or requires a gradient; the message says what is expected.

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
    packed = _both_records(k, v)
    if packed is None:
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        q, keys, values = autocast(q, k, v)
    else:  # records keep the dtype they were packed with
        q = q.to(packed[0].dtype) if torch.is_autocast_enabled(q.device.type) else q
        keys, values = packed[0].like(), packed[1].like()
    check_inputs(q, keys, values, WIDEST)
    bias, sinks = (x if isinstance(x, Tensor) else None for x in (key_bias, sink_logits))
    if learning(q, keys, values, bias, sinks):
        raise SparseFlashError(
            "decode() has no gradients, but an input requires some: use sparseflash.attention (it takes the "
            "same plans; lengths become one by Plan.from_lengths), or call it under torch.no_grad()"
        )
    plans = _plans_of(plan_or_lengths, q, keys)
    for one in plans:
        check_plan(one, q, keys)
    if key_bias is not None:
        check_bias(key_bias, q, keys)
    if sink_logits is not None:
        check_sink(sink_logits, q)
    wanted = as_dtype("out_dtype", out_dtype, q)
    options = Softmax(as_scale(scale, q.shape[-1]), as_softcap(softcap), as_backend(backend), wanted)
    if packed is None:
        out, lse = _decode(q, keys, values, key_bias, sink_logits, plans, options)
    else:
        k_rows, v_rows = packed
        form = Recorded(*options[:3], wanted, *k_rows.form, *v_rows.form)
        out, lse = _decode_records(q, k_rows.data, v_rows.data, key_bias, sink_logits, plans, form)
    return (out, lse) if return_lse else out
