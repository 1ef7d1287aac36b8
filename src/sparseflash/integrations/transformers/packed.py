"""Methods on packed rows: each document by itself, documents of like lengths in one call."""

from __future__ import annotations

import torch
from torch import Tensor


class Documents:
    """The documents of packed rows as batches, and the way back.

    A method sees each document as a sequence of its own, padded on the right. Lengths of one batch are within
    a factor of two: the tail of a shorter document is zeros, which causality hides from its tokens.

    Parameters
    ----------
    starts : Tensor
        Integers `[B,S]`: where in its row the document of each token begins.
    """

    def __init__(self, starts: Tensor) -> None:
        self.shape = starts.shape
        total = starts.numel()
        at = torch.arange(self.shape[1], device=starts.device)
        first = (starts == at).flatten().nonzero()[:, 0]
        length = torch.diff(first, append=first.new_tensor([total]))
        size = length.double().log2().ceil()
        self.parts = []
        for one in size.unique():
            a, n = (x[size == one] for x in (first, length))
            lane = torch.arange(int(n.max()), device=starts.device)
            self.parts.append(torch.where(lane < n[:, None], a[:, None] + lane, total))
        order = torch.cat([part.flatten() for part in self.parts])
        self.place = order.new_empty(total + 1)
        self.place[order] = torch.arange(len(order), device=starts.device)

    def split(self, x: Tensor) -> list[Tensor]:
        """`[B,H,S,D]` as `[documents,H,length,D]`, a batch for each range of lengths."""
        rows = x.transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        return [
            rows.index_select(0, part.flatten()).unflatten(0, part.shape).transpose(1, 2)
            for part in self.parts
        ]

    def join(self, batches: list[Tensor]) -> Tensor:
        """What `split` took apart, `[B,H,S,D]`."""
        rows = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in batches])
        return rows.index_select(0, self.place[:-1]).unflatten(0, self.shape).transpose(1, 2)
