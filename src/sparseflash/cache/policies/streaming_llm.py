"""StreamingLLM: the first tokens and the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first tokens stay, where attention goes that has nowhere to go, and the last; exactly so many.

    Keys keep the positions that they were rotated for, so that what is seen is a window with sinks; the paper
    counts positions within the cache instead, which lets a model run beyond the length it was trained for.

    Paper: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.

    Parameters
    ----------
    budget, sinks, recent
        As of every policy.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.StreamingLLM(budget=64))
    >>> out = cache.attend(*torch.randn(3, 1, 4, 500, 32))
    >>> cache.tokens, cache.held.tolist()
    (500, [[64, 64, 64, 64]])
    """

    sinks: int = 4

    paper = "arXiv 2309.17453"

    def score(self, held: Held) -> Tensor:
        """The later, the better."""
        return held.position

    def seen(self, used: Tensor, most: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        """What will be let go, but is held yet, is not seen."""
        first = used.clamp(max=self.sinks)
        return [(torch.zeros_like(used), first), (torch.maximum(first, used - most + self.sinks), used)]
