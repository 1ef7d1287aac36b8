"""Key norms: keep the keys of smallest norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class KNorm(Policy):
    """Keeps the keys with the smallest norms, without looking at attention.

    Paper: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv
    2406.11430.

    Parameters
    ----------
    budget, sinks, recent
        As in `Policy`.

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
        """The negative norm."""
        size: Tensor = held.k.float().norm(dim=-1)
        return -size
