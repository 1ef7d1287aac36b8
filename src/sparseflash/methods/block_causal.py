"""Block-causal attention: causal between blocks, bidirectional inside a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Plan
from .base import Context, Method, Selection, begin, check_counts


@dataclass(frozen=True)
class BlockCausal(Method):
    """Each query sees all of its own block and of the blocks before it.

    For block-wise generation: frames of a video, blocks of a diffusion language model. The plan has one range
    a tile and no bits, whatever the block size.

    Paper: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language
    Models", arXiv 2503.09573 (the context of a block).

    Parameters
    ----------
    block : int
        Tokens per block (such as a frame), >= 1; 1 is dense causal attention.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query (int or int32 tensor, 0-d or [B]); 0 by default.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 4, 32)
    >>> sf.methods.BlockCausal(block=2).select(q, k).plan.to_dense()[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    block: int = 256

    reads = ("q_offset",)
    paper = "arXiv 2503.09573"
    phases = ("training", "prefill", "diffusion")
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "block")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads."""
        Tq, Tk = q.shape[2], k.shape[2]
        number = (torch.arange(Tq, device=q.device) + begin(ctx, q)).div(self.block, rounding_mode="floor")
        return Selection(Plan.from_intervals(None, ((number + 1) * self.block).clamp(0, Tk), Tk=Tk))
