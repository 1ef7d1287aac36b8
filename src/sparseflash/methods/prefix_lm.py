"""Prefix language model mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import PlanError, require
from ..plan import Plan
from ..plan.options import INTEGERS
from .base import Context, Method, Selection, begin, check_counts


@dataclass(frozen=True)
class PrefixLM(Method):
    """The first `prefix` tokens see one another, both ways; what follows is causal.

    For an input that is read as a whole before an output is written: a question, a source sentence, an image.
    The plan has one range a tile and no bits.

    Paper: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    arXiv 1910.10683, section 3.2.1.

    Parameters
    ----------
    prefix : int
        Tokens of the prefix, >= 0.

    Notes
    -----
    `ctx` keys: `prefix`, integers [B], the prefix of each sequence, which replaces the common one;
    `q_offset`, the position of the first query (int or int32 tensor, 0-d or [B]), 0 by default.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 4, 32)
    >>> sf.methods.PrefixLM(prefix=2).select(q, k).plan.to_dense()[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """

    prefix: int = 256

    reads = ("prefix", "q_offset")
    paper = "arXiv 1910.10683"
    phases = ("training", "prefill")

    def __post_init__(self) -> None:
        check_counts(self, 0, "prefix")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads; with a batch axis if sequences differ."""
        ctx, (B, _, Tq, _), Tk = ctx or {}, q.shape, k.shape[2]
        prefix = ctx.get("prefix", self.prefix)
        if isinstance(prefix, Tensor):
            fits = prefix.shape == (B,) and prefix.dtype in INTEGERS
            given = f"{list(prefix.shape)} {prefix.dtype}"
            require((fits, lambda: f"ctx['prefix']: {given}; expected integers [{B}]"), error=PlanError)
        elif isinstance(prefix, int):
            prefix = min(prefix, Tk)
        position = torch.arange(Tq, device=q.device) + begin(ctx, q)
        reach = torch.maximum(position + 1, torch.as_tensor(prefix, device=q.device).view(-1, 1, 1))
        return Selection(Plan.from_intervals(None, reach.clamp(0, Tk), Tk=Tk))
