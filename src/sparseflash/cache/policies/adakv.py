"""Ada-KV: one budget for all heads of a layer, spent on the heads that need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import require
from .base import Held
from .snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Keep the best keys of all heads of a layer together, by SnapKV scores: focused heads keep fewer keys.

    Each head keeps at least a share of the budget. Memory is that of the kept keys: each head's slice has its
    own size.

    Paper: Feng et al., "Ada-KV", arXiv 2407.11550, algorithm 1, with a safeguard of a fifth.

    Parameters
    ----------
    safe : float
        Share of the budget that each head keeps at least.
    budget
        Mean number of keys per head over a layer.
    recent, kernel, sinks
        As in `SnapKV`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.AdaKV(budget=64, recent=8))
    >>> out = cache.attend(torch.randn(1, 8, 500, 32), *torch.randn(2, 1, 2, 500, 32))
    >>> int(cache.held.sum()), int(cache.held.min()) >= 12
    (128, True)
    """

    safe: float = 0.2

    paper = "arXiv 2407.11550"

    def __post_init__(self) -> None:
        super().__post_init__()
        require((0 <= self.safe <= 1, f"safe={self.safe!r}: expected a share in [0, 1]"))

    def counts(self, score: Tensor, held: Held) -> Tensor:
        """How many of the layer's best keys belong to each head."""
        B, H, n = score.shape
        most = torch.as_tensor(self.most(held.own, held.prompt, H), device=score.device).expand(B, 1)
        least = (self.safe * most.double()).long().clamp(min=self.sinks + self.recent).minimum(most)
        rank = _ranks(score)
        own = score.masked_fill((rank < least[..., None]) & (score > -torch.inf), torch.inf).flatten(1)
        kept = (_ranks(own) < most * H) & (own > -torch.inf)
        return kept.view(B, H, n).sum(-1)


def _ranks(score: Tensor) -> Tensor:
    """Rank of each score in its row, 0 the best."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
