"""Select a plan when queries and keys are sharded over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..methods.base import Method
from ..ops._arguments import AnyPlan
from ..selection.sharded import Sharded


def selected(cp: Any, method: Method, q: Tensor, k: Tensor, v: Tensor, ctx: Mapping[str, Any]) -> AnyPlan:
    """Select a method's plan over the tokens of all ranks; it is equal on every rank.

    The method gets `Sharded` queries and keys: what it probes or pools is exchanged as a few numbers per
    token, and all tokens are gathered where it does anything else with them.
    """
    with torch.no_grad():
        given = {name: x for name, x in ctx.items() if x is not None}
        ctx = {"scale": k.shape[-1] ** -0.5, "softcap": None} | given
        if cp.peers is not None:
            cp.at(f"selection of {type(method).__name__}")
            q, k = Sharded(q, cp.layout.ranks, cp.peers), Sharded(k, cp.key_layout.ranks, cp.peers)
        selection = method.select(q, k, ctx)
    beside = "key_bias", "gate", "inputs", "state", "skip_below"
    more = [n for n in beside if getattr(selection, n) is not None]
    if more:
        raise SparseFlashError(
            f"{type(method).__name__} selects {', '.join(more)} beside a plan, which does not go over ranks: "
            "give its plan, and key_bias of this rank's keys, to sf.distributed.attention"
        )
    return selection.plan
