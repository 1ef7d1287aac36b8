"""Threshold: the number of kept keys follows from the attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import require
from .base import Held
from .snapkv import SnapKV


@dataclass(frozen=True)
class Threshold(SnapKV):
    """Each head keeps the fewest keys that receive a given share of the last queries' attention.

    A head with focused attention keeps few keys, one with diffuse attention nearly all: no number is fixed in
    advance, and each head's memory is as large as what it keeps.

    Paper: Lin et al., "Twilight", arXiv 2502.02770, section 4, for the share in place of a number; the paper
    chooses which keys are read, this policy which are kept, by the scores of SnapKV.

    Parameters
    ----------
    share : float
        Share of the last queries' attention, smoothed over neighbours; in (0, 1].
    budget
        Maximum number of keys per head, or share of the tokens.
    recent, kernel, sinks
        As in `SnapKV`; sinks and recent tokens are always kept.

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
        """Fewest best keys of each head that hold the share, at most its budget."""
        order = score.argsort(dim=-1, descending=True, stable=True)
        mass = self.score(held).float().masked_fill(held.position < 0, 0).gather(-1, order)
        better = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True).clamp(min=1e-30)
        wanted = (better < self.share).sum(-1).maximum((score == torch.inf).sum(-1))
        return wanted.minimum(torch.as_tensor(super().counts(score, held), device=score.device))
