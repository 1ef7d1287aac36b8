"""The best blocks by their mean keys: what everything dearer is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..selection.budgets import share, top_k
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import Context, Method, Selection, check_counts


@dataclass(frozen=True)
class BlockTopK(Method):
    """Each tile of queries sees so many blocks of keys: those whose mean key suits its mean query best.

    Pooling costs next to nothing and works where neighbours are alike. It is blind to a single key that one
    query looks for. The block choice of MoBA (arXiv 2502.13189) and of many others, without training.

    Parameters
    ----------
    blocks : int
        Blocks of a tile that are chosen, beside those that are kept in any case.
    block : int
        Queries of a tile, and keys of a block.
    sinks, near : int
        First blocks, and blocks back from the tile's own, that are kept whatever is estimated.
    dense_tiles : int
        Last tiles that see everything before them.
    summed : bool
        Choose for all query heads of a KV head together.

    Notes
    -----
    Of `ctx`: `q_offset`, the position of the first query, `scale` and `softcap`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.BlockTopK(blocks=3, block=64)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.6
    (torch.Size([1, 2, 1024, 32]), True)
    """

    blocks: int = 16
    block: int = 64
    sinks: int = 1
    near: int = 1
    dense_tiles: int = 0
    summed: bool = False

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2502.13189"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_counts(self, 1, "blocks", "block", "near")
        check_counts(self, 0, "sinks", "dense_tiles")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """The best blocks of each tile, beside the first and the nearest."""
        ctx = ctx or {}
        grid = Grid(q.shape[2], k.shape[2], self.block, self.block, ctx.get("q_offset", 0), device=q.device)
        mass = tile_mass(q, k, grid, "mean", **{name: ctx.get(name) for name in ("scale", "softcap")})
        mass = share(mass, k.shape[1], "sum") if self.summed else mass
        near = grid.near(self.sinks, self.near)
        keep = top_k(mass, self.blocks, among=grid.reach() & ~near) | near
        return Selection(grid.plan(grid.ended(keep, self.dense_tiles)))
