"""Select a plan when queries and keys are sharded over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..methods.base import Method
from ..ops._arguments import AnyPlan
from .layouts import Layout


class Shards:
    """Collectives for methods that select across ranks: few numbers per token, never all of q or k.

    Attributes
    ----------
    rank, world : int
        This rank, and the number of ranks.
    layout : Layout
        Placement of the tokens.
    """

    def __init__(self, cp: Any) -> None:
        self._cp, self.rank, self.world = cp, cp.rank, cp.world

    @property
    def layout(self) -> Layout:
        """Placement of the tokens."""
        found: Layout = self._cp.layout
        return found

    @property
    def positions(self) -> Tensor:
        """Position of each local token."""
        found: Tensor = self._cp.positions
        return found

    def sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over ranks; all get the result."""
        return x if self._cp.peers is None else self._cp.peers.sum(x.contiguous().clone())

    def logsumexp(self, x: Tensor) -> Tensor:
        """Log-sum-exp of a tensor over ranks."""
        if self._cp.peers is None:
            return x
        return torch.logsumexp(torch.stack(self._cp.peers.gather(x.contiguous())), 0)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """Gather all tokens of a tensor with few numbers per token."""
        found: Tensor = self._cp.unshard(x, dim)
        return found

    def means(self, x: Tensor, block: int) -> Tensor:
        """Mean of each `block` consecutive tokens of all ranks; of x [B,H,n,D], [B,H,ceil(T / block),D]."""
        B, H, _, D = x.shape
        T, wide = self.layout.T, torch.float64 if x.dtype == torch.float64 else torch.float32
        found = x.new_zeros(B, H, -(-T // block), D, dtype=wide)
        found.index_add_(2, self.positions.to(x.device) // block, x.to(wide))
        size = torch.arange(T, device=x.device).div(block, rounding_mode="floor").bincount()
        return self.sum(found) / size[:, None]

    def last(self, x: Tensor, n: int) -> Tensor:
        """The last n tokens of `x [B,H,T of this rank,D]`, gathered from the ranks that hold them."""
        T = self.layout.T
        n = min(n, T)
        own = self.positions >= T - n
        found = x.new_zeros(*x.shape[:2], n, x.shape[3])
        found[:, :, self.positions[own] - (T - n)] = x[:, :, own.to(x.device)]
        return self.sum(found)


def selected(cp: Any, method: Method, q: Tensor, k: Tensor, v: Tensor, ctx: Mapping[str, Any]) -> AnyPlan:
    """Select a method's plan over the tokens of all ranks; it is equal on every rank.

    A method with `select_across` uses that. One that depends only on lengths gets placeholder tensors of the
    full length. For any other, q and k of all ranks are gathered for the selection.
    """
    with torch.no_grad():
        given = {name: x for name, x in ctx.items() if x is not None}
        ctx = {"scale": k.shape[-1] ** -0.5, "softcap": None} | given
        across = getattr(method, "select_across", None)
        if across is not None:
            selection = across(q, k, Shards(cp), ctx)
        elif type(method).by_shape:
            wide = (x.new_empty(1).expand(*x.shape[:2], T, x.shape[3]) for x, T in _lengths(cp, q, k))
            selection = method.select(*wide, ctx)
        else:
            cp.at("gathering queries and keys for a selection")
            selection = method.select(cp.unshard(q, 2), cp.unshard(k, 2), ctx)
    beside = "key_bias", "gate", "inputs", "state", "skip_below"
    more = [n for n in beside if getattr(selection, n) is not None]
    if more:
        raise SparseFlashError(
            f"{type(method).__name__} selects {', '.join(more)} beside a plan, which does not go over ranks: "
            "give its plan, and key_bias of this rank's keys, to sf.distributed.attention"
        )
    return selection.plan


def _lengths(cp: Any, q: Tensor, k: Tensor) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    return (q, cp.layout.T), (k, cp.key_layout.T)
