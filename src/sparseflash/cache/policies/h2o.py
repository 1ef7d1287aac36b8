"""H2O: what was attended to most so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class H2O(Policy):
    """The keys that all queries so far gave most attention stay, and the last ones.

    Attention is summed over every query from the first token on: early keys have been seen by more queries,
    which favours them. The sums of a prompt take one pass more over it.

    Paper: Zhang et al., "H2O: Heavy-Hitter Oracle", arXiv 2306.14048, section 4: half of the budget recent.

    Parameters
    ----------
    budget, sinks, recent
        As of every policy.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.H2O(budget=64, recent=32))
    >>> out = cache.attend(torch.randn(1, 8, 500, 32), *torch.randn(2, 1, 2, 500, 32))
    >>> cache.tokens, cache.held.tolist()
    (500, [[64, 64]])
    """

    recent: int = 512

    paper = "arXiv 2306.14048"
    massed = "all"

    def score(self, held: Held) -> Tensor:
        """The sum so far."""
        assert held.mass is not None
        return held.mass
