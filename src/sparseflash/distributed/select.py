"""What a method selects when its queries and keys lie on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SparseFlashError
from ..methods.base import Method
from ..ops._arguments import AnyPlan
from .layouts import Layout


class Shards:
    """What a method may ask of the ranks while it selects: few numbers a token, never q or k of all.

    Attributes
    ----------
    rank, world : int
        This rank, and how many there are.
    layout : Layout
        The tokens of each.
    """

    def __init__(self, cp: Any) -> None:
        self._cp, self.rank, self.world = cp, cp.rank, cp.world

    @property
    def layout(self) -> Layout:
        """The tokens of each rank."""
        found: Layout = self._cp.layout
        return found

    @property
    def positions(self) -> Tensor:
        """The token of each local row."""
        found: Tensor = self._cp.positions
        return found

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over ranks, the same everywhere."""
        return x if self._cp.peers is None else self._cp.peers.sum(x.contiguous().clone())

    def logsumexp(self, x: Tensor) -> Tensor:
        """The log of the sum over ranks of the exponentials of a tensor."""
        if self._cp.peers is None:
            return x
        return torch.logsumexp(torch.stack(self._cp.peers.gather(x.contiguous())), 0)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All tokens of a tensor that has a few numbers a token."""
        found: Tensor = self._cp.unshard(x, dim)
        return found

    def last(self, x: Tensor, n: int) -> Tensor:
        """The last n tokens of `x [B,H,T of this rank,D]`, from the ranks that have them."""
        T = self.layout.T
        n = min(n, T)
        own = self.positions >= T - n
        found = x.new_zeros(*x.shape[:2], n, x.shape[3])
        found[:, :, self.positions[own] - (T - n)] = x[:, :, own.to(x.device)]
        return self.sum(found)


def selected(cp: Any, method: Method, q: Tensor, k: Tensor, v: Tensor, ctx: Mapping[str, Any]) -> AnyPlan:
    """The plan that a method selects over the tokens of all ranks; the same on every rank.

    A method that knows of ranks (`select_across`) is asked so. One that looks at lengths alone is given them.
    Any other gets q and k of all ranks, for the time of the selection.
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
