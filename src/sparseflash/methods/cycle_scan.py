"""Cycle scan: a causal window over a cyclic sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..plan import Plan
from .base import Context, Method, Selection, check_counts, check_square


@dataclass(frozen=True)
class CycleScan(Method):
    """Each token sees the `window` tokens up to itself in a cyclic sequence.

    The first tokens of the raster see the last ones: a causal scan of an image without a beginning. The plan
    is two windows; in the second one, queries are a whole turn (T positions) later.

    Paper: Huang et al., "HRSAM: Efficient Interactive Segmentation in High-Resolution Images", arXiv
    2407.02109 (its cycle-scan, there a state space model over the repeated raster; here attention).

    Parameters
    ----------
    window : int
        Visible keys, the query's own included, >= 1; at most all tokens.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> x = torch.randn(1, 1, 4, 32)
    >>> around = sf.methods.CycleScan(window=2)
    >>> [p.to_dense()[0, 0].int().tolist() for p in around.select(x, x).plan][1]
    [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """

    window: int = 512

    paper = "arXiv 2407.02109"
    phases = ("training", "prefill", "diffusion")
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "window")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Two disjoint plans for all heads: keys of this turn, and of the end of the turn before."""
        T = check_square(self, q, k)
        window = (max(min(self.window, T) - 1, 0), 0)
        turns = (Plan.dense(T, T, window=window, q_offset=n * T, device=q.device) for n in (0, 1))
        return Selection(tuple(turns))
