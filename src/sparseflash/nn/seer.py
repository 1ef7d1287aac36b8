"""SeerAttention's gate: predicts the blocks that attention will weigh most, trained on its block maxima."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import SparseFlashError
from ..methods.gates import Blocks
from ..selection.grid import Grid
from .base import check_sizes, draw

EARLY = 4
"""The loss skips the first 1 / EARLY of the tiles: these reach few blocks, all of which weigh much."""


class SeerGate(nn.Module):
    """Predict the weight of each key block for each query tile, from pooled queries and keys alone.

    A tile is pooled to its mean query; a block to its largest, smallest and mean key, projected by a matrix
    per query head. Both are pooled before rotation, then rotated to the first position of their block. Only
    the gate learns, not the model: minimise `loss`, with `attention(..., return_block_max=(block, block))` as
    the target.

    Papers: Gao et al., "SeerAttention", arXiv 2410.13276, sections 3 and 4.

    Parameters
    ----------
    heads, head_dim : int
        Number of query heads, and their size; there may be fewer key heads.
    block : int
        Queries per tile, and keys per block.
    generator : torch.Generator, optional
        Generator that draws the weights.

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
        """Draw fresh weights: normal with std 1 / sqrt(inputs)."""
        draw(self.weight, self.weight.shape[1] ** -0.5, generator)

    def grid(self, q: Tensor, k: Tensor, q_offset: int | Tensor = 0) -> Grid:
        """Grid of tiles and blocks of a call."""
        return Grid(q.shape[2], k.shape[2], self.block, self.block, q_offset, device=q.device)

    def blocks(self, q: Tensor, k: Tensor, *, rope: Any = None, q_offset: int | Tensor = 0) -> Blocks:
        """Pool q and k to the gate's inputs, about 1 % of their size; training can store these instead.

        Parameters
        ----------
        q, k : Tensor
            `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`.
        rope : (Tensor, Tensor) or Tensor, optional
            The rotation that q and k already have: (cos, sin), `[B|1, n, D]` each, of positions 0 up to the
            last key's, or the inverse frequencies `[D / 2]`. None: they are not rotated.
        q_offset : int or Tensor
            Position of the first query.
        """
        return Blocks.of(q, k, self.grid(q, k, q_offset), rope)

    def forward(self, q: Tensor, k: Tensor, *, rope: Any = None, q_offset: int | Tensor = 0) -> Tensor:
        """Log-weights of the blocks, `[B,Hq,R,C]`: log-softmax over the blocks in reach, -inf elsewhere."""
        return self._log_weights(
            self.blocks(q, k, rope=rope, q_offset=q_offset), self.grid(q, k, q_offset).reach()
        )

    def loss(self, blocks: Blocks, target: Tensor) -> Tensor:
        """Kullback-Leibler divergence from a target to the gate, mean over heads and all but the first tiles.

        Parameters
        ----------
        blocks : Blocks
            Gate inputs of whole sequences (`q_offset` 0).
        target : Tensor
            `[B,Hq,R,C]`, non-negative target weights of the blocks; rows are normalised to 1 here. The paper
            takes the largest attention weight in each block (section 4.2), from the tiles behind the first
            quarter.
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
        """One-line description of the shape."""
        heads, _, head_dim = self.weight.shape
        return f"{heads}, {head_dim}, block={self.block}"
