"""Efficient-vDiT: frames see themselves and a few reference frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.errors import require
from ..plan import Plan
from .base import Context, Selection, check_counts
from .denoising import GridMethod, crossed


@dataclass(frozen=True)
class EfficientVDiT(GridMethod):
    """Tokens of a frame see their own frame and k reference frames: linear in the number of frames.

    Reference frames are evenly spaced from the first to the last. Blocks are whole frames, whatever their
    size, so no token of another frame is visible. `sparse_vdit.smallest` searches for the smallest sufficient
    k of a layer. The paper fine-tunes the model afterwards, and most of its published speed-up comes from
    fewer steps, not from the mask.

    Papers: Ding et al., "Efficient-vDiT: Efficient Video Diffusion Transformers with Attention Tile",
    arXiv 2502.06155, section 3.

    Parameters
    ----------
    references : int
        Number k of reference frames, visible to all frames; k >= frames is dense.
    both : bool
        Whether reference frames see all frames, too.
    grid, text
        As in every method on a grid: (frames, ...) in tokens, and tokens of text (before, behind).

    Notes
    -----
    `ctx` keys: `grid` and `text`, which replace those of the method.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 8 * 12, 32)
    >>> method = sf.methods.EfficientVDiT(references=2, grid=(8, 3, 4))
    >>> method.select(q, k).plan.density == (2 * 7 + 8) / 8**2
    True
    """

    references: int = 2
    both: bool = False

    paper = "arXiv 2502.06155"
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "references")
        require((isinstance(self.both, bool), lambda: f"both={self.both!r}: expected True or False"))
        super().__post_init__()

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads, with a block for each pair of frames."""
        layout, T = self.layout(q, k, ctx), q.shape[2]
        frames, size = layout.grid[0], math.prod(layout.grid[1:])
        order = layout.order(q.device, tile=(1, *layout.grid[1:]))
        seen = self.tiles(frames, q.device)
        ends = [-(-n // size) for n in (layout.before, layout.behind)]
        words = layout.text(size, q.device, order)
        keep = pad(seen, (*ends, *ends))[None, None] | crossed(words, words)
        return Selection(
            Plan.from_blocks(keep, Tq=T, Tk=T, tile=size, unit=size, q_order=order, k_order=order)
        )

    def tiles(self, frames: int, device: torch.device) -> Tensor:
        """Frames that each frame sees, bool [frames, frames]."""
        frame = torch.arange(frames, device=device)
        chosen = torch.tensor(spread(self.references, frames), dtype=frame.dtype, device=device)
        global_ = torch.isin(frame, chosen)
        seen = torch.eye(frames, dtype=torch.bool, device=device) | global_
        return seen | global_[:, None] if self.both else seen


def spread(k: int, frames: int) -> list[int]:
    """Pick k evenly spaced frames from the first to the last."""
    k = min(k, frames)
    return [0] * (k > 0) if k < 2 else [round(n * (frames - 1) / (k - 1)) for n in range(k)]
