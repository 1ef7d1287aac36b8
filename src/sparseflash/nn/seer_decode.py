"""SeerAttention-R's gate: predicts the pages that a single query will weigh most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import SparseFlashError
from ..methods.seer_decode import gate_pages, gate_queries, page_pools
from ..ops.rotary import rotation
from .base import check_sizes, draw


class SeerDecodeGate(nn.Module):
    """Predict the weight of each page of keys for single queries, one prediction for a group of query heads.

    Papers: Gao et al., "SeerAttention-R", arXiv 2506.08889, section 2.

    Parameters
    ----------
    heads, kv_heads, head_dim : int
        Number of query heads and of key heads, and their size.
    block : int
        Keys of a page.
    generator : torch.Generator, optional
        Generator that draws the weights.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k = torch.randn(1, 4, 512, 32), torch.randn(1, 2, 512, 32)
    >>> gate = sf.nn.SeerDecodeGate(4, 2, 32)
    >>> at = torch.tensor([[300, 511]])
    >>> gate(q[:, :, at[0]], k, at).shape
    torch.Size([1, 2, 2, 8])
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        block: int = 64,
        device: Any = None,
        dtype: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block=block)
        if heads % kv_heads:
            raise SparseFlashError(f"heads={heads}, kv_heads={kv_heads}: expected a multiple (GQA)")
        self.block, self.group = block, heads // kv_heads
        rows = (self.group + 3) * head_dim + 2
        self.weight = nn.Parameter(torch.empty(kv_heads, rows, head_dim, device=device, dtype=dtype))
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh projections, normal with std 1 / sqrt(inputs); both gains are 1."""
        D, parts = self.weight.shape[2], (self.group, 3)
        begin = 0
        for part in parts:
            draw(self.weight[:, begin : begin + part * D], (part * D) ** -0.5, generator)
            begin += part * D
        self.weight[:, begin:] = 1

    def forward(self, q: Tensor, k: Tensor, at: Tensor, *, rope: Any = None) -> Tensor:
        """Log-weights of the pages up to each query's own, `[B,Hkv,n,pages]`, -inf behind.

        Parameters
        ----------
        q, k : Tensor
            `[B,Hq,n,D]`, any queries, and all keys `[B,Hkv,T,D]`.
        at : Tensor
            Integers `[B|1,n]`: positions of the queries.
        rope : (Tensor, Tensor) or Tensor, optional
            The rotation that q and k already have, as in `nn.SeerGate`.
        """
        tables = None if rope is None else rotation(rope, k.shape[2])
        return self.of_pools(q, page_pools(k, self.block, tables), at, tables)

    def of_pools(self, q: Tensor, pools: Tensor, at: Tensor, tables: list[Tensor] | None) -> Tensor:
        """`forward` from the pools of the pages, which training keeps instead of keys."""
        mixed = gate_queries(q, at, self.weight, tables)
        pages = gate_pages(pools, self.block, self.weight, tables)
        logits = mixed @ pages.mT * q.shape[3] ** -0.5
        page = torch.arange(pages.shape[2], device=q.device)
        logits = logits.masked_fill(page > at[:, None, :, None] // self.block, -torch.inf)
        return torch.log_softmax(logits, -1)

    def loss(self, found: Tensor, target: Tensor) -> Tensor:
        """Kullback-Leibler divergence from a target to log-weights, `[B,Hkv,n,pages]` both, mean over rows.

        The target is the largest weight of dense attention in a page, over the heads of a group; rows are
        normalised to 1 here.
        """
        if target.shape != found.shape:
            raise SparseFlashError(f"target: {list(target.shape)}; expected {list(found.shape)}")
        wanted = target.detach()
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
        apart = torch.special.xlogy(wanted, wanted) - wanted * found.masked_fill(wanted == 0, 0)
        mean: Tensor = apart.sum(-1).mean()
        return mean

    def extra_repr(self) -> str:
        """One-line description of the shape."""
        heads, _, head_dim = self.weight.shape
        return f"{heads * self.group}, {heads}, {head_dim}, block={self.block}"
