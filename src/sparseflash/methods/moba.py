"""MoBA: each query sees its own block, and the earlier blocks with the best mean keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..cache import PageMean, Summary
from .base import Share
from .reading import ReadingMethod


@dataclass(frozen=True)
class MoBA(ReadingMethod):
    """Mixture of block attention: a query is routed to blocks by the mean of their keys.

    The query's own block counts towards the budget, and is causal inside; the others are whole earlier
    blocks. The selection has no gradient and no weights: a model trained with it learns keys whose means
    represent their block.

    Paper: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, section 2.2.

    Parameters
    ----------
    budget, page, sinks, near, share
        As in every method that reads pages (`ReadingMethod`); in the paper pages have 512 keys, budgets are
        three pages and up, and each query head selects for itself.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, and `cache`, the layer's `cache.Growing`, which
    updates the means as keys are appended.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.MoBA(budget=192, page=64)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.4
    (torch.Size([1, 2, 1024, 32]), True)
    """

    budget: int = 1536
    page: int = 512
    share: Share = ""

    phases = ("prefill", "decode")
    paper = "arXiv 2502.13189"

    def summary(self, k: Tensor) -> Summary:
        """Summarise pages by their mean keys."""
        return PageMean(self.page)
