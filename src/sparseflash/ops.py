"""`attention`, `attention_backward` and `merge`: validation, autograd and registration. Kernels live in backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .dispatch import choose
from .errors import SparseFlashError, require
from .plan import Plan
from .plan.flat import INT_SLOTS, empty_like_layout, flatten_all, unflatten_all

Plans = Plan | Sequence[Plan]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# ---------------------------------------------------------------- the two custom ops


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.custom_op("sparseflash::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, sink_logits: Tensor | None,
    plan_tensors: Sequence[Tensor], plan_ints: Sequence[int], scale: float, softcap: float, backend: str,
) -> tuple[Tensor, Tensor]:
    plans = unflatten_all(plan_tensors, plan_ints)
    alone = len(plans) == 1 and sink_logits is None
    parts = [
        choose(q, k, v, plan, backend).forward(
            q, k, v, plan, scale=scale, softcap=softcap, key_bias=key_bias,
            out_dtype=q.dtype if alone else _state_dtype(q),
        )
        for plan in plans
    ]
    if alone:
        return parts[0]
    out, lse = _merge(parts, sink_logits)
    kept = empty_like_layout(q, v.shape[-1])
    return kept.copy_(out), lse


@_attention.register_fake
def _(q: Any, k: Any, v: Any, key_bias: Any, sink_logits: Any, plan_tensors: Any, plan_ints: Any, scale: Any,
      softcap: Any, backend: Any) -> tuple[Tensor, Tensor]:
    return empty_like_layout(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=_state_dtype(q))


@torch.library.custom_op("sparseflash::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    key_bias: Tensor | None, plan_tensors: Sequence[Tensor], plan_ints: Sequence[int], scale: float,
    softcap: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plans = unflatten_all(plan_tensors, plan_ints)
    alone = len(plans) == 1
    total: list[Tensor | None] = []
    for plan in plans:
        grads = choose(q, k, v, plan, backend).backward(
            dout, q, k, v, out, lse, dlse, plan, scale=scale, softcap=softcap, key_bias=key_bias,
            grad_dtype=None if alone else _state_dtype(q),
        )
        total = list(grads) if not total else [a if b is None else a + b for a, b in zip(total, grads, strict=True)]
    dq, dk, dv, dbias = total
    B, H, Tk = q.shape[0], q.shape[1], k.shape[2]
    if key_bias is None:
        dbias = q.new_empty(0, dtype=_state_dtype(q))
    else:  # heads and batch slots that share a row of the bias add up, in a fixed order
        own_batch, own = key_bias.shape[:2]
        dbias = dbias.view(B, own, H // own, Tk).sum(2)
        dbias = dbias.sum(0, keepdim=True) if own_batch == 1 and B > 1 else dbias
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous(), dbias


@_attention_backward.register_fake
def _(dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, key_bias: Any, plan_tensors: Any,
      plan_ints: Any, scale: Any, softcap: Any, backend: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_shape = (0,) if key_bias is None else key_bias.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(bias_shape, dtype=_state_dtype(q))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_bias, sink_logits, tensors, ctx.ints, ctx.scale, ctx.softcap, ctx.backend = inputs
    out, lse = output
    ctx.slots = len(tensors)
    ctx.save_for_backward(q, k, v, key_bias, sink_logits, out, lse, *tensors)


def _sink_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """The sink is a key with value 0: d = sum over rows of p_sink * (dlse - delta)."""
    slope = -(dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        slope = slope + dlse
    share = torch.exp(sink_logits.to(lse.dtype)[:, None] - lse)
    return (share * slope).nan_to_num(0.0).sum((0, 2)).to(sink_logits.dtype)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, key_bias, sink_logits, out, lse, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dbias = _attention_backward(
        dout, dlse, q, k, v, out, lse, key_bias, tensors, ctx.ints, ctx.scale, ctx.softcap, ctx.backend
    )
    dsink = None if sink_logits is None else _sink_gradient(dout, dlse, out, lse, sink_logits)
    dbias = None if key_bias is None else dbias.to(key_bias.dtype)
    return dq, dk, dv, dbias, dsink, [None] * ctx.slots, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------- validation


def _describe(x: object) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _validate(
    q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], scale: float, softcap: float, key_bias: Tensor | None,
    sink_logits: Tensor | None,
) -> None:
    given = ", ".join(f"{n}: {_describe(x)}" for n, x in (("q", q), ("k", k), ("v", v)))
    require(
        (all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)),
         f"{given}; expected 4-d tensors q [B,Hq,Tq,D], k [B,Hkv,Tk,D], v [B,Hkv,Tk,Dv]"),
    )
    B, H, Tq, D = q.shape
    require(
        (q.dtype in DTYPES, f"{given}; expected fp32, fp16, bf16 (or fp64, reference only)"),
        (q.dtype == k.dtype == v.dtype, f"{given}; expected one dtype: cast k and v to q's, or use autocast"),
        (q.device == k.device == v.device, f"{given}; expected one device: use .to(q.device)"),
        (k.shape[1] > 0 and k.shape[1] == v.shape[1], f"{given}; k and v need the same number of heads"),
        (H % max(k.shape[1], 1) == 0, f"{given}; Hq={H} must be a multiple of Hkv={k.shape[1]} (GQA)"),
        (k.shape[-1] == D, f"{given}; q and k need the same head dimension"),
        (k.shape[2] == v.shape[2], f"{given}; k and v need the same number of tokens"),
        (k.shape[0] == v.shape[0] == B, f"{given}; q, k and v need the same batch size"),
        (1 <= D <= 256 and 1 <= v.shape[-1] <= 256, f"{given}; head dimensions 1..256 are supported"),
        (math.isfinite(scale), f"scale={scale}: expected a finite number (default 1/sqrt(D))"),
        (math.isfinite(softcap) and softcap >= 0, f"softcap={softcap}: expected a positive number, or None for none"),
        (len(plans) > 0, "plan is an empty tuple: give at least one plan"),
    )
    for plan in plans:
        require(
            (isinstance(plan, Plan), f"plan is a {type(plan).__name__}: expected a Plan or a tuple of plans"),
        )
        batch, heads = plan.extent()
        require(
            (plan.Tq == Tq and plan.Tk == k.shape[2],
             f"the plan is for {plan.Tq} x {plan.Tk} tokens, the tensors hold {Tq} x {k.shape[2]}"),
            (batch in (1, B), f"the plan has batch size {batch}, the tensors {B}: expected 1 or {B}"),
            (H % heads == 0, f"the plan has {heads} heads: expected a divisor of Hq={H}"),
            (plan.device == q.device, f"the plan is on {plan.device}, q on {q.device}: use plan.to(q.device)"),
        )
    if key_bias is not None:
        want = f"key_bias: {_describe(key_bias)}; expected floating point [B|1, H, Tk={k.shape[2]}], H dividing {H}"
        require((isinstance(key_bias, Tensor) and key_bias.dim() == 3 and key_bias.is_floating_point(),
                 want + "; a full [T,T] bias is not supported (see docs/design.md)"))
        require(
            (key_bias.shape[0] in (1, B) and H % max(key_bias.shape[1], 1) == 0 and key_bias.shape[2] == k.shape[2],
             want),
            (key_bias.device == q.device, want + f" on {q.device}"),
        )
    if sink_logits is not None:
        require(
            (isinstance(sink_logits, Tensor) and sink_logits.shape == (H,) and sink_logits.is_floating_point()
             and sink_logits.device == q.device,
             f"sink_logits: {_describe(sink_logits)}; expected floating point [Hq={H}] on {q.device}"),
        )


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


def _autocast(*tensors: Tensor | None) -> list[Any]:
    first = tensors[0]
    kind = first.device.type if isinstance(first, Tensor) else "cpu"
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in tensors]


# ---------------------------------------------------------------- public


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plans | None = None, *, return_lse: Literal[False] = False,
              **options: Any) -> Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plans | None = None, *, return_lse: Literal[True],
              **options: Any) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plans | None = None, *, causal: bool = False, q_offset: int | Tensor = 0,
    scale: float | None = None, key_bias: Tensor | None = None, sink_logits: Tensor | None = None,
    softcap: float | None = None, return_lse: bool = False, deterministic: bool = True, backend: str | None = None,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys that a plan lets each query see, with exact gradients.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`, any strides; `Hq` a multiple of `Hkv`; fp32, fp16, bf16
        (fp64 on the reference backend). D and Dv up to 256.
    plan : Plan or tuple of Plan, optional
        What is seen; a tuple of plans with disjoint visible sets is one softmax over their union. None: dense.
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
    for name in unsupported:
        raise SparseFlashError(f"attention() has no argument {name!r}: " + _ELSEWHERE.get(name, "see help(attention)"))
    require(
        (plan is None or not causal,
         "plan together with causal=True: causality belongs to the plan, e.g. Plan.dense(Tq, Tk, causal=True)"),
        (plan is None or (isinstance(q_offset, int) and q_offset == 0),
         "plan together with q_offset: positions belong to the plan, e.g. Plan.dense(..., q_offset=...)"),
    )
    q, k, v = _autocast(q, k, v)
    if plan is None:
        require((isinstance(q, Tensor) and q.dim() == 4 and isinstance(k, Tensor) and k.dim() == 4,
                 f"q: {_describe(q)}, k: {_describe(k)}; expected [B,H,T,D]"))
        plan = Plan.dense(q.shape[2], k.shape[2], causal=causal, q_offset=q_offset, device=q.device)
    plans = (plan,) if isinstance(plan, Plan) else tuple(plan)
    scale = q.shape[-1] ** -0.5 if scale is None and isinstance(q, Tensor) else scale
    require((isinstance(scale, (int, float)), f"scale={scale!r}: expected a number or None"))
    cap = 0.0 if softcap is None else float(softcap)
    _validate(q, k, v, plans, float(scale), cap, key_bias, sink_logits)
    tensors, ints = flatten_all(plans)
    out, lse = _attention(q, k, v, key_bias, sink_logits, tensors, ints, float(scale), cap, backend or "")
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plans, *,
    dlse: Tensor | None = None, scale: float | None = None, key_bias: Tensor | None = None,
    softcap: float | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and key_bias from the GLOBAL out and lse: for rings, cascades and chunks.

    `out [B,Hq,Tq,Dv]` and `lse [B,Hq,Tq]` may come from a softmax over more keys than k and v hold here (ring
    attention, merged pieces, sinks): the result is this piece's share of the gradients. `dbias` is None
    without `key_bias`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v, dout = torch.randn(4, 1, 2, 100, 32)
    >>> plan = sf.Plan.dense(100, 100, causal=True)
    >>> out, lse = sf.attention(q, k, v, plan, return_lse=True)
    >>> dq, dk, dv, _ = sf.attention_backward(dout, q, k, v, out, lse, plan)
    """
    plans = (plan,) if isinstance(plan, Plan) else tuple(plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cap = 0.0 if softcap is None else float(softcap)
    _validate(q, k, v, plans, float(scale), cap, key_bias, None)
    want = (*q.shape[:3], v.shape[-1])
    require(
        (tuple(dout.shape) == want and tuple(out.shape) == want,
         f"dout: {_describe(dout)}, out: {_describe(out)}; expected {list(want)}"),
        (tuple(lse.shape) == want[:3], f"lse: {_describe(lse)}; expected {list(want[:3])}"),
    )
    tensors, ints = flatten_all(plans)
    dq, dk, dv, dbias = _attention_backward(
        dout, dlse, q, k, v, out, lse, key_bias, tensors, ints, float(scale), cap, backend or ""
    )
    return dq, dk, dv, None if key_bias is None else dbias


def _merge(parts: Sequence[tuple[Tensor, Tensor]], sink_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    lses = [lse for _, lse in parts]
    if sink_logits is not None:
        lses.append(sink_logits.to(lses[0].dtype)[None, :, None].expand_as(lses[0]))
    stack = torch.stack(lses)
    top = stack.detach().amax(0)
    top = torch.where(top == float("-inf"), 0, top)
    weight = torch.exp(stack - top)  # -inf gives 0, also in the gradient
    total = weight.sum(0)
    some = total > 0
    lse = torch.where(some, torch.log(torch.where(some, total, 1)) + top, float("-inf"))
    share = weight / torch.where(some, total, 1)
    state = torch.float64 if parts[0][0].dtype == torch.float64 else torch.float32
    out = sum(share[i][..., None] * out.to(state) for i, (out, _) in enumerate(parts))
    return out, lse  # type: ignore[return-value]


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key sets into attention over their union, exactly and differentiably.

    Parameters
    ----------
    parts : sequence of (out [B,H,T,Dv], lse [B,H,T])
        Results of `attention(..., return_lse=True)`.

    Returns
    -------
    (Tensor, Tensor)
        out (in the dtype of the parts) and lse.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 64, 32)
    >>> a = sf.attention(q, k[:, :, :40], v[:, :, :40], return_lse=True)
    >>> b = sf.attention(q, k[:, :, 40:], v[:, :, 40:], return_lse=True)
    >>> torch.allclose(sf.merge([a, b])[0], sf.attention(q, k, v), atol=1e-5)
    True
    """
    require((len(parts) > 0, "merge() of nothing: give at least one (out, lse)"))
    for out, lse in parts:
        require((out.shape[:-1] == lse.shape and out.shape == parts[0][0].shape,
                 f"out: {_describe(out)}, lse: {_describe(lse)}; expected [B,H,T,Dv] and [B,H,T], alike in all parts"))
    out, lse = _merge(parts)
    return out.to(parts[0][0].dtype), lse


__all__ = ["INT_SLOTS", "Plans", "attention", "attention_backward", "merge"]
