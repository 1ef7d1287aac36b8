"""`Thinned`: a cache of the tokens of a prompt that a model read, where others were left out."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..plan.options import shape_of
from .base import queries
from .files import kind
from .growing import Growing


@kind
class Thinned(Growing):
    """A `Growing` cache that begins with some tokens of a prompt, and counts positions as if it held all.

    Keys have the rotation of their places in the whole prompt, and the next token's position is behind it, so
    a host decodes as usual. `tokens` and `plan` are of the keys that are held.

    Parameters
    ----------
    read : Tensor
        Integers `[B,K]`, ascending: places of the tokens that will be appended first.
    length : int
        Number of tokens of the whole prompt.
    room : int
        Minimum spare capacity, in tokens.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Thinned(torch.tensor([[0, 1, 7, 8, 9]]), length=10)
    >>> cache.append(*torch.randn(2, 1, 2, 5, 64))
    >>> cache.tokens, cache.get_seq_length()
    (5, 10)
    """

    def __init__(self, read: Tensor, length: int, room: int = 256) -> None:
        K = read.shape[-1] if isinstance(read, Tensor) else 0
        require(
            (
                isinstance(read, Tensor) and read.dim() == 2 and not read.is_floating_point(),
                lambda: f"read: {shape_of(read)}; expected integers [B,K], the places that are held",
            ),
            (length >= K, lambda: f"length={length}, of which {K} tokens are held: expected as many or more"),
        )
        self.read, self.length = read, length
        super().__init__(room)

    @property
    def gone(self) -> int:
        """Number of tokens that were left out."""
        return self.length - self.read.shape[1]

    def get_seq_length(self) -> int:
        """Position of the next token; 0 while the cache is empty."""
        return self.tokens + self.gone if self.tokens else 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Number of keys that the next call attends to, and the position that the first stands for."""
        return self.tokens + queries(query_length), self.gone if self.tokens else 0

    def crop(self, n: int) -> None:
        """Drop tokens at the end: keep those before position n, or, if n < 0, drop the last -n.

        Raises
        ------
        SparseFlashError
            If n lies inside the prompt.
        """
        left = n if n > 0 else self.get_seq_length() + n
        if self.tokens and left < self.length:
            raise SparseFlashError(
                f"crop to {left} tokens of a prompt of {self.length}, some of which were left out: expected "
                "at least the prompt; read it again"
            )
        super().crop(left - self.gone if self.tokens else n)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        super().select_rows(rows)
        self.read = self.read.index_select(0, rows.to(self.read.device))

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The contents for a file: tensors and options."""
        tensors, options = super().saved()
        return tensors | {"read": self.read}, options | {"length": self.length}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """Rebuild a layer from the contents of a file."""
        made = cls(tensors.get("read", torch.zeros(1, 0, dtype=torch.int64)), **options)
        made.keys, made.values, made.first = (tensors.get(name) for name in ("keys", "values", "first"))
        return made
