"""Gather rows of a tile from user tensors, and scatter them back."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Rows of [B,H,T,D] tensors gathered and scattered by token number; -1 reads and writes nothing."""

    def __init__(self, token: Tensor, heads: int):
        batch, own = token.shape[:2]
        self.token = token
        self.batch = torch.arange(batch, device=token.device)[:, None, None]
        self.head = (torch.arange(own, device=token.device) * heads // own)[None, :, None]
        self.real = token >= 0

    def _slot(self, x: Tensor) -> Tensor:
        return self.batch if x.shape[0] > 1 else torch.zeros_like(self.batch)  # a pool serves all sequences

    def read(self, x: Tensor, dtype: torch.dtype, alive: Tensor | None = None) -> Tensor:
        """Read rows of x in `dtype`; zeros for empty lanes, and for rows that are not `alive`."""
        if not x.shape[2]:  # no tokens: all lanes are empty
            return x.new_zeros((*self.token.shape, *x.shape[3:]), dtype=dtype)
        rows = x[self._slot(x), self.head, self.token.clamp(min=0)].to(dtype)
        alive = self.real if alive is None else alive
        return torch.where(alive[..., None] if rows.dim() == 4 else alive, rows, 0)

    def write(self, into: Tensor, rows: Tensor) -> None:
        """Write rows to the places of their tokens."""
        at = self.real.nonzero(as_tuple=True)
        into[at[0], at[1], self.token[at]] = rows[at].to(into.dtype)

    def add(self, into: Tensor, rows: Tensor) -> None:
        """Add rows to the rows of their tokens."""
        T = into.shape[2]
        flat = (self._slot(into) * into.shape[1] + self.head) * T + self.token
        real = self.real
        into.view(-1, *into.shape[3:]).index_add_(0, flat[real], rows[real])
