"""StreamingLLM: keep the first and the last tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps the first tokens (attention sinks) and the last ones, exactly `budget` keys.

    By default keys keep their original rotation, so attention is a window with sinks; the paper counts
    positions within the cache instead (`renumber=True`), so a model runs beyond its training length.

    Paper: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.

    Parameters
    ----------
    budget, sinks, recent
        As in `Policy`.

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
        """The position: newest keys score highest."""
        return held.position

    def seen(self, used: Tensor, most: int | Tensor) -> list[tuple[Tensor, Tensor]]:
        """Hide held keys that the next eviction will drop."""
        first = used.clamp(max=self.sinks)
        return [(torch.zeros_like(used), first), (torch.maximum(first, used - most + self.sinks), used)]
