"""`attention` and `attention_backward`: validation and autograd. Backends have the kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..dispatch import choose
from ..errors import SparseFlashError, require
from ..numerics import empty_like_layout, norm_of, over_plans, state_dtype, unit_of
from ..plan import Plan
from ..plan.flat import flatten_all, unflatten_all
from ._arguments import (
    Plans,
    as_backend,
    as_plans,
    as_scale,
    as_softcap,
    autocast,
    check_bias,
    check_inputs,
    check_plan,
    check_sink,
    check_unknown,
    describe,
    is_real,
    own_precision,
    untraced,
    unwatched,
)
from ._register import differentiable, last, once

# ---------------------------------------------------------------- the two custom ops


def _sum(parts: Sequence[Tensor | None]) -> Tensor:
    total = parts[0]
    assert total is not None
    for part in parts[1:]:
        assert part is not None
        total = total + part
    return total


def one_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    plans: Sequence[Plan],
    scale: float,
    softcap: float,
    backend: str,
    *,
    normed: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Out, lse and, for a backward, the norm over all plans."""
    attend = choose("forward", backend, q, k, v).forward
    with own_precision(q):
        return over_plans(
            attend,
            q,
            k,
            v,
            plans,
            scale=scale,
            softcap=softcap,
            key_bias=key_bias,
            sink_logits=sink_logits,
            normed=normed,
        )


