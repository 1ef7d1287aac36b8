"""PyramidKV: SnapKV with more keys in lower layers than in higher ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...errors import require
from .base import Policy
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Lower layers look at much, higher ones at little: budgets fall from layer to layer, their mean stays.

    Paper: Cai et al., "PyramidKV", arXiv 2406.02069, section 4.1: an arithmetic sequence whose last member is
    the mean budget over `steep`.

    Parameters
    ----------
    steep : float
        The mean budget over that of the last layer, at least 1.
    budget
        Mean over layers.
    recent, kernel, sinks
        As of `SnapKV`.

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
        """With the budget of that layer."""
        last = self.budget / self.steep
        own = last + 2 * (self.budget - last) * (layers - 1 - layer) / max(layers - 1, 1)
        if layers < 2:
            return self
        whole = isinstance(self.budget, int)
        own = max(int(own), self.sinks + self.recent) if whole else min(own, 1.0)
        return dataclasses.replace(self, budget=own)
