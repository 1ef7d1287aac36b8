"""PyramidKV: SnapKV with larger budgets in lower layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...common.errors import require
from .base import Policy
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Budgets fall linearly from the first to the last layer; their mean is `budget`.

    Paper: Cai et al., "PyramidKV", arXiv 2406.02069, section 4.1: an arithmetic sequence whose last member is
    the mean budget over `steep`.

    Parameters
    ----------
    steep : float
        Ratio of the mean budget to the last layer's, at least 1.
    budget
        Mean number of keys per head, over layers.
    recent, kernel, sinks
        As in `SnapKV`.

    Examples
    --------
    >>> import sparseflash as sf
    >>> policy = sf.cache.PyramidKV(budget=1024, steep=8)
    >>> [policy.of_layer(n, 4).budget for n in range(4)]
    [1920, 1322, 725, 128]
    """

    steep: float = 20.0

    paper = "arXiv 2406.02069"

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.steep >= 1, f"steep={self.steep!r}: expected a number >= 1"))

    def of_layer(self, layer: int, layers: int) -> Policy:
        """The policy with the budget of that layer."""
        last = self.budget / self.steep
        own = last + 2 * (self.budget - last) * (layers - 1 - layer) / max(layers - 1, 1)
        if layers < 2:
            return self
        whole = isinstance(self.budget, int)
        own = max(int(own), self.sinks + self.recent) if whole else min(own, 1.0)
        return dataclasses.replace(self, budget=own)
