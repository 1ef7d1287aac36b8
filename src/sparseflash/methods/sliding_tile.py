"""Sliding tile attention: windows over a video that move by whole tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import require
from ..plan import Plan
from ..plan.options import is_count
from .base import Context, Selection
from .denoising import GridMethod, crossed


@dataclass(frozen=True)
class SlidingTile(GridMethod):
    """Tokens of a 3-D tile see the tiles around it: the window moves by tiles, so no tile is partial.

    Tokens are sorted by tile, and each tile is a block of queries and of keys. At the border the window is
    moved inwards, so that every tile sees the same number of tiles.

    Papers: Zhang et al., "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507, section 3.2.

    Parameters
    ----------
    tile : tuple of int
        Sizes of a tile in tokens, outermost axis first.
    window : tuple of int
        Sizes of the window in tiles; odd sizes are symmetric.
    grid, text
        As in every method on a grid: sizes in tokens, and tokens of text (before, behind).

    Notes
    -----
    `ctx` keys: `grid` and `text`, which replace those of the method. Tiles cut by the border are shorter.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 6 * 8 * 8 + 10, 32)
    >>> method = sf.methods.SlidingTile(tile=(2, 4, 4), window=(1, 3, 1))
    >>> method(q, k, v, ctx={"grid": (6, 8, 8), "text": 10}).shape
    torch.Size([1, 2, 394, 32])
    """

    tile: tuple[int, ...] = (6, 8, 8)
    window: tuple[int, ...] = (3, 3, 3)

    paper = "arXiv 2502.04507"
    by_shape = True

    def __post_init__(self) -> None:
        for name in ("tile", "window"):
            sizes = getattr(self, name)
            fits = isinstance(sizes, tuple) and sizes and all(is_count(x, 1) for x in sizes)
            require((bool(fits), lambda: f"{name}={sizes!r}: expected a tuple of ints >= 1, one an axis"))
        require(
            (
                len(self.tile) == len(self.window),
                lambda: f"tile={self.tile!r}, window={self.window!r}: as many",
            )
        )
        super().__post_init__()

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads."""
        layout, size = self.layout(q, k, ctx, len(self.tile)), math.prod(self.tile)
        order, T = layout.order(q.device, tile=self.tile), q.shape[2]
        seen = torch.ones(1, 1, dtype=torch.bool, device=q.device)
        for length, own, reach in zip(layout.grid, self.tile, self.window):
            n = -(-length // own)
            at = torch.arange(n, device=q.device)
            low = (at - reach // 2).clamp(min=0, max=max(n - reach, 0))[:, None]
            near = (at >= low) & (at < low + reach)
            seen = (seen[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
        ends = [-(-n // size) for n in (layout.before, layout.behind)]
        words = layout.text(size, q.device, order)
        padded = torch.nn.functional.pad(seen, (*ends, *ends))[None, None]
        keep = padded | crossed(words, words)
        return Selection(
            Plan.from_blocks(keep, Tq=T, Tk=T, tile=size, unit=size, q_order=order, k_order=order)
        )
