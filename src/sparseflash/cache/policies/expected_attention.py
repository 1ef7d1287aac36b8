"""Expected attention: keep keys by the attention that future queries are expected to give them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...common.errors import require
from ...plan.options import is_count
from .base import Held, Policy


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Models future queries as normal, with the mean and covariance of the last queries.

    Then a key's expected unnormalised weight is exp(mean . k + k' cov k / 2); times the norm of its value, it
    is the key's expected contribution to the output.

    Paper: Devoto et al., "Expected Attention", arXiv 2510.00636, section 3, which rotates the queries to
    future positions; here they keep their last rotation.

    Parameters
    ----------
    last : int
        Number of last queries for mean and covariance.
    budget, sinks, recent
        As in `Policy`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.ExpectedAttention(budget=64))
    >>> out = cache.attend(torch.randn(1, 8, 500, 32), *torch.randn(2, 1, 2, 500, 32))
    >>> cache.tokens, cache.held.tolist()
    (500, [[64, 64]])
    """

    sinks: int = 4
    recent: int = 1
    last: int = 256

    paper = "arXiv 2510.00636"

    def __post_init__(self) -> None:
        super().__post_init__()
        require((is_count(self.last, 2), f"last={self.last!r}: expected an int >= 2, queries"))

    @property
    def queries(self) -> int:
        """The last queries, for mean and covariance."""
        return self.last

    def score(self, held: Held) -> Tensor:
        """Expected weight, softmax-normalised, mean over the heads of a group, times the value's norm."""
        B, Hkv, n, D = held.k.shape
        q = held.q.float() * held.scale
        mean = q.mean(2, keepdim=True)
        apart = q - mean
        cov = apart.mT @ apart / max(q.shape[2] - 1, 1)
        k = held.k.float()[:, :, None]
        mean, cov = (x.view(B, Hkv, -1, *x.shape[2:]) for x in (mean, cov))
        logit = (k * mean).sum(-1) + ((k @ cov) * k).sum(-1) / 2
        logit = logit.masked_fill(held.position[:, :, None] < 0, -float("inf"))
        size: Tensor = held.v.float().norm(dim=-1)
        return logit.softmax(-1).mean(2) * size
