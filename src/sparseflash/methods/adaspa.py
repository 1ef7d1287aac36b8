"""AdaSpa: block masks from exact attention mass, searched at a few denoising steps, with adaptive density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import require
from ..plan.options import is_count
from ..selection.budgets import top_k
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import Context, check_counts, check_square
from .denoising import Pattern, StepMethod, crossed, ends_of, located


@dataclass(frozen=True)
class AdaSpa(StepMethod):
    """Video diffusion: each tile sees the blocks of the largest exact mass; heads that lose little see fewer.

    Dense steps come first. From the log-sum-exp of the last one, a second sweep over q and k computes the
    mass of every block. Later search steps repeat the sweep with the same log-sum-exp, which changes little.
    All tiles of a head keep the same number of blocks, so no query goes without; heads that keep more than
    `recall` of their mass give blocks to as many heads that keep least.

    Papers: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
    arXiv 2502.21079, algorithms 1 and 2 (whose tile sums must read exp(score - lse)).

    Parameters
    ----------
    sparsity : float
        Share of a tile's blocks that are dropped, in [0, 1).
    search : tuple of int
        Steps at which blocks are searched: the first one is the last dense step.
    recall : float
        A head that keeps more than this share of its mass may see fewer blocks.
    adaptive : bool
        Whether the number of blocks may differ between heads.
    block : int
        Queries of a tile, and keys of a block.

    Notes
    -----
    `ctx` keys: `step` (`steps` is not needed), `state` (kept by a `Session`), `text`, tokens after the video,
    or (before, after), whose rows and columns are fully visible and not counted; `scale` and `softcap`.
    Without a step, each call searches its own pattern. If sparsity is below 1/3 the three density levels are
    closer together, so that no sparsity is below 0.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 4, 640, 32)
    >>> method = sf.methods.AdaSpa(sparsity=0.8)
    >>> method.select(q, k).plan.density
    0.2
    """

    sparsity: float = 0.8
    search: tuple[int, ...] = (10, 30)
    recall: float = 0.8
    adaptive: bool = True
    block: int = 64

    reads = (*StepMethod.reads, "text")
    paper = "arXiv 2502.21079"

    def __post_init__(self) -> None:
        check_counts(self, 1, "block")
        for name, top in (("sparsity", 1), ("recall", 1)):
            x = getattr(self, name)
            fits = isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < top
            require((fits, lambda: f"{name}={x!r}: expected a share in [0, 1)"))
        steps = self.search if isinstance(self.search, tuple) else ()
        rising = steps and all(is_count(x) for x in steps) and all(a < b for a, b in zip(steps, steps[1:]))
        require(
            (bool(rising), lambda: f"search={self.search!r}: expected steps that rise, such as (10, 30)"),
            (isinstance(self.adaptive, bool), lambda: f"adaptive={self.adaptive!r}: expected True or False"),
        )

    def first(self, steps: int | None) -> int:
        """The first search step."""
        return self.search[0]

    def again(self, step: int) -> bool:
        """Whether the step is a search step."""
        return step in self.search

    def pattern(self, q: Tensor, k: Tensor, lse: Tensor | None, ctx: Context) -> Pattern:
        """Keep the blocks with the largest exact mass of every tile."""
        T, size = check_square(self, q, k), self.block
        words = located(T, (-1,), ends_of(ctx.get("text", 0))).text(size, q.device)
        grid = Grid(T, T, size, size, causal=False, device=q.device)
        told = {name: ctx.get(name) for name in ("scale", "softcap")}
        mass = tile_mass(q, k, grid, "exact", lse=lse, **told)
        text, video = crossed(words, words), ~words[..., None, :]
        count = self.levels(mass, video, text)
        return Pattern(grid.plan((top_k(mass, count, among=video) & ~text) | text), lse)

    def levels(self, mass: Tensor, video: Tensor, text: Tensor) -> Tensor:
        """Number of video blocks that each tile of a head keeps, int64 [B,H]."""
        (B, H), n = mass.shape[:2], video.sum()
        some = (n * (1 - self.sparsity)).round().long().clamp(min=1)
        keep = (top_k(mass, some.expand(1, H), among=video) & ~text) | text
        kept = torch.where(keep, mass, 0).sum((-1, -2)) / mass.sum((-1, -2)).clamp(min=1e-30)
        step = min((1 - self.sparsity) / 2, self.sparsity)
        few = (n * (1 - self.sparsity - step)).round().long().clamp(min=1)
        many = torch.minimum(2 * some - few, n)
        moved = (kept > self.recall).sum(-1, keepdim=True).clamp(max=H // 2) * self.adaptive
        place = kept.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return torch.where(place < moved, few, torch.where(place >= H - moved, many, some)).expand(B, H)
