"""SnapKV: keep the keys that the prompt's last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...common.errors import require
from ...plan.options import is_count
from .base import Held, Policy, pooled


@dataclass(frozen=True)
class SnapKV(Policy):
    """Keeps the keys that the last queries attend to most, and the last tokens themselves.

    A prompt's last tokens show what will be asked for. Their attention is summed over the window and the
    heads of a group, and smoothed over neighbours, so that passages are kept instead of single keys. Each
    later eviction uses the last queries at that time.

    Paper: Li et al., "SnapKV", arXiv 2404.14469, section 4: a window of 32 queries, smoothing by pooling.

    Parameters
    ----------
    recent : int
        Number of last queries that score the keys; their own keys are always kept.
    kernel : int
        Width of the window over which scores are averaged.
    budget, sinks
        As in `Policy`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.SnapKV(budget=64, recent=16))
    >>> out = cache.attend(torch.randn(1, 8, 500, 32), *torch.randn(2, 1, 2, 500, 32))
    >>> cache.tokens, cache.held.tolist()
    (500, [[64, 64]])
    """

    recent: int = 32
    kernel: int = 5

    paper = "arXiv 2404.14469"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.recent >= 1, f"recent={self.recent!r}: expected a positive int, queries"),
            (is_count(self.kernel, 1), f"kernel={self.kernel!r}: expected a positive int, keys"),
        )

    @property
    def queries(self) -> int:
        """The last `recent` queries."""
        return self.recent

    def score(self, held: Held) -> Tensor:
        """Attention of the last queries, mean over queries and the heads of a group, smoothed."""
        seen = held.window(self.recent).mean(2)
        B, Hkv, n = held.position.shape
        return pooled(seen.view(B, Hkv, -1, n).mean(2), self.kernel)
