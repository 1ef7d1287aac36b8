"""What methods that choose blocks share: an estimate, a budget, what is kept in any case, and a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..selection.grid import Grid
from .base import Context, Method, Selection, Share, check_counts, check_share, shared


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method):
    """Tiles of queries that see blocks of keys by an estimate of their mass.

    A method says how it estimates and what it keeps of that; the first blocks, those nearest, and all that
    the last tiles reach can be kept beside.

    Parameters
    ----------
    block : int
        Queries of a tile, and keys of a block.
    sinks, near : int
        First blocks, and blocks back from the tile's own, that are kept whatever is estimated.
    dense_tiles : int
        Last tiles that see everything before them: questions stand at the end of a prompt.
    share : "", "sum" or "max"
        "": each query head is judged by itself; else those of a KV head together, by the sum or the largest
        of what they give, and lists are shared.
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
        """The mass of each block, `[B,Hq,R,C]`; `told` is what the method reads beside `q_offset`."""
        raise NotImplementedError(f"{type(self).__name__}.estimate")

    def choose(self, mass: Tensor, reach: Tensor, near: Tensor) -> Tensor:
        """The blocks that are kept of those in reach; `near` are kept in any case."""
        raise NotImplementedError(f"{type(self).__name__}.choose")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Blocks by the estimate and the budget of the method, and those that are kept in any case."""
        ctx = ctx or {}
        grid = Grid(q.shape[2], k.shape[2], self.block, self.block, ctx.get("q_offset", 0), device=q.device)
        told = {name: ctx.get(name) for name in self.reads if name != "q_offset"}
        mass = self.estimate(q, k, grid, told)
        mass = shared(mass, k, self.share)
        near = grid.near(self.sinks, self.near)
        keep = self.choose(mass, grid.reach(), near) | near
        return Selection(grid.plan(grid.ended(keep, self.dense_tiles)))
