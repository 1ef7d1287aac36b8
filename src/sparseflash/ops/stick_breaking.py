"""`stick_breaking`: stick-breaking attention over any plan."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.dispatch import choose
from ..backends.numerics import Stick, empty_like_layout, state_dtype
from ..common.errors import SparseFlashError
from ..plan import Plan
from ..plan.options import earlier
from ._arguments import (
    as_backend,
    as_scale,
    autocast,
    check_inputs,
    check_plan,
    describe,
)
from ._register import Gradient, register


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick) -> tuple[Tensor, Tensor]:
    run = choose("stick_forward", options.backend, q, k, v).stick_forward
    return run(q, k, v, plan, options)


def _empty(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_like_layout(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=state_dtype(q))


def _backward(
    dout: Tensor, drem: Tensor | None, q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick
) -> tuple[Tensor, Tensor, Tensor]:
    run = choose("stick_backward", options.backend, q, k, v).stick_backward
    dq, dk, dv = run(dout, drem, q, k, v, plan, options)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _empty_gradients(
    dout: Any, drem: Any, q: Any, k: Any, v: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_gradients = register("stick_breaking_backward", _backward, _empty_gradients)


def _find(run: Any, kept: Any, slopes: Any, *rest: Any) -> Any:
    q, k, v = kept
    dout, drem = slopes
    dout = q.new_zeros(*q.shape[:3], v.shape[3]) if dout is None else dout
    return run(dout, drem, q, k, v, *rest)


_stick = register(
    "stick_breaking",
    _forward,
    _empty,
    gradient=Gradient(_find, lambda given, found: given, _gradients),
)


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
    """Stick-breaking attention: from the newest key on, each takes a share of what newer keys left over.

    `A_ij = sigmoid(z_ij) * prod over newer keys t of (1 - sigmoid(z_it))`, `z = scale * q.k`, `out = A v`
    (Tan et al. 2024, arXiv 2410.17980, section 2). It replaces both softmax and positional embedding: recent
    keys are favoured without a window. Rows do not sum to one; the remainder of the stick is
    `rem = 1 - sum of A`, and the caller decides how to use it (some add `rem * v` of the query's own token).

    Newer means a later key row: a later token, or a later row of the plan's `k_order`. Hidden keys take
    nothing. A block of 64 queries stops at the point where, in fp32, nothing is left of any of its sticks;
    this changes no bit of the result. Memory is linear in the lengths.

    Parameters
    ----------
    q, k, v : Tensor
        `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`, any strides; `Hq` a multiple of `Hkv`; fp32, fp16,
        bf16 (fp64 on the reference backend). D and Dv up to 256.
    plan : Plan, optional
        Visible pairs; any single plan. None: every earlier key.
    include_self : bool
        Only without a plan: whether a query also sees the key at its own position (not in the paper).
    q_offset : int
        Only without a plan: query i is at position `i + q_offset`.
    scale : float, optional
        Factor of the scores, 1/sqrt(D) by default.
    return_rem : bool
        Also return the remainder of each stick, fp32 `[B,Hq,Tq]`, differentiable.
    backend : str, optional
        "reference", "cpu" or "triton"; None chooses the fastest usable one.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,Tq,Dv]`, and rem; 0 and 1 for a query that sees nothing.

    Raises
    ------
    SparseFlashError
        If an argument is invalid; the message says what was given, what is expected and how to fix it.

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
    if plan is not None and not isinstance(plan, Plan):
        raise SparseFlashError(
            f"plan is {describe(plan)}: expected one Plan; keys need one order, so a tuple of plans has none"
        )
    if not isinstance(include_self, bool):
        raise SparseFlashError(f"include_self={include_self!r}: expected True or False")
    if not isinstance(return_rem, bool):
        raise SparseFlashError(f"return_rem={return_rem!r}: expected True or False")
    if plan is not None and include_self:
        raise SparseFlashError(
            "plan together with include_self=True: it belongs to the plan: Plan.dense(..., causal=True)"
        )
    if plan is not None and q_offset != 0:
        raise SparseFlashError(
            "plan together with q_offset: positions belong to the plan, e.g. Plan.dense(..., q_offset=...)"
        )
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    if plan is None:  # strictly earlier keys: shift queries back by one
        offset = earlier(q_offset, 0 if include_self else 1)
        plan = Plan.dense(q.shape[2], k.shape[2], causal=True, q_offset=offset, device=q.device)
    check_plan(plan, q, k)
    options = Stick(as_scale(scale, q.shape[-1]), as_backend(backend))
    out, rem = _stick(q, k, v, plan, options)
    return (out, rem) if return_rem else out
