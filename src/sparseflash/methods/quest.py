"""Quest: select pages by the largest product that their channel bounds allow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..cache import PageBounds, Summary
from .reading import ReadingMethod


@dataclass(frozen=True)
class Quest(ReadingMethod):
    """Each query reads the pages with the largest upper bound on the product with any of their keys.

    A page stores the minimum and the maximum of each channel. Its score, the sum over channels of the larger
    of q * minimum and q * maximum, is an upper bound on the product with any key of the page: a page that
    holds a good key cannot score low, but one that scores high may hold none. No key is ever evicted.

    Paper: Tang et al., "Quest", arXiv 2406.10774, section 3.2 and figure 5: pages of 16, the newest always.

    Parameters
    ----------
    budget, page, sinks, near, share
        As in every method that reads pages (`ReadingMethod`).

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, and `cache`, the layer's `cache.Growing`, which
    updates the bounds as keys are appended.

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
        """Summarise pages by the bounds of each channel."""
        return PageBounds(self.page)
