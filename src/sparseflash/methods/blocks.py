"""`BlockMethod`, the base of methods that select blocks: estimate, budget, always-kept blocks, plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..selection.grid import Grid
from .base import Context, Method, Selection, Share, check_counts, check_share, shared


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method):
    """Tiles of queries see blocks of keys, selected by an estimate of the blocks' mass.

    A subclass defines the estimate and the selection. Sink blocks, the nearest blocks, and everything in
    reach of the last tiles can be kept in addition.

    Parameters
    ----------
    block : int
        Queries of a tile, and keys of a block.
    sinks, near : int
        First blocks, and blocks back from the tile's own (included), that are always kept.
    dense_tiles : int
        Last tiles that see everything before them, where a prompt's question is.
    share : "", "sum" or "max"
        "": each query head selects for itself; otherwise the query heads of a KV head share a selection, by
        the sum or maximum of their scores.
    """

    block: int = 128
    sinks: int = 1
    near: int = 1
    dense_tiles: int = 0
    share: Share = ""

    reads = ("q_offset", "scale", "softcap")
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_share(self)
        check_counts(self, 1, "block", "near")
        check_counts(self, 0, "sinks", "dense_tiles")

    def estimate(self, q: Tensor, k: Tensor, grid: Grid, told: dict[str, Any]) -> Tensor:
        """Estimate the mass of each block, `[B,Hq,R,C]`; `told` is the `ctx` it reads beside `q_offset`."""
        raise NotImplementedError(f"{type(self).__name__}.estimate")

    def choose(self, mass: Tensor, reach: Tensor, near: Tensor) -> Tensor:
        """Select blocks in reach from their mass; `near` blocks are always kept."""
        raise NotImplementedError(f"{type(self).__name__}.choose")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select blocks by the method's estimate and budget, and add the always-kept ones."""
        ctx = ctx or {}
        grid = Grid(q.shape[2], k.shape[2], self.block, self.block, ctx.get("q_offset", 0), device=q.device)
        told = {name: ctx.get(name) for name in self.reads if name != "q_offset"}
        mass = shared(self.estimate(q, k, grid, told), k, self.share)
        near = grid.near(self.sinks, self.near)
        keep = self.choose(mass, grid.reach(), near) | near
        return Selection(grid.plan(grid.ended(keep, self.dense_tiles)))