@torch.library.custom_op("sparseflash::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    plan_tensors: Sequence[Tensor],
    plan_ints: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plans = unflatten_all(plan_tensors, plan_ints)
    out, lse, norm = one_softmax(q, k, v, key_bias, sink_logits, plans, scale, softcap, backend, normed=True)
    assert norm is not None
    return out, lse, norm


@_attention.register_fake
def _(
    q: Any,
    k: Any,
    v: Any,
    key_bias: Any,
    sink_logits: Any,
    plan_tensors: Any,
    plan_ints: Any,
    scale: Any,
    softcap: Any,
    backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    state = state_dtype(q)
    lse, norm = q.new_empty(q.shape[:3], dtype=state), q.new_empty((2, *q.shape[:3]), dtype=state)
    return empty_like_layout(q, v.shape[-1]), lse, norm


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norm: Tensor,
    key_bias: Tensor | None,
    plans: Sequence[Plan],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alone = len(plans) == 1
    state = state_dtype(q)
    with own_precision(q):
        parts = [
            choose("backward", backend, q, k, v).backward(
                dout,
                q,
                k,
                v,
                out,
                norm,
                dlse,
                plan,
                scale=scale,
                softcap=softcap,
                key_bias=key_bias,
                grad_dtype=None if alone else state,
            )
            for plan in plans
        ]
    dq, dk, dv = (_sum([part[n] for part in parts]) for n in range(3))
    if key_bias is None:
        dbias = q.new_empty(0, dtype=state)
    else:  # heads and batch slots that share a row of the bias add up, in a fixed order
        B, H, Tk = q.shape[0], q.shape[1], k.shape[2]
        own_batch, own = key_bias.shape[:2]
        dbias = _sum([part[3] for part in parts]).view(B, own, H // own, Tk).sum(2)
        dbias = dbias.sum(0, keepdim=True) if own_batch == 1 and B != 1 else dbias
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous(), dbias


@torch.library.custom_op("sparseflash::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norm: Tensor,
    key_bias: Tensor | None,
    plan_tensors: Sequence[Tensor],
    plan_ints: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plans = unflatten_all(plan_tensors, plan_ints)
    return _gradients(dout, dlse, q, k, v, out, norm, key_bias, plans, scale, softcap, backend)


@_attention_backward.register_fake
def _(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    norm: Any,
    key_bias: Any,
    plan_tensors: Any,
    plan_ints: Any,
    scale: Any,
    softcap: Any,
    backend: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_shape = (0,) if key_bias is None else key_bias.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(bias_shape, dtype=state_dtype(q))


_watched_backward = last(_attention_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, key_bias, sink_logits, tensors, ctx.ints, ctx.scale, ctx.softcap, ctx.backend = inputs
    out, _, norm = output
    ctx.slots = len(tensors)
    ctx.save_for_backward(q, k, v, key_bias, sink_logits, out, norm, *tensors)


def _sink_gradient(
    dout: Tensor, dlse: Tensor | None, out: Tensor, norm: Tensor, sink_logits: Tensor, unit: float
) -> Tensor:
    """The sink is a key with value 0: d = sum over rows of p_sink * (dlse - delta)."""
    slope = -(dout.to(norm.dtype) * out.to(norm.dtype)).sum(-1)
    if dlse is not None:
        slope = slope + dlse
    top, rest = norm.double()
    share = torch.exp((sink_logits.double()[:, None] - top * unit) - rest)
    share = torch.where(top == -math.inf, 0, share)  # a sink of -inf on a row that sees nothing
    return (share.to(norm.dtype) * slope).sum((0, 2)).to(sink_logits.dtype)


def _five(
    run: Any,
    saved: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
    plans: Sequence[Any],
    scale: float,
    softcap: float,
    backend: str,
) -> Any:
    """Gradients of q, k, v, key_bias and sink_logits, where `run` knows those of the first four."""
    q, k, v, key_bias, sink_logits, out, norm = saved
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dbias = run(dout, dlse, q, k, v, out, norm, key_bias, *plans, scale, softcap, backend)
    dsink = None
    if sink_logits is not None:
        unit = unit_of(scale, softcap, key_bias)
        dsink = once(_sink_gradient(dout, dlse, out, norm, sink_logits, unit))
    return dq, dk, dv, None if key_bias is None else dbias.to(key_bias.dtype), dsink


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved, tensors = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    plans = tensors, ctx.ints
    five = _five(_watched_backward, saved, dout, dlse, plans, ctx.scale, ctx.softcap, ctx.backend)
    return *five, [None] * ctx.slots, None, None, None, None


_watched = differentiable(_attention, _backward, _setup_context)


class _Untraced(torch.autograd.Function):
    """The same op where nobody looks on: its plans stay plans, and the dispatcher takes no time."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        out, lse, norm = one_softmax(*given, normed=True)
        ctx.plans, *ctx.rest = given[5:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given[:5], out, norm)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        run: Any = _gradients
        plans: tuple[Any, ...] = (ctx.plans,)
        if torch.is_grad_enabled():  # create_graph: as an op the gradients have a graph, which refuses
            run, plans = _watched_backward, flatten_all(ctx.plans)
        return *_five(run, ctx.saved_tensors, dout, dlse, plans, *ctx.rest), None, None, None, None


# ---------------------------------------------------------------- public


@functools.lru_cache(32)
def _dense_again(Tq: int, Tk: int, causal: bool, q_offset: int, inference: bool) -> Plan:
    """For the layers of a step: making a plan takes longer than attending 128 tokens."""
    return Plan.dense(Tq, Tk, causal=causal, q_offset=q_offset, device=torch.device("cpu"))


def _dense(q: Tensor, k: Tensor, causal: bool, q_offset: int | Tensor) -> Plan:
    Tq, Tk = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and type(q_offset) is int and untraced(q, k):
        return _dense_again(Tq, Tk, causal, q_offset, torch.is_inference_mode_enabled())
    return Plan.dense(Tq, Tk, causal=causal, q_offset=q_offset, device=q.device)


_ELSEWHERE = {
    "dropout": "attention dropout is not supported: use dropout on the residual stream",
    "dropout_p": "attention dropout is not supported: use dropout on the residual stream",
    "alibi_slopes": "ALiBi is not supported: use a window, or RoPE",
    "attn_mask": "give a bool mask as plan=Plan.from_mask(mask)",
    "bias": "a full [T,T] bias is not supported: key_bias [B,H,Tk] adds one number per key",
    "is_causal": "the argument is called causal",
    "softmax_scale": "the argument is called scale",
    "window_size": "give a window as plan=Plan.dense(Tq, Tk, causal=True, window=(left, right))",
    "enable_gqa": "GQA needs no switch: give k and v with fewer heads",
}


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plans | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plans | None = None, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plans | None = None,
    *,
    causal: bool = False,
    q_offset: int | Tensor = 0,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys that a plan lets each query see, with exact gradients.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`, any strides; `Hq` a multiple of `Hkv`; fp32, fp16,
        bf16 (fp64 on the reference backend). D and Dv up to 256.
    plan : Plan or tuple of Plan, optional
        What is seen; a tuple of plans with disjoint visible sets is one softmax over all. None: dense.
    causal : bool
        Only without a plan: query i (at position `i + q_offset`) sees keys 0..i + q_offset.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    key_bias : Tensor, optional
        `[B|1, H, Tk]`, added to the logits of each key, with gradient.
    sink_logits : Tensor, optional
        `[Hq]`: the logit of an extra key with value 0, with gradient.
    softcap : float, optional
        c in `c * tanh(score / c)`.
    return_lse : bool
        Also return the natural-log sum of exponentials, fp32 `[B,Hq,Tq]`, differentiable.
    deterministic : bool
        Bitwise repeatable results. All present backends always are.
    backend : str, optional
        "reference", "cpu" or "triton"; None chooses the fastest usable one.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`: 0 (lse -inf, gradients 0) for a query that sees nothing.

    Raises
    ------
    SparseFlashError
        Saying what was given, what was expected and how to mend it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q = k = v = torch.randn(1, 2, 256, 64)
    >>> plan = sf.Plan.dense(256, 256, causal=True, window=(63, 0))
    >>> sf.attention(q, k, v, plan).shape
    torch.Size([1, 2, 256, 64])
    """
    if unsupported:
        check_unknown("attention", unsupported, _ELSEWHERE)
    if not isinstance(causal, bool):
        raise SparseFlashError(f"causal={causal!r}: expected True or False")
    if plan is not None and causal:
        raise SparseFlashError(
            "plan together with causal=True: causality belongs to the plan: Plan.dense(Tq, Tk, causal=True)"
        )
    if plan is not None and not (isinstance(q_offset, int) and q_offset == 0):
        raise SparseFlashError(
            "plan together with q_offset: positions belong to the plan, e.g. Plan.dense(..., q_offset=...)"
        )
    if not isinstance(deterministic, bool):
        raise SparseFlashError(f"deterministic={deterministic!r}: expected True or False")
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    if plan is None:
        plan = _dense(q, k, causal, q_offset)
    plans = as_plans(plan)
    for one in plans:
        check_plan(one, q, k)
    if key_bias is not None:
        check_bias(key_bias, q, k)
    if sink_logits is not None:
        check_sink(sink_logits, q)
    factor, cap, name = as_scale(scale, q.shape[-1]), as_softcap(softcap), as_backend(backend)
    given = q, k, v, key_bias, sink_logits
    if unwatched(*given):
        out, lse, _ = one_softmax(*given, plans, factor, cap, name, normed=False)
    elif untraced(*given):
        # torch declares no types for `apply`
        out, lse = _Untraced.apply(*given, plans, factor, cap, name)  # type: ignore[no-untyped-call]
    else:
        tensors, ints = flatten_all(plans)
        out, lse, _ = _watched(*given, tensors, ints, factor, cap, name)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plans,
    *,
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and key_bias from the GLOBAL out and lse: for rings, cascades and chunks.

    `out [B,Hq,Tq,Dv]` and `lse [B,Hq,Tq]` may come from a softmax over more keys than k and v hold here (ring
    attention, merged pieces, sinks): the result is this piece's share of the gradients. `dbias` is None
    without `key_bias`.

    One fp32 number for lse is known to eps |lse|, and every weight of its row is off by that share: the error
    is at most three times an eager run's, plus eps |lse| of the result. (Inside `attention` nothing is lost:
    there maximum and sum stay apart.) Where logits are in the thousands, give lse in fp64, or as two fp32
    numbers: `lse_low [B,Hq,Tq]` is what `lse` does not hold of it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v, dout = torch.randn(4, 1, 2, 100, 32)
    >>> plan = sf.Plan.dense(100, 100, causal=True)
    >>> out, lse = sf.attention(q, k, v, plan, return_lse=True)
    >>> dq, dk, dv, _ = sf.attention_backward(dout, q, k, v, out, lse, plan)
    """
    check_inputs(q, k, v)
    plans = as_plans(plan)
    for one in plans:
        check_plan(one, q, k)
    if key_bias is not None:
        check_bias(key_bias, q, k)
    factor, cap, name = as_scale(scale, q.shape[-1]), as_softcap(softcap), as_backend(backend)
    want = (*q.shape[:3], v.shape[-1])
    for label, x, shape in (
        ("dout", dout, want),
        ("out", out, want),
        ("lse", lse, want[:3]),
        ("dlse", dlse, want[:3]),
        ("lse_low", lse_low, want[:3]),
    ):
        if x is None and label in ("dlse", "lse_low"):
            continue
        good = is_real(x, shape, q.device)
        require((good, f"{label}: {describe(x)}; expected floating point {list(shape)} on {q.device}"))
    state = state_dtype(q)
    tensors, ints = flatten_all(plans)
    dq, dk, dv, dbias = _watched_backward(
        dout.to(q.dtype),
        None if dlse is None else dlse.to(state),
        q,
        k,
        v,
        out.to(q.dtype),
        norm_of(lse, lse_low, unit_of(factor, cap, key_bias), state),
        key_bias,
        tensors,
        ints,
        factor,
        cap,
        name,
    )
    return dq, dk, dv, None if key_bias is None else dbias
