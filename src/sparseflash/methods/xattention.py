"""Blocks by the antidiagonals of their scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..selection.budgets import share, top_p
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import Context, Method, Selection, check_counts, check_shares


@dataclass(frozen=True)
class XAttention(Method):
    """Each tile of queries sees the blocks of keys that hold most of its mass, as antidiagonals estimate it.

    Queries and keys stand in groups of `stride`; a pair of groups is judged by the products along its
    antidiagonal, which every row and every column of the pair crosses.

    Papers: Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428,
    algorithm 1.

    Parameters
    ----------
    threshold : float
        Share of the estimated mass that a tile keeps, in (0, 1]. It is no recall.
    stride : int
        Tokens of a group; divides the block. More is cheaper and coarser.
    block : int
        Queries of a tile, and keys of a block.
    sinks, near : int
        First blocks, and blocks back from the tile's own, that are kept whatever is estimated.
    dense_tiles : int
        Last tiles that see everything before them: questions stand at the end of a prompt.
    summed : bool
        Judge for all query heads of a KV head together.

    Notes
    -----
    Of `ctx`: `q_offset`, the position of the first query, `scale` and `softcap`. An estimate of groups is
    blind to a single key that one query looks for (a lone needle).

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.XAttention(threshold=0.5)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.8
    (torch.Size([1, 2, 1024, 32]), True)
    """

    threshold: float = 0.9
    stride: int = 8
    block: int = 128
    sinks: int = 1
    near: int = 1
    dense_tiles: int = 0
    summed: bool = False

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2503.16428"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_shares(self, "threshold")
        check_counts(self, 1, "stride", "block", "near")
        check_counts(self, 0, "sinks", "dense_tiles")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """The fewest blocks of each tile that hold the share of the mass."""
        ctx = ctx or {}
        grid = Grid(q.shape[2], k.shape[2], self.block, self.block, ctx.get("q_offset", 0), device=q.device)
        told = {name: ctx.get(name) for name in ("scale", "softcap")}
        mass = tile_mass(q, k, grid, "antidiagonal", stride=self.stride, **told)
        mass = share(mass, k.shape[1], "sum") if self.summed else mass
        keep = top_p(mass, self.threshold, among=grid.reach()) | grid.near(self.sinks, self.near)
        return Selection(grid.plan(grid.ended(keep, self.dense_tiles)))
