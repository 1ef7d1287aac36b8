"""The best blocks by their mean keys: what everything dearer is compared with."""

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
    """Each tile of queries sees so many blocks of keys: those whose mean key suits its mean query best.

    Pooling costs next to nothing and works where neighbours are alike. It is blind to a single key that one
    query looks for. The block choice of MoBA (arXiv 2502.13189) and of many others, without training.

    Parameters
    ----------
    blocks : int
        Blocks of a tile that are chosen, beside those that are kept in any case.
    block, sinks, near, dense_tiles, share
        As in every method that chooses blocks (`BlockMethod`).

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
    block: int = field(default=64, kw_only=True)

    paper = "arXiv 2502.13189"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, 1, "blocks")

    def estimate(self, q: Tensor, k: Tensor, grid: Grid, told: dict[str, Any]) -> Tensor:
        """By mean queries and mean keys."""
        return tile_mass(q, k, grid, "mean", **told)

    def choose(self, mass: Tensor, reach: Tensor, near: Tensor) -> Tensor:
        """The best blocks of each tile, beside the first and the nearest."""
        return top_k(mass, self.blocks, among=reach & ~near)
