"""What hosts share: attention over a plan or a selection, by the faster op; methods from plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
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


def named_method(given: Any, example: str) -> tuple[str, dict[str, Any]] | None:
    """Read a method from plain data: a name, or an object with a name and hyper-parameters (lists: tuples).

    None and "dense" name none.
    """
    if given in (None, "dense"):
        return None
    more = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = more.pop("name", None)
    if not isinstance(name, str):
        raise SparseFlashError(
            f'{given!r}: expected a name, or an object that has one: {{"name": "{example}", ...}}'
        )
    return name, {key: tuple(x) if isinstance(x, list) else x for key, x in more.items()}


def _fastest(q: Tensor, options: dict[str, Any], *others: Any) -> Callable[..., Any]:
    given = (q, *others, *options.values())
    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
    able = not learns and not options.keys() & {"dropout_p", "pair_bias"}
    return decode if q.shape[2] <= FEW and able else attention
