"""MoA: sinks and a window per head, with a span that grows linearly with the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..plan import Plan
from .base import Context, Method, Selection, check_counts


@dataclass(frozen=True)
class MoA(Method):
    """A head sees `alpha + beta * N` keys of N: the first ones, and those up to the query's own.

    Local heads get short spans, far-looking heads long ones, and the rule found at 4k tokens extrapolates to
    8k. `sparseflash calibrate moa` finds the spans once per model, from the change of the loss when pairs are
    removed; `Profiled` runs its profile.

    Papers: Fu et al., "MoA: Mixture of Sparse Attention", arXiv 2406.14909, sections 3 and 4.

    Parameters
    ----------
    alpha : int
        Constant part of the span in keys; may be negative.
    beta : float
        Share of all keys, in [0, 1].
    sinks : int
        First keys, counted in the span.
    least : int
        Shortest span.
    block : int
        Spans are rounded up to a multiple of it.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query. N is the number of keys, Tk.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.MoA(alpha=(0, 128), beta=(0.125, 0.5))  # by head
    >>> method(q, k, v).shape, sf.methods.MoA(beta=0.25).span(1024)
    (torch.Size([1, 2, 1024, 32]), 256)
    """

    alpha: int = 0
    beta: float = 0.5
    sinks: int = 64
    least: int = 128
    block: int = 64

    reads = ("q_offset",)
    paper = "arXiv 2406.14909"
    phases = ("prefill",)
    causal_selection = False
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 0, "sinks")
        check_counts(self, 1, "least", "block")
        whole = isinstance(self.alpha, int) and not isinstance(self.alpha, bool)
        share = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        require(
            (whole and abs(self.alpha) < 2**40, lambda: f"alpha={self.alpha!r}: expected an int"),
            (share and 0 <= self.beta <= 1, lambda: f"beta={self.beta!r}: expected a number in [0, 1]"),
            error=SparseFlashError,
        )

    def span(self, n: int) -> int:
        """Most keys of n that a query sees."""
        wanted = max(self.least, self.alpha + self.beta * n)
        return min(n, int(-(-wanted // self.block)) * self.block)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan: the first keys, and a window of the remaining span."""
        Tq, Tk = q.shape[2], k.shape[2]
        span = self.span(Tk)
        first = min(self.sinks, span - 1) if span else 0
        return Selection(
            Plan.dense(
                Tq,
                Tk,
                causal=True,
                window=(max(span - first, 1) - 1, 0),
                sink_tokens=first,
                q_offset=(ctx or {}).get("q_offset", 0),
                device=q.device,
            )
        )
