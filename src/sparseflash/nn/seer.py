"""SeerAttention's gate: which blocks attention will look at, learned from where it looked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SparseFlashError
from ..methods.gates import Blocks
from ..selection.grid import Grid
from .base import check_sizes, draw

EARLY = 4
"""Tiles of the first such part of a sequence teach nothing: they see a few blocks, which all have much."""


class SeerGate(nn.Module):
    """The weight of each block of keys for each tile of queries, from pooled queries and keys alone.

    A tile is its mean query; a block is its largest, smallest and mean key, through a matrix of each query
    head. Both are taken before their rotation and turned to the first place of their block. The gate learns
    from a target, the model from nothing: `loss` is what to minimise, with
    `attention(..., return_block_max=(block, block))` for the target.

    Papers: Gao et al., "SeerAttention", arXiv 2410.13276, sections 3 and 4.

    Parameters
    ----------
    heads, head_dim : int
        Query heads, and their size; heads of keys may be fewer.
    block : int
        Queries of a tile, and keys of a block.
    generator : torch.Generator, optional
        Draws the weights.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 512, 32)
    >>> _, peaks = sf.attention(q, k, v, causal=True, return_block_max=(64, 64))
    >>> gate = sf.nn.SeerGate(2, 32)
    >>> loss = gate.loss(gate.blocks(q, k), peaks)
    >>> loss.backward()
    >>> gate(q, k).shape, gate.weight.grad.shape
    (torch.Size([1, 2, 8, 8]), torch.Size([2, 96, 32]))
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        block: int = 64,
        device: Any = None,
        dtype: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, heads=heads, head_dim=head_dim, block=block)
        self.block = block
        self.weight = nn.Parameter(torch.empty(heads, 3 * head_dim, head_dim, device=device, dtype=dtype))
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: normal, 1 / sqrt(inputs) wide."""
        draw(self.weight, self.weight.shape[1] ** -0.5, generator)

    def grid(self, q: Tensor, k: Tensor, q_offset: int | Tensor = 0) -> Grid:
        """Tiles and blocks of a call."""
        return Grid(q.shape[2], k.shape[2], self.block, self.block, q_offset, device=q.device)

    def blocks(self, q: Tensor, k: Tensor, *, rope: Any = None, q_offset: int | Tensor = 0) -> Blocks:
        """What the gate looks at: a hundredth of q and k, which training can keep in their place.

        Parameters
        ----------
        q, k : Tensor
            `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`.
        rope : (Tensor, Tensor) or Tensor, optional
            How q and k, which come rotated, were: (cos, sin), `[B|1, n, D]` each, of positions 0 up to the
            last key's, or the inverse frequencies `[D / 2]`. None: they were not.
        q_offset : int or Tensor
            Position of the first query.
        """
        return Blocks.of(q, k, self.grid(q, k, q_offset), rope)

    def forward(self, q: Tensor, k: Tensor, *, rope: Any = None, q_offset: int | Tensor = 0) -> Tensor:
        """Log-weights of the blocks, `[B,Hq,R,C]`: a softmax over those in reach, -inf elsewhere."""
        return self._log_weights(
            self.blocks(q, k, rope=rope, q_offset=q_offset), self.grid(q, k, q_offset).reach()
        )

    def loss(self, blocks: Blocks, target: Tensor) -> Tensor:
        """Kullback-Leibler divergence from a target to the gate, mean over heads and later tiles.

        Parameters
        ----------
        blocks : Blocks
            Of whole sequences (`q_offset` 0).
        target : Tensor
            `[B,Hq,R,C]`, at least 0: what blocks should weigh; rows are scaled to 1 here. The paper takes the
            largest weight of attention in each block (section 4.2), from tiles behind a quarter of the text.
        """
        R, C = blocks.q.shape[2], blocks.k.shape[2]
        if target.shape != (*blocks.q.shape[:2], R, C):
            raise SparseFlashError(
                f"target: {list(target.shape)}; expected {[*blocks.q.shape[:2], R, C]}, a number for each "
                f"tile and block of {self.block}"
            )
        reach = Grid(R, C, 1, 1, device=target.device).reach()
        found = self._log_weights(blocks, reach)[:, :, R // EARLY :]
        wanted = target.detach()[:, :, R // EARLY :].masked_fill(~reach[:, :, R // EARLY :], 0)
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
        apart = torch.special.xlogy(wanted, wanted) - wanted * found.masked_fill(wanted == 0, 0)
        mean: Tensor = apart.sum(-1).mean()
        return mean

    def _log_weights(self, blocks: Blocks, reach: Tensor) -> Tensor:
        logits = blocks.logits(self.weight).masked_fill(~reach.to(blocks.q.device), -torch.inf)
        return torch.log_softmax(logits, -1)

    def extra_repr(self) -> str:
        """The shape, in a line."""
        heads, _, head_dim = self.weight.shape
        return f"{heads}, {head_dim}, block={self.block}"
