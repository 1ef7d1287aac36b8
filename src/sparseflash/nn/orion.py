"""Orion-MSP for tables: row features at several scales, and a memory that only training rows write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..common.errors import SparseFlashError, require
from ..methods.orion_msp import OrionMSP
from ..ops.attention import attention
from ..plan import Plan
from ..plan.options import is_count
from .self_attention import SelfAttention


class _Block(nn.Module):
    """Pre-norm residual attention and MLP; `attend` and MLP start with zero output weights."""

    def __init__(self, width: int, heads: int, attend: nn.Module) -> None:
        super().__init__()
        self.attend, self.norms = attend, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        last = nn.Linear(2 * width, width)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), last)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = x + self.attend(self.norms[0](x), *others)
        found: Tensor = x + self.mlp(self.norms[1](x))
        return found


class MultiScaleRows(nn.Module):
    """Encode the features of each table row as one vector: special tokens attend over them at several scales.

    At scale g, neighbouring features are averaged in groups of g; CLS and GLOBAL tokens precede the groups,
    and all tokens attend by `methods.OrionMSP`. The CLS tokens are averaged over the scales.

    Papers: "Orion-MSP: Multi-Scale Sparse Attention for Tabular In-Context Learning", arXiv 2511.02818,
    section 3.2.

    Parameters
    ----------
    width, heads : int
        Width of a cell's embedding, and number of heads.
    scales : tuple of int
        Features per group; each scale has its own stack of blocks.
    cls, global_ : int
        Numbers of CLS and of GLOBAL tokens.
    blocks : int
        Number of blocks per scale.
    window, random, windowless, seed
        Options of `OrionMSP`.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> rows = sf.nn.MultiScaleRows(32, 2, scales=(1, 4), cls=2)
    >>> rows(torch.randn(3, 20, 10, 32)).shape  # 3 tables, 20 rows, 10 features
    torch.Size([3, 20, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        scales: tuple[int, ...] = (1, 4, 16),
        cls: int = 4,
        global_: int = 4,
        blocks: int = 2,
        window: int = 8,
        random: int = 2,
        windowless: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = isinstance(scales, tuple) and scales and all(is_count(x, 1) for x in scales)
        require(
            (bool(sizes), lambda: f"scales={scales!r}: expected a tuple of ints >= 1"),
            (is_count(cls, 1), lambda: f"cls={cls!r}: expected a positive int"),
            (is_count(global_), lambda: f"global_={global_!r}: expected an int >= 0"),
        )
        method = OrionMSP(cls + global_, window, random, windowless, seed)
        self.scales, self.cls = scales, cls
        self.special = nn.Parameter(0.02 * torch.randn(cls + global_, width))
        self.stacks = nn.ModuleList(
            nn.Sequential(
                *(
                    _Block(width, heads, SelfAttention(width, heads, method=method, base=1e5))
                    for _ in range(blocks)
                )
            )
            for _ in scales
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, cells: Tensor) -> Tensor:
        """Map `cells [B, rows, features, width]` to `[B, rows, cls * width]`."""
        if not isinstance(cells, Tensor) or cells.dim() != 4:
            given = list(cells.shape) if isinstance(cells, Tensor) else type(cells).__name__
            raise SparseFlashError(f"cells: {given}; expected [B, rows, features, width]")
        found = []
        for g, stack in zip(self.scales, self.stacks):
            groups = grouped(cells.flatten(0, 1), g)
            x = torch.cat([self.special.expand(len(groups), -1, -1), groups], 1)
            found.append(stack(x)[:, : self.cls])
        out: Tensor = self.norm(torch.stack(found).mean(0))
        return out.reshape(*cells.shape[:2], -1)


def grouped(x: Tensor, size: int) -> Tensor:
    """Average each `size` neighbours of `x [B, features, width]`; the last group may have fewer."""
    n = x.shape[1]
    padded = nn.functional.pad(x, (0, 0, 0, -n % size))
    sums = padded.reshape(len(x), -(-n // size), size, x.shape[-1]).sum(2)
    count = (n - torch.arange(sums.shape[1], device=x.device) * size).clamp(max=size)
    return sums / count[:, None]


class _Cross(nn.Module):
    """Cross-attention: queries from x, keys and values from other tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        require((width % heads == 0, lambda: f"width={width} is no multiple of heads={heads}"))
        self.heads = heads
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.both = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), *self.both(others).chunk(2, -1))
        )
        out = attention(q, k, v, Plan.dense(q.shape[2], k.shape[2], device=x.device))
        found: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return found


class PerceiverMemory(nn.Module):
    """Latents that attend to a table's training rows and are attended to by all rows: test rows never write.

    Papers: those of `MultiScaleRows`, section 3.3.

    Parameters
    ----------
    width, heads : int
        Width of a row's vector, and number of heads.
    latents : int
        Number of latents.
    blocks : int
        Number of write blocks, and number of read blocks.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> memory = sf.nn.PerceiverMemory(64, 2, latents=8)
    >>> memory(torch.randn(3, 20, 64), train=15).shape
    torch.Size([3, 20, 64])
    """

    def __init__(self, width: int, heads: int, *, latents: int = 32, blocks: int = 2) -> None:
        super().__init__()
        require((is_count(latents, 1), lambda: f"latents={latents!r}: expected a positive int"))
        self.latents = nn.Parameter(0.02 * torch.randn(latents, width))
        self.write, self.read = (
            nn.ModuleList(_Block(width, heads, _Cross(width, heads)) for _ in range(blocks)) for _ in range(2)
        )

    def forward(self, rows: Tensor, *, train: int) -> Tensor:
        """Map `rows [B, T, width]` to the same shape; only the first `train` rows write to the memory."""
        fits = isinstance(rows, Tensor) and rows.dim() == 3 and is_count(train) and train <= rows.shape[1]
        require((fits, lambda: f"train={train!r}: expected a number of the rows [B, T, width]"))
        memory = self.latents.expand(len(rows), -1, -1)
        for block in self.write:
            memory = block(memory, rows[:, :train])
        for block in self.read:
            rows = block(rows, memory)
        return rows
