"""Double Sparsity: select single keys by a few of their channels."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..cache import Labels, Summary
from ..common.errors import SparseFlashError, require
from .reading import ReadingMethod


@dataclass(frozen=True)
class DoubleSparsity(ReadingMethod):
    """Each query reads the keys that score best by a few channels, which are calibrated on other text.

    A few channels of keys are large in any text. The cache keeps these channels of all keys contiguously (a
    label per key, 1/16 to 1/4 of its numbers); a query scores the labels and reads the best keys whole.

    Paper: Yang et al., "Post-Training Sparse Attention with Double Sparsity", arXiv 2408.07092, section 3.

    Parameters
    ----------
    channels : tuple of tuple of int
        The channels of each KV head: `heavy_channels` finds them. They index keys as attention sees them
        (after rotary embedding).
    budget, sinks, near, share
        As in every method that reads pages (`ReadingMethod`); a page is one key.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, and `cache`, the layer's `cache.Growing`, which
    extends the labels as keys are appended.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 2, 2048, 64)
    >>> channels = sf.methods.heavy_channels(torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64), 16)
    >>> method = sf.methods.DoubleSparsity(channels=channels, budget=128)
    >>> method(q, k, v, q_offset=2047).shape
    torch.Size([1, 4, 1, 64])
    """

    channels: tuple[tuple[int, ...], ...] = ()
    page: int = field(default=1, kw_only=True)

    paper = "arXiv 2408.07092"

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.page == 1, lambda: f"page={self.page}: labels are of single keys, expected 1"))
        if self.channels:
            Labels(channels=self.channels)

    def summary(self, k: Tensor) -> Summary:
        """Summarise keys by their labels."""
        if not self.channels:
            raise SparseFlashError(
                "DoubleSparsity has no channels: find them on some text with heavy_channels(q, k, 16)"
            )
        return Labels(channels=self.channels)


def heavy_channels(q: Tensor, k: Tensor, n: int) -> tuple[tuple[int, ...], ...]:
    """Find the n channels of each KV head with the largest mean |q| |k|, for `DoubleSparsity`.

    Parameters
    ----------
    q, k : Tensor
        `[B,Hq,T,D]` and `[B,Hkv,T,D]` of some text, as attention sees them.
    n : int
        Channels of a label.

    Source: arXiv 2408.07092, section 3.1, by products of the means, summed over the query heads of a group.
    """
    require(
        (isinstance(n, int) and 0 < n <= q.shape[3], lambda: f"n={n!r}: expected 1..{q.shape[3]} channels")
    )
    size = q.abs().float().mean((0, 2)).view(k.shape[1], -1, q.shape[3]).sum(1)
    best = (size * k.abs().float().mean((0, 2))).topk(n).indices.sort(-1).values
    return tuple(tuple(own) for own in best.tolist())
