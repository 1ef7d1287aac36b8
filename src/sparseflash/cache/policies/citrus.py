"""CItruS: what a question looks at, while the text is read in chunks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class Citrus(Policy):
    """The keys stay that a question attends to, the same ones in all heads of a layer, and the newest chunk.

    A text is read chunk by chunk. Before each, the question is put to what is held, without being kept; its
    attention decides what stays when the chunk is there. Without a question the chunk's own does, which keeps
    what the text needs to go on, and not what will be asked.

    Paper: Bai et al., "CItruS: Chunked Instruction-aware State Eviction", arXiv 2406.12018, section 3 (one
    cache for text and question); by the mean over heads.

    Parameters
    ----------
    budget, sinks, recent, renumber
        As of every policy; `recent` is the length of a chunk.

    Notes
    -----
    `sparseflash.transformers.read` reads a text so. By itself: `cache.asking = True` around `attend` of the
    question's tokens.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.Citrus(budget=192, recent=128))
    >>> for chunk in torch.randn(3, 10, 1, 4, 128, 32).unbind(1):
    ...     out = cache.attend(*chunk)
    >>> cache.tokens, cache.held.tolist()
    (1280, [[192, 192, 192, 192]])
    """

    recent: int = 256

    paper = "arXiv 2406.12018"
    massed = "last"

    def score(self, held: Held) -> Tensor:
        """What the question gave each key, mean over heads."""
        assert held.mass is not None
        return held.mass.mean(1, keepdim=True).expand(held.position.shape)
