"""XAttention: blocks by the antidiagonals of their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..selection.budgets import top_p
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import check_counts, check_shares
from .blocks import BlockMethod


@dataclass(frozen=True)
class XAttention(BlockMethod):
    """Each tile of queries sees the blocks of keys that hold most of its mass, as antidiagonals estimate it.

    Queries and keys form groups of `stride`; a pair of groups is scored by the products along its
    antidiagonal, which crosses every row and every column of the pair.

    Papers: Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428,
    algorithm 1.

    Parameters
    ----------
    threshold : float
        Share of the estimated mass that a tile keeps, in (0, 1]; not a recall.
    stride : int
        Tokens of a group; divides the block. More is cheaper and coarser.
    block, sinks, near, dense_tiles, share
        As in every method that chooses blocks (`BlockMethod`).

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, `scale` and `softcap`. An estimate by groups
    misses a single key that one query looks for (a lone needle).

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

    paper = "arXiv 2503.16428"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "threshold")
        check_counts(self, 1, "stride")

    def estimate(self, q: Tensor, k: Tensor, grid: Grid, told: dict[str, Any]) -> Tensor:
        """Estimate mass by antidiagonals of groups."""
        return tile_mass(q, k, grid, "antidiagonal", stride=self.stride, **told)

    def choose(self, mass: Tensor, reach: Tensor, near: Tensor) -> Tensor:
        """Keep the fewest blocks of each tile that hold the share of the mass."""
        return top_p(mass, self.threshold, among=reach)
