"""MoBA: each query sees its own block, and the earlier blocks whose mean key suits it best."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..cache import PageMean, Summary
from .base import Share
from .reading import ReadingMethod


@dataclass(frozen=True)
class MoBA(ReadingMethod):
    """A mixture of block attention: a query is routed to blocks by the mean of their keys.

    The block of the query counts as one, and is causal inside; others are whole blocks before it. The choice
    has no gradient and no weights: a model that trains with it learns keys whose means say what is in there.

    Paper: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189, section 2.2.

    Parameters
    ----------
    budget, page, sinks, near, share
        As in every method that reads pages (`ReadingMethod`); the paper's pages are 512 keys, its budgets
        three of them and up, and each query head chooses for itself.

    Notes
    -----
    Of `ctx`: `q_offset`, the position of the first query, and `cache`, the layer's `cache.Growing`, which
    keeps the means while keys are appended.

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
        """Means."""
        return PageMean(self.page)
