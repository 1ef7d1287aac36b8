"""`stick_breaking`: each key takes a share of what newer keys left over, over any plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose
from ..errors import require
from ..numerics import empty_like_layout, state_dtype
from ..plan import Plan
from ..plan.flat import flatten, unflatten
from ..plan.options import earlier
from ._arguments import (
    as_backend,
    as_scale,
    autocast,
    check_inputs,
    check_plan,
    describe,
    own_precision,
    unwatched,
)
from ._register import differentiable, last


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    run = choose("stick_forward", backend, q, k, v).stick_forward
    with own_precision(q):
        return run(q, k, v, plan, scale=scale)


@torch.library.custom_op("sparseflash::stick_breaking", mutates_args=())
def _stick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan_tensors: Sequence[Tensor],
    plan_ints: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, unflatten(plan_tensors, plan_ints), scale, backend)


@_stick.register_fake
def _(
    q: Any, k: Any, v: Any, plan_tensors: Any, plan_ints: Any, scale: Any, backend: Any
) -> tuple[Tensor, Tensor]:
    return empty_like_layout(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=state_dtype(q))


@torch.library.custom_op("sparseflash::stick_breaking_backward", mutates_args=())
def _stick_backward(
    dout: Tensor,
    drem: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan_tensors: Sequence[Tensor],
    plan_ints: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = unflatten(plan_tensors, plan_ints)
    run = choose("stick_backward", backend, q, k, v).stick_backward
    with own_precision(q):
        dq, dk, dv = run(dout, drem, q, k, v, plan, scale=scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_stick_backward.register_fake
def _(
    dout: Any,
    drem: Any,
    q: Any,
    k: Any,
    v: Any,
    plan_tensors: Any,
    plan_ints: Any,
    scale: Any,
    backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


_watched_backward = last(_stick_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tensors, ctx.ints, ctx.scale, ctx.backend = inputs
    ctx.slots = len(tensors)
    ctx.save_for_backward(q, k, v, *tensors)


def _backward(ctx: Any, dout: Tensor | None, drem: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *tensors = ctx.saved_tensors
    dout = q.new_zeros(*q.shape[:3], v.shape[3]) if dout is None else dout
    dq, dk, dv = _watched_backward(dout, drem, q, k, v, tensors, ctx.ints, ctx.scale, ctx.backend)
    return dq, dk, dv, [None] * ctx.slots, None, None, None


_watched = differentiable(_stick, _backward, _setup_context)


def stick_breaking(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | None = None,
    *,
    include_self: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
    return_rem: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stick-breaking attention: newest first, each key takes a share of what newer keys left over.

    `A_ij = sigmoid(z_ij) * prod over newer keys t of (1 - sigmoid(z_it))`, `z = scale * q.k`, `out = A v`
    (Tan et al. 2024, arXiv 2410.17980, section 2). It replaces softmax and positional embedding at once:
    recent keys come first, without a window. Rows do not sum to one; what is left of the stick is
    `rem = 1 - sum of A`, and what becomes of it is the caller's choice (some add `rem * v` of the query's own
    token).

    Newer means a later row of keys: of the tokens as given, or as the plan's `k_order` lists them. Keys that
    the plan hides take nothing. Keys beyond the point where fp32 has nothing left of any stick of 64 queries
    are not visited; that changes no bit. Memory is linear in the lengths.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`, any strides; `Hq` a multiple of `Hkv`; fp32, fp16,
        bf16 (fp64 on the reference backend). D and Dv up to 256.
    plan : Plan, optional
        What is seen; any one plan. None: every earlier key.
    include_self : bool
        Only without a plan: whether a query also sees the key at its own position (the paper's does not).
    q_offset : int
        Only without a plan: query i is at position `i + q_offset`.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    return_rem : bool
        Also return what is left of each stick, fp32 `[B,Hq,Tq]`, differentiable.
    backend : str, optional
        "reference", "cpu" or "triton"; None chooses the fastest usable one.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`, and rem; 0 and 1 for a query that sees nothing.

    Raises
    ------
    SparseFlashError
        Saying what was given, what was expected and how to mend it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 200, 32)
    >>> out, rem = sf.stick_breaking(q, k, v, return_rem=True)
    >>> bool((out[:, :, 0] == 0).all()), bool((rem[:, :, 0] == 1).all())
    (True, True)
    >>> window = sf.Plan.dense(200, 200, causal=True, window=(63, 0))
    >>> sf.stick_breaking(q, k, v, window).shape
    torch.Size([1, 2, 200, 32])
    """
    require(
        (
            plan is None or isinstance(plan, Plan),
            f"plan is {describe(plan)}: expected one Plan; keys need one order, so a tuple of plans has none",
        ),
        (isinstance(include_self, bool), f"include_self={include_self!r}: expected True or False"),
        (isinstance(return_rem, bool), f"return_rem={return_rem!r}: expected True or False"),
        (
            plan is None or not include_self,
            "plan together with include_self=True: it belongs to the plan: Plan.dense(..., causal=True)",
        ),
        (
            plan is None or q_offset == 0,
            "plan together with q_offset: positions belong to the plan, e.g. Plan.dense(..., q_offset=...)",
        ),
    )
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    if plan is None:  # strictly earlier keys: as if each query stood one token before
        offset = earlier(q_offset, 0 if include_self else 1)
        plan = Plan.dense(q.shape[2], k.shape[2], causal=True, q_offset=offset, device=q.device)
    check_plan(plan, q, k)
    factor, name = as_scale(scale, q.shape[-1]), as_backend(backend)
    if unwatched(q, k, v):
        out, rem = _forward(q, k, v, plan, factor, name)
    else:
        tensors, ints = flatten(plan)
        out, rem = _watched(q, k, v, tensors, ints, factor, name)
    return (out, rem) if return_rem else out
