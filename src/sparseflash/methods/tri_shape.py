"""Tri-shape: first keys, a window, and last queries that see everything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..selection.grid import Grid
from .base import Context, Method, Selection, check_counts


@dataclass(frozen=True)
class TriShape(Method):
    """Queries see the first keys and nearby ones; the last queries see all. Independent of the content.

    Sizes in tokens are rounded up to whole blocks. A baseline for methods that depend on content.

    Papers: Li et al., "SCBench", arXiv 2412.10319, section 3 (tri-shape); without last queries, the a-shape
    of arXiv 2407.02490 and the sinks of Xiao et al., arXiv 2309.17453.

    Parameters
    ----------
    sinks, window : int
        Visible first keys, and keys up to the query's own.
    last : int
        Queries at the end that see everything before them.
    block : int
        Tokens of a block.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> sf.methods.TriShape(sinks=64, window=128, last=64)(q, k, v).shape
    torch.Size([1, 2, 1024, 32])
    """

    sinks: int = 128
    window: int = 1024
    last: int = 64
    block: int = 64

    reads = ("q_offset",)
    paper = "arXiv 2412.10319"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_counts(self, 1, "window", "block")
        check_counts(self, 0, "sinks", "last")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select the blocks within the three sizes."""
        grid = Grid(
            q.shape[2], k.shape[2], self.block, self.block, (ctx or {}).get("q_offset", 0), device=q.device
        )
        sinks, window, last = (-(-n // self.block) for n in (self.sinks, self.window, self.last))
        return Selection(grid.plan(grid.ended(grid.near(sinks, window), last)))
