"""Dilated sliding window."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..plan import Plan
from .base import Context, Method, Selection, check_counts, check_square


@dataclass(frozen=True)
class Dilated(Method):
    """Each query sees `window` keys at distances 0, d, 2 d, ...; in both directions if not causal.

    A window with gaps reaches further at the same cost. Tokens of equal remainder modulo d are packed like
    documents: in that order the window has no gaps, and a tile reads one range.

    Paper: Beltagy, Peters, Cohan, "Longformer", arXiv 2004.05150, section 3.1 (figure 2c).

    Parameters
    ----------
    window : int
        Visible keys on a side, the query's own included, >= 1.
    dilation : int
        Distance d from one visible key to the next, >= 1; 1 is `Window`.
    causal : bool
        Hide keys later than the query.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 5, 32)
    >>> sf.methods.Dilated(window=2, dilation=2).select(q, k).plan.to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
    """

    window: int = 128
    dilation: int = 4
    causal: bool = True

    paper = "arXiv 2004.05150"
    phases = ("training", "prefill")
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "window", "dilation")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads: a window over the tokens of each remainder."""
        T, reach, step = check_square(self, q, k), self.window - 1, self.dilation
        remainder = torch.arange(step, device=q.device)
        lengths = (T - remainder + (step - 1)).div(step, rounding_mode="floor")
        edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        ahead = 0 if self.causal else reach
        packed = Plan.from_documents(edges, Tq=T, Tk=T, causal=self.causal, window=(reach, ahead))
        token = torch.argsort(torch.arange(T, device=q.device) % step, stable=True).int().view(1, 1, -1)
        row = packed.q_order
        assert row is not None
        order = torch.nn.functional.pad(token, (0, 1), value=-1)[..., row.flatten()]  # row -1 is the pad
        return Selection(replace(packed, q_order=order, k_order=token, window=(reach * step, ahead * step)))
