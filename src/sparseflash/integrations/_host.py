"""What every host needs: attention over a plan, or over what a method selected, by the op that suits it."""

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
"""Up to so many queries, without gradients, `decode` is faster than `attention`."""


def exact(q: Tensor, k: Tensor, v: Tensor, plan: Plan | Sequence[Plan], options: dict[str, Any]) -> Tensor:
    """Attention over a plan."""
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
    """Attention over what the method of a session selected, and what it wants to remember of it."""
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
