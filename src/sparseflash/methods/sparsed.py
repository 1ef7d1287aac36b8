"""SparseD: blocks of each head are found once, and reused at later denoising steps of a language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..plan.options import is_count
from ..selection.budgets import top_k
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from .base import Context, check_counts, check_shares
from .denoising import Pattern, StepMethod


@dataclass(frozen=True)
class SparseD(StepMethod):
    """Masked-diffusion models: the first steps are dense, the later ones reuse the blocks that were best.

    The last dense step computes exactly how each tile of queries distributes its mass over blocks of keys.
    Blocks of the prompt and of the generated part are selected separately, so that every query keeps some of
    the generated part. The selection is fixed, because attention changes little from step to step.

    Queries may be the last tokens alone: a canvas that is written behind a prompt whose keys are cached.

    Papers: Wang et al., "SparseD: Sparse Attention for Diffusion Language Models", arXiv 2509.24014.

    Parameters
    ----------
    select_share : float
        Share of blocks to keep, of the prompt and of the generated part, in (0, 1].
    skip : float
        Share of steps that are dense, in [0, 1); `int(skip * steps) + 2` steps are.
    block : int
        Queries of a tile, and keys of a block.
    scaling : "head_dim" or "heads"
        Scale of the scores for block selection: that of the attention, or 1 / sqrt(heads), as in the released
        code.

    Notes
    -----
    `ctx` keys: `step` and `steps`, `state` (kept by a `Session`), `generated`, the number of tokens at the
    end that are being generated (all queries by default), `scale` and `softcap`. Without a step, each call
    finds its own pattern. Prompt blocks are the best among all blocks, as in the paper, so fewer may remain.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> session = sf.methods.Session(sf.methods.SparseD(select_share=0.25, block=32))
    >>> q, k, v = torch.randn(3, 1, 2, 256, 32)
    >>> for step in range(10):
    ...     out = session(q, k, v, layer=0, ctx={"step": step, "steps": 10})
    >>> session.select(q, k, {"layer": 0, "step": 9, "steps": 10}).plan.density
    0.375
    """

    select_share: float = 0.3
    skip: float = 0.2
    block: int = 128
    scaling: str = "head_dim"

    reads = (*StepMethod.reads, "generated")
    paper = "arXiv 2509.24014"

    def __post_init__(self) -> None:
        check_shares(self, "select_share")
        check_counts(self, 1, "block")
        skips = isinstance(self.skip, (int, float)) and not isinstance(self.skip, bool) and 0 <= self.skip < 1
        require(
            (skips, lambda: f"skip={self.skip!r}: expected a share in [0, 1)"),
            (
                self.scaling in ("head_dim", "heads"),
                lambda: f"scaling={self.scaling!r}: expected head_dim or heads",
            ),
        )

    def first(self, steps: int | None) -> int:
        """Step `int(steps * skip) + 1`."""
        if steps is None:
            raise SparseFlashError(
                'ctx has "step" and no "steps", the number of all steps, of which some are dense'
            )
        return int(steps * self.skip) + 1

    def lengths(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """Numbers of queries and keys; queries are the last tokens."""
        Tq, Tk = q.shape[2], k.shape[2]
        require(
            (Tq <= Tk, lambda: f"SparseD: {Tq} queries and {Tk} keys; expected no more queries than keys")
        )
        return Tq, Tk

    def pattern(self, q: Tensor, k: Tensor, lse: Tensor | None, ctx: Context) -> Pattern:
        """Keep the best blocks of the prompt, and the best of the generated part."""
        (Tq, T), size = self.lengths(q, k), self.block
        generated = ctx.get("generated", Tq)
        require(
            (
                is_count(generated) and generated <= T,
                lambda: f"generated={generated!r}: expected 0 ... {T} tokens",
            )
        )
        told = {name: ctx.get(name) for name in ("scale", "softcap")}
        if self.scaling == "heads":
            told["scale"], lse = q.shape[1] ** -0.5, None
        grid = Grid(Tq, T, size, size, causal=False, device=q.device)
        edge = max(0, min(-(-(T - generated) // size), grid.units - 1))
        late = k[:, :, edge * size :]
        written = Grid(Tq, late.shape[2], size, size, causal=False, device=q.device)
        mass = tile_mass(q, late, written, "exact", lse=None if edge else lse, **told)
        keep = top_k(mass, self._budget(written.units))
        if edge:
            mass = tile_mass(q, k, grid, "exact", lse=lse, **told)
            keep = torch.cat([top_k(mass, self._budget(grid.units))[..., :edge], keep], -1)
        return Pattern(grid.plan(keep))

    def _budget(self, blocks: int) -> int:
        return min(int(blocks * self.select_share) + 1, max(blocks, 1))
