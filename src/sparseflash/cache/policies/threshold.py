"""Threshold: the text says how many keys stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import require
from .base import Held
from .snapkv import SnapKV


@dataclass(frozen=True)
class Threshold(SnapKV):
    """Each head keeps the fewest keys that hold a share of what the last queries attend to.

    A head that looks at few keys keeps few, one that looks everywhere keeps nearly all: no number is chosen
    beforehand, and each head's memory is as large as what it keeps.

    Paper: Lin et al., "Twilight", arXiv 2502.02770, section 4, for the share in place of a number; there it
    chooses what is read, here, by the scores of SnapKV, what stays.

    Parameters
    ----------
    share : float
        Of the attention of the last queries, smoothed over neighbours; in (0, 1].
    budget
        The most keys of a head: a number, or a share of the tokens.
    recent, kernel, sinks
        As of `SnapKV`; they stay in any case.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.Threshold(share=0.5, recent=8))
    >>> out = cache.attend(torch.randn(1, 8, 500, 32), *torch.randn(2, 1, 2, 500, 32))
    >>> bool((cache.held < 300).all())
    True
    """

    budget: int | float = 1.0
    share: float = 0.95

    paper = "arXiv 2502.02770"

    def __post_init__(self) -> None:
        super().__post_init__()
        require((0 < self.share <= 1, f"share={self.share!r}: expected a number in (0, 1]"))

    def counts(self, score: Tensor, held: Held) -> Tensor:
        """As many of the best of each head as hold the share, and no more than its budget."""
        order = score.argsort(dim=-1, descending=True, stable=True)
        mass = self.score(held).float().masked_fill(held.position < 0, 0).gather(-1, order)
        better = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True).clamp(min=1e-30)
        wanted = (better < self.share).sum(-1).maximum((score == torch.inf).sum(-1))
        return wanted.minimum(torch.as_tensor(super().counts(score, held), device=score.device))
