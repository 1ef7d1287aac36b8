"""Attention for hosts, over a plan or a method's selection, by the faster of `attention` and `decode`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Context, Selection
from ..methods.session import Session
from ..ops.attention import attention
from ..ops.decode import decode
from ..plan import Plan

FEW = 16
"""Up to this many queries, without gradients, `decode` is faster than `attention`."""


def exact(q: Tensor, k: Tensor, v: Tensor, plan: Plan | Sequence[Plan], options: dict[str, Any]) -> Tensor:
    """Attend over a plan."""
    return _fastest(q, options, k, v)(q, k, v, plan, **options)


def over(
    session: Session,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    options: dict[str, Any],
    ctx: Context,
) -> Tensor:
    """Attend over the selection of a session's method, and keep what the method observes for later calls."""
    method = session.method
    op = _fastest(q, options, k, v, selection.key_bias)
    out, lse = method.attend(q, k, v, selection, op, **options)
    session.keep(ctx, method.observe(q, k, out, lse, selection, ctx))
    return out


def _fastest(q: Tensor, options: dict[str, Any], *others: Any) -> Callable[..., Any]:
    given = (q, *others, *options.values())
    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
    able = not learns and not options.keys() & {"dropout_p", "pair_bias"}
    return decode if q.shape[2] <= FEW and able else attention
