"""First keys and a window for each head, of lengths that grow with the prompt, each in its own way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import SparseFlashError, require
from ..plan import Plan
from .base import Context, Method, Selection, check_counts


@dataclass(frozen=True)
class MoA(Method):
    """A head sees `alpha + beta * N` keys of N: the first ones, and those up to the query's own.

    Heads that look at their neighbours get short spans, heads that look far get long ones, and what is right
    for 4k tokens stays right for 8k. Which head is which is found once, from how much the loss moves when its
    pairs go: `sparseflash calibrate moa`, whose profile `Profiled` runs.

    Papers: Fu et al., "MoA: Mixture of Sparse Attention", arXiv 2406.14909, sections 3 and 4.

    Parameters
    ----------
    alpha : int
        Keys whatever the length; may be negative.
    beta : float
        Share of all keys, in [0, 1].
    sinks : int
        First keys, counted in the span.
    least : int
        The shortest span.
    block : int
        Spans are rounded up to a multiple of it.

    Notes
    -----
    Of `ctx`: `q_offset`, the position of the first query. N is the number of keys that there are.

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
        """Keys that a query sees of n, at most."""
        wanted = max(self.least, self.alpha + self.beta * n)
        return min(n, int(-(-wanted // self.block)) * self.block)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """The first keys, and the window that is left of the span."""
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
