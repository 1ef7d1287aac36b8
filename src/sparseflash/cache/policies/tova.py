"""TOVA: keep the keys that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Keeps the keys that the last query attends to most, the same in all heads of a layer.

    Paper: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104, section 3.2.

    Parameters
    ----------
    budget, sinks, recent
        As in `Policy`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.TOVA(budget=64))
    >>> out = cache.attend(torch.randn(1, 8, 500, 32), *torch.randn(2, 1, 2, 500, 32))
    >>> cache.tokens, cache.held.tolist()
    (500, [[64, 64]])
    """

    recent: int = 1

    paper = "arXiv 2401.06104"

    @property
    def queries(self) -> int:
        """Only the last query."""
        return 1

    def score(self, held: Held) -> Tensor:
        """Attention of the last query, mean over all heads."""
        return held.window(1)[:, :, 0].mean(1, keepdim=True).expand(held.position.shape)
