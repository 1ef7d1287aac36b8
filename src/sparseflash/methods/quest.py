"""Quest: pages by the best product that their bounds allow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..cache import PageBounds, Summary
from .reading import ReadingMethod


@dataclass(frozen=True)
class Quest(ReadingMethod):
    """Each query reads the pages whose best key could match it best, by the bounds of their channels.

    A page keeps the smallest and the largest number of each channel. The sum over channels of the larger of
    q * smallest and q * largest is no less than the product with any key of the page, so that a page that
    holds a good key cannot score low; one that scores high may hold none. Nothing is ever forgotten.

    Paper: Tang et al., "Quest", arXiv 2406.10774, section 3.2 and figure 5: pages of 16, the newest always.

    Parameters
    ----------
    budget, page, sinks, near, share
        As in every method that reads pages (`ReadingMethod`).

    Notes
    -----
    Of `ctx`: `q_offset`, the position of the first query, and `cache`, the layer's `cache.Growing`, which
    keeps the bounds while keys are appended.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Growing()
    >>> cache.append(*torch.randn(2, 1, 2, 4096, 64))
    >>> q, ctx = torch.randn(1, 8, 1, 64), {"cache": cache, "q_offset": 4095}
    >>> plan = sf.methods.Quest(budget=256).select(q, cache.keys, ctx).plan
    >>> sf.decode(q, cache.keys, cache.values, plan).shape, round(plan.work, 4)
    (torch.Size([1, 8, 1, 64]), 0.0625)
    """

    paper = "arXiv 2406.10774"

    def summary(self, k: Tensor) -> Summary:
        """Bounds of each channel."""
        return PageBounds(self.page)
