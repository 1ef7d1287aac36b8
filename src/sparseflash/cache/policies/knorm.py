"""Key norms: small keys stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class KNorm(Policy):
    """The keys of the smallest norms stay: no attention is looked at.

    Paper: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv
    2406.11430.

    Parameters
    ----------
    budget, sinks, recent
        As of every policy.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.KNorm(budget=64))
    >>> out = cache.attend(torch.randn(1, 8, 500, 32), *torch.randn(2, 1, 2, 500, 32))
    >>> cache.tokens, cache.held.tolist()
    (500, [[64, 64]])
    """

    recent: int = 1

    paper = "arXiv 2406.11430"

    def score(self, held: Held) -> Tensor:
        """The norm, below 0."""
        size: Tensor = held.k.float().norm(dim=-1)
        return -size
