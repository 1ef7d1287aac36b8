"""CItruS: keep the keys that a question attends to, while a text is read in chunks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Held, Policy


@dataclass(frozen=True)
class Citrus(Policy):
    """Keeps the keys that a question attends to, the same in all heads of a layer, and the newest chunk.

    A text is read chunk by chunk. Before each chunk, the question attends to the held keys without being
    appended; its attention decides what is kept once the chunk is appended. Without a question, the chunk's
    own attention decides, which keeps what continues the text rather than what will be asked.

    Paper: Bai et al., "CItruS: Chunked Instruction-aware State Eviction", arXiv 2406.12018, section 3 (one
    cache for text and question); scores are means over heads.

    Parameters
    ----------
    budget, sinks, recent, renumber
        As in `Policy`; `recent` is the length of a chunk.

    Notes
    -----
    `sparseflash.transformers.read` reads a text this way. By hand: set `cache.asking = True` around `attend`
    of the question's tokens.

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
        """Attention mass of the question on each key, mean over heads."""
        assert held.mass is not None
        return held.mass.mean(1, keepdim=True).expand(held.position.shape)
