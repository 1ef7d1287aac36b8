"""Blocks of context that see themselves and the first tokens; what is asked sees everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SparseFlashError
from ..plan import Plan
from ..plan.make.rows import begins_of, edge_rows, tile_ends
from ..plan.options import TILE, host
from .base import Context, Method, Selection, begin, check_counts


@dataclass(frozen=True)
class StarAttention(Method):
    """A token of the context sees its own block so far, and the anchor; the last queries see everything.

    Blocks of the context need nothing of one another but the first tokens, so ranks that hold some each
    exchange only these (`sf.distributed`, group-cast). What is asked, and what is generated, sees the whole
    context: by one merge over ranks (`sf.distributed.decode`). A fact that takes a look from one block into
    another to understand is not found.

    The paper's ranks each recompute the anchor in front of their block. Its hidden states are those of the
    first block, which sees itself alone; so in one pass over all tokens it is these keys, once.

    Papers: Acharya, Jia and Ginsburg, "Star Attention", arXiv 2411.17116, phases 1 and 2.

    Parameters
    ----------
    block : int
        Tokens of a block of the context.
    anchor : int
        First tokens that all blocks see, at most `block`; None: a whole block. Much smaller ones cost
        accuracy.
    last : int
        Queries at the end (what is asked) that see everything before them.

    Notes
    -----
    Of `ctx`: `q_offset`, the position of the first query. Ranges alone, whatever the block.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 5, 32)
    >>> method = sf.methods.StarAttention(block=2, anchor=1, last=1)
    >>> method.select(q, k).plan.to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]
    """

    block: int = 16384
    anchor: int | None = None
    last: int = 64

    reads = ("q_offset",)
    paper = "arXiv 2411.17116"
    phases = ("prefill",)
    causal_selection = False
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "block")
        check_counts(self, 0, "last")
        if self.anchor is not None:
            check_counts(self, 0, "anchor")
            if self.anchor > self.block:
                raise SparseFlashError(
                    f"anchor={self.anchor} of blocks of {self.block}: the anchor is the beginning of the "
                    "first block, so expected at most that"
                )

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """One plan for all heads, in tiles that end where a block does."""
        Tq, Tk = q.shape[2], k.shape[2]
        position = begin(ctx, q) + torch.arange(Tq, device=q.device)
        token = torch.arange(Tq, device=q.device).expand(position.shape)
        asked = token >= Tq - self.last
        number = position.div(self.block, rounding_mode="floor").masked_fill(asked, Tk + 1)
        row = edge_rows(begins_of(number), TILE)
        used = Tq + (Tq // self.block + 3) * (TILE - 1)  # each block, and what is asked, begins a tile
        if host(row):
            used = int(row.max()) + 1 if row.numel() else 0
        rows = -(-used // TILE) * TILE
        order = torch.full((*position.shape[:2], rows), -1, dtype=torch.int32, device=q.device)
        order.scatter_(-1, row, token.int())
        first, last, live = tile_ends(order, TILE)
        at, asked = (x.gather(-1, first) if Tq else first for x in (position, asked))
        start = at.div(self.block, rounding_mode="floor") * self.block
        start = torch.where(asked.bool(), 0, start).clamp(min=0)
        anchor = start.clamp(max=self.block if self.anchor is None else self.anchor)
        edges = (torch.zeros_like(start), anchor, start, at + 1, at + 1, at + 1 + last - first)
        spans = torch.stack([x.clamp(0, Tk) for x in edges], -1).unflatten(-1, (3, 2))
        spans = torch.where(live[..., None, None], spans, 0)
        offset = (ctx or {}).get("q_offset", 0)
        return Selection(Plan.from_spans(spans, Tq=Tq, Tk=Tk, causal=True, q_offset=offset, q_order=order))
