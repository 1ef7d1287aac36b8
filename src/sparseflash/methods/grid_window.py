"""Windows of an image or a video (Swin)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import require
from ..plan import Plan
from ..plan.options import is_count
from .base import Context, Method, Selection, check_square
from .denoising import ends_of, located


@dataclass(frozen=True)
class GridWindow(Method):
    """Tokens of a grid attend inside their window: 2-D for images, 3-D for video, plain or shifted.

    Tokens are sorted by window, so that each window is a contiguous range. A shift moves the cuts, so that
    alternating layers (`for_layer`) connect neighbouring windows; windows at the border are then smaller, and
    do not wrap around.

    Papers: Liu et al., "Swin Transformer", arXiv 2103.14030, section 3.2; Huang et al., "HRSAM", arXiv
    2407.02109 (plain and shifted windows, the border cut by padding; its pad tokens do not exist here).

    Parameters
    ----------
    window : tuple of int
        Sizes of a window, outermost axis first: (rows, columns), or (frames, rows, columns).
    grid : tuple of int
        Sizes of the grid; tokens are in raster order. The first may be -1: it follows from their number.
    shift : tuple of int, optional
        Tokens by which the cuts move along each axis; none by default.
    causal : bool
        Hide keys later in the raster.
    text : (int, int)
        Numbers of tokens before and after the grid (a class token, registers, text). They see, and are seen
        by, everything.

    Notes
    -----
    `ctx` keys: `grid` and `text`, which replace those of the method.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> x = torch.randn(1, 1, 16, 32)
    >>> method = sf.methods.GridWindow(window=(2, 2), grid=(4, 4))
    >>> method.select(x, x).plan.to_dense()[0, 0, 0].nonzero().flatten().tolist()
    [0, 1, 4, 5]
    >>> method.for_layer(1).select(x, x).plan.to_dense()[0, 0, 5].nonzero().flatten().tolist()
    [5, 6, 9, 10]
    """

    window: tuple[int, ...] = (16, 16)
    grid: tuple[int, ...] = (-1, 64)
    shift: tuple[int, ...] | None = None
    causal: bool = False
    text: tuple[int, int] = (0, 0)

    reads = ("grid", "text")
    by_shape = True
    paper = "arXiv 2103.14030"
    phases = ("training", "prefill", "diffusion")

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("shift", 0)):
            sizes = getattr(self, name)
            if sizes is not None:
                fits = isinstance(sizes, tuple) and sizes and all(is_count(x, least) for x in sizes)
                require(
                    (
                        bool(fits),
                        lambda: f"{name}={sizes!r}: expected a tuple of ints >= {least}, one an axis",
                    )
                )
        self._check_grid(self.grid)
        ends_of(self.text)
        require(
            (
                self.shift is None or len(self.shift) == len(self.window),
                lambda: (
                    f"shift={self.shift!r}: expected {len(self.window)} numbers, as "
                    f"window={self.window!r} has"
                ),
            )
        )

    def _check_grid(self, grid: tuple[int, ...]) -> None:
        fits = isinstance(grid, (tuple, list)) and len(grid) == len(self.window)
        fits = fits and all(is_count(x, 1) for x in grid[1:]) and (grid[0] == -1 or is_count(grid[0], 0))
        require(
            (
                bool(fits),
                lambda: (
                    f"grid={grid!r}: expected {len(self.window)} sizes, as window={self.window!r} has; "
                    "only the first may be -1"
                ),
            )
        )

    def for_layer(self, layer: int) -> GridWindow:
        """Return the method for a layer of a stack: shifted by half a window if its number is odd."""
        return replace(self, shift=tuple(w // 2 for w in self.window) if layer % 2 else None)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads, with a bucket for each window; tokens beside the grid add two plans."""
        ctx = ctx or {}
        grid, text = ctx.get("grid", self.grid), ends_of(ctx.get("text", self.text))
        self._check_grid(grid)
        sizes, T, *ends = located(check_square(self, q, k), tuple(grid), text)
        label = torch.zeros(T, dtype=torch.int64, device=q.device)
        place, below, windows = torch.arange(T, device=q.device), T, 1
        for axis, (size, w) in enumerate(zip(sizes, self.window, strict=True)):
            below = math.prod(sizes[axis + 1 :])
            skip = -(self.shift[axis] if self.shift else 0) % w  # missing cells of the first window
            at = (place.div(below, rounding_mode="floor") + skip).div(w, rounding_mode="floor")
            n = max(-(-(size + skip) // w), 1)
            label, place, windows = label * n + at, place % below, windows * n
        tile, beside = 64 if math.prod(self.window) <= 64 else 128, any(ends)
        if beside:  # bucket 0; a bucket behind all others would be a number that depends on the length
            label, windows = F.pad(label + 1, ends), windows + 1
        bucket = label.view(1, 1, -1)
        inside = Plan.from_buckets(bucket, bucket, causal=self.causal, tile=tile, buckets=windows)
        if not beside:
            return Selection(inside)
        words, image = bucket == 0, bucket > 0
        across = (Plan.from_keep(a, b, causal=self.causal) for a, b in ((image, words), (words, image)))
        return Selection((inside, *across))
