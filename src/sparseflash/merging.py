"""One softmax over several plans: what each of them gives is merged exactly, and attention sinks with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import state_dtype
from .plan import Plan
from .plan.flat import empty_like_layout


def merged(
    parts: Sequence[tuple[Tensor, Tensor]], sink_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Out and lse, in full precision, of parts over disjoint keys, and of sinks [H]; differentiable."""
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
    outs = (share[i][..., None] * out.to(state) for i, (out, _) in enumerate(parts))
    return functools.reduce(torch.add, outs), lse


def over_plans(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    *,
    sink_logits: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What `attend` gives over each plan, as one softmax: out like q, and lse."""
    alone = len(plans) == 1 and sink_logits is None
    options["out_dtype"] = q.dtype if alone else state_dtype(q)
    parts = [attend(q, k, v, plan, **options) for plan in plans]
    if alone:
        return parts[0]
    out, lse = merged(parts, sink_logits)
    return empty_like_layout(q, v.shape[-1]).copy_(out), lse
