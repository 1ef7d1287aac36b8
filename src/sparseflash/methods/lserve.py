"""LServe: streaming heads beside heads that read pages, chosen by the bounds of their parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..cache import PageBounds, Summary
from ..errors import require
from .base import check_counts
from .reading import ReadingMethod


@dataclass(frozen=True)
class LServe(ReadingMethod):
    """Some KV heads see first and near pages alone; the others read the pages whose parts score best.

    Large pages are read faster than small ones, but their bounds say little. So each is scored by the bounds
    of its parts: the best part speaks for the page. Which heads stream is found by training a gate for each
    (DuoAttention); a number stands for the first heads, which is a guess.

    Paper: Yang et al., "LServe", arXiv 2502.14866, sections 3.3 and 3.4: physical pages of 64, logical of 16.

    Parameters
    ----------
    streaming : tuple of int
        KV heads that stream.
    part : int
        Keys of a part of a page, which divides it.
    local : int
        Near pages of heads that stream, `sinks` being their first.
    budget, page, sinks, near, share
        As in every method that reads pages (`ReadingMethod`).

    Notes
    -----
    Of `ctx`: `q_offset` and `cache`, as `Quest`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 2, 2048, 64)
    >>> method = sf.methods.LServe(streaming=(1,), budget=512)
    >>> method(q, k, v, q_offset=2047).shape
    torch.Size([1, 4, 1, 64])
    """

    streaming: tuple[int, ...] = ()
    part: int = 16
    local: int = 4
    page: int = field(default=64, kw_only=True)
    sinks: int = field(default=1, kw_only=True)
    budget: int = field(default=4096, kw_only=True)

    paper = "arXiv 2502.14866"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, 1, "part", "local")
        require(
            (self.page % self.part == 0, lambda: f"part={self.part}: expected a divisor of page={self.page}"),
            (
                bool(self.share) or not self.streaming,
                "streaming names KV heads: share='sum' or 'max'",
            ),
        )

    def summary(self, k: Tensor) -> Summary:
        """Bounds of each channel in each part."""
        return PageBounds(self.part)

    def closed(self, heads: int) -> tuple[tuple[int, int], ...]:
        """Heads that stream."""
        require(
            (
                max(self.streaming, default=0) < heads,
                lambda: f"streaming={self.streaming}: k has {heads} heads, 0..{heads - 1}",
            )
        )
        return tuple((head, self.local) for head in self.streaming)
