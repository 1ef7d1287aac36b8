"""FlashPrefill: blocks by the energy of their mean keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..selection.budgets import above
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import check_counts, check_shares
from .blocks import BlockMethod


@dataclass(frozen=True)
class FlashPrefill(BlockMethod):
    """Each tile of queries sees the blocks whose estimated mass is not far below that of its best block.

    Every query is multiplied with the mean of each `stride` keys, and the weights of a tile are relative to
    one maximum, so queries with large scores dominate. The threshold is relative to the best block, so no
    sorting is needed.

    Papers: Fan et al., "FlashPrefill: Instantaneous Pattern Discovery and Thresholding", arXiv 2603.06199.

    Parameters
    ----------
    alpha : float
        Least mass of a block, as a share of its tile's best block, in (0, 1].
    stride : int
        Keys that are averaged; divides the block.
    block, sinks, near, dense_tiles, share
        As in every method that chooses blocks (`BlockMethod`).

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, `scale` and `softcap`. The correction of the
    second version (arXiv 2608.19758), which replaces dropped blocks by their mean, is not implemented.

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
    sinks: int = field(default=2, kw_only=True)
    near: int = field(default=4, kw_only=True)
    dense_tiles: int = field(default=8, kw_only=True)

    paper = "arXiv 2603.06199"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "alpha")
        check_counts(self, 1, "stride")

    def estimate(self, q: Tensor, k: Tensor, grid: Grid, told: dict[str, Any]) -> Tensor:
        """Estimate mass by the energy of mean keys."""
        return tile_mass(q, k, grid, "energy", stride=self.stride, **told)

    def choose(self, mass: Tensor, reach: Tensor, near: Tensor) -> Tensor:
        """Keep the blocks of each tile above its threshold."""
        return above(mass, self.alpha, among=reach)
