"""H2O: keep the keys with the largest attention mass so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class H2O(Policy):
    """Keeps the keys with the most attention from all queries so far, and the last tokens.

    Attention is summed over every query from the first token on: more queries have seen early keys, which
    favours them. The sums over a prompt need one more pass.

    Paper: Zhang et al., "H2O: Heavy-Hitter Oracle", arXiv 2306.14048, section 4: half of the budget recent.

    Parameters
    ----------
    budget, sinks, recent
        As in `Policy`.

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
        """The attention mass so far."""
        assert held.mass is not None
        return held.mass
