"""Blocks by the energy of their mean keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..selection.budgets import above, share
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import Context, Method, Selection, check_counts, check_shares


@dataclass(frozen=True)
class FlashPrefill(Method):
    """Each tile of queries sees the blocks whose estimated mass is not far below that of its best block.

    Every query is multiplied with the mean of each `stride` keys, and the weights of a tile are relative to
    one maximum, so that its loudest queries decide. The threshold is relative to the best block: no sum over
    blocks has to be sorted.

    Papers: Fan et al., "FlashPrefill: Instantaneous Pattern Discovery and Thresholding", arXiv 2603.06199.

    Parameters
    ----------
    alpha : float
        What a block must have of the mass of its tile's best one, in (0, 1].
    stride : int
        Keys of a mean; divides the block.
    block : int
        Queries of a tile, and keys of a block.
    sinks, near : int
        First blocks, and blocks back from the tile's own, that are kept whatever is estimated.
    dense_tiles : int
        Last tiles that see everything before them.
    summed : bool
        Judge for all query heads of a KV head together.

    Notes
    -----
    Of `ctx`: `q_offset`, the position of the first query, `scale` and `softcap`. The correction of the second
    version (arXiv 2608.19758), which gives dropped blocks their mean, is not made here.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.FlashPrefill(alpha=1.0, near=1, dense_tiles=0)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 1
    (torch.Size([1, 2, 1024, 32]), True)
    """

    alpha: float = 0.1
    stride: int = 16
    block: int = 128
    sinks: int = 2
    near: int = 4
    dense_tiles: int = 8
    summed: bool = False

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2603.06199"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_shares(self, "alpha")
        check_counts(self, 1, "stride", "block", "near")
        check_counts(self, 0, "sinks", "dense_tiles")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """The blocks of each tile above its threshold."""
        ctx = ctx or {}
        grid = Grid(q.shape[2], k.shape[2], self.block, self.block, ctx.get("q_offset", 0), device=q.device)
        told = {name: ctx.get(name) for name in ("scale", "softcap")}
        mass = tile_mass(q, k, grid, "energy", stride=self.stride, **told)
        mass = share(mass, k.shape[1], "sum") if self.summed else mass
        keep = above(mass, self.alpha, among=grid.reach()) | grid.near(self.sinks, self.near)
        return Selection(grid.plan(grid.ended(keep, self.dense_tiles)))
