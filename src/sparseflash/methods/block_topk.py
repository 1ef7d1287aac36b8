"""Top-k blocks by mean keys: the baseline for more expensive estimates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..selection.budgets import top_k
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import check_counts
from .blocks import BlockMethod


@dataclass(frozen=True)
class BlockTopK(BlockMethod):
    """Each tile of queries sees the k blocks whose mean key has the largest product with its mean query.

    Pooling costs next to nothing and works where neighbours are alike. It misses a single key that one query
    looks for. This is the block selection of MoBA (arXiv 2502.13189) and many others, without training.

    Parameters
    ----------
    blocks : int
        Blocks that a tile selects, beside those that are always kept.
    block, sinks, near, dense_tiles, share
        As in every method that chooses blocks (`BlockMethod`).

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, `scale` and `softcap`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.BlockTopK(blocks=3, block=64)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.6
    (torch.Size([1, 2, 1024, 32]), True)
    """

    blocks: int = 16
    block: int = field(default=64, kw_only=True)

    paper = "arXiv 2502.13189"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, 1, "blocks")

    def estimate(self, q: Tensor, k: Tensor, grid: Grid, told: dict[str, Any]) -> Tensor:
        """Estimate mass by mean queries and mean keys."""
        return tile_mass(q, k, grid, "mean", **told)

    def choose(self, mass: Tensor, reach: Tensor, near: Tensor) -> Tensor:
        """Keep the best blocks of each tile, beside the sink and nearest blocks."""
        return top_k(mass, self.blocks, among=reach & ~near)
