"""`pointwise_attention`: a weight for every visible pair, without a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import Pointwise, empty_like_layout, state_dtype
from ..common.errors import SparseFlashError
from ..plan import Plan
from ._arguments import (
    AnyPlan,
    as_backend,
    as_plans,
    as_scale,
    autocast,
    check_inputs,
    check_plan,
    is_finite,
)
from ._register import Gradient, register

Activation = Literal["silu", "relu2"]


def _forward(q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], options: Pointwise) -> Tensor:
    wide = q.dtype if len(plans) == 1 else state_dtype(q)
    run = choose("pointwise_forward", options.backend, q, k, v).pointwise_forward
    total, *parts = (run(q, k, v, plan, options, out_dtype=wide) for plan in plans)
    for part in parts:
        total += part
    return total.to(q.dtype)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], options: Pointwise
) -> tuple[Tensor, Tensor, Tensor]:
    wide = q.dtype if len(plans) == 1 else state_dtype(q)
    run = choose("pointwise_backward", options.backend, q, k, v).pointwise_backward
    total, *parts = (run(dout, q, k, v, plan, options, grad_dtype=wide) for plan in plans)
    for part in parts:
        for x, y in zip(total, part, strict=True):
            x += y
    dq, dk, dv = (x.to(q.dtype) for x in total)
    return dq, dk, dv


def _empty_gradients(dout: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_gradients = register("pointwise_attention_backward", _backward, _empty_gradients)


def _find(run: Any, kept: Any, slopes: Any, *rest: Any) -> Any:
    q, k, v = kept
    dout = q.new_zeros(*q.shape[:3], v.shape[3]) if slopes[0] is None else slopes[0]
    return run(dout, q, k, v, *rest)


_pointwise = register(
    "pointwise_attention",
    _forward,
    lambda q, k, v, *rest: empty_like_layout(q, v.shape[-1]),
    gradient=Gradient(_find, lambda given, found: given, _gradients),
)


def pointwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan | None = None,
    *,
    activation: Activation = "silu",
    causal: bool = False,
    scale: float | None = None,
    out_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Attention with an elementwise activation: `O = out_scale * sum of f(scale * q k) v`.

    Without a softmax no weight depends on another: used by recommenders (HSTU: silu), and as a replacement of
    the softmax (squared ReLU). Takes the same plans, with the same guarantees, as `sparseflash.attention`.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`, as in `sparseflash.attention`.
    plan : Plan or tuple of Plan, optional
        Visible pairs; the results of several plans are added. None: dense.
    activation : "silu" or "relu2"
        f: `x / (1 + exp(-x))`, or `max(x, 0)^2`.
    causal : bool
        Only without a plan: query i sees keys 0..i.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    out_scale : float
        Factor of the weights, applied before any rounding; HSTU uses 1 / longest length.
    backend : str, optional
        As in `sparseflash.attention`.

    Returns
    -------
    Tensor
        `[B,Hq,Tq,Dv]`: 0 for a query that sees nothing.

    References
    ----------
    Zhai et al., Actions speak louder than words (https://arxiv.org/abs/2402.17152); Hua et al., Transformer
    quality in linear time (https://arxiv.org/abs/2202.10447).

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 100, 32)
    >>> out = sf.pointwise_attention(q, k, v, causal=True, out_scale=1 / 100)
    >>> weights = torch.nn.functional.silu(q @ k.mT / 32**0.5).tril()
    >>> torch.allclose(out, weights @ v / 100, atol=1e-5)
    True
    """
    if activation not in ("silu", "relu2"):
        raise SparseFlashError(f"activation={activation!r}: expected 'silu' or 'relu2'")
    if not isinstance(causal, bool):
        raise SparseFlashError(f"causal={causal!r}: expected True or False")
    if plan is not None and causal:
        raise SparseFlashError(
            "plan together with causal=True: causality belongs to the plan: Plan.dense(Tq, Tk, causal=True)"
        )
    if not is_finite(out_scale):
        raise SparseFlashError(f"out_scale={out_scale!r}: expected a finite number")
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    if plan is None:
        plan = Plan.dense(q.shape[2], k.shape[2], causal=causal, device=q.device)
    plans = as_plans(plan)
    for one in plans:
        check_plan(one, q, k)
    options = Pointwise(activation, as_scale(scale, q.shape[-1]), float(out_scale), as_backend(backend))
    return _pointwise(q, k, v, plans, options)
