"""What every host needs: attention over a plan, or over what a method selected, by the op that suits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Method, Selection
from ..ops.attention import attention
from ..ops.decode import decode
from ..plan import Plan

FEW = 16
"""Up to so many queries, without gradients, `decode` is faster than `attention`."""


def exact(q: Tensor, k: Tensor, v: Tensor, plan: Plan | Sequence[Plan], options: dict[str, Any]) -> Tensor:
    """Attention over a plan."""
    return _fastest(q, k, v, *options.values())(q, k, v, plan, **options)


def over(
    method: Method, q: Tensor, k: Tensor, v: Tensor, selection: Selection, options: dict[str, Any]
) -> Tensor:
    """Attention over what a method selected."""
    op = _fastest(q, k, v, selection.key_bias, *options.values())
    return method.attend(q, k, v, selection, op, **options)[0]


def _fastest(q: Tensor, *others: Any) -> Callable[..., Any]:
    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, *others))
    return decode if q.shape[2] <= FEW and not learns else attention
