"""Star Attention: context blocks see themselves and the first tokens; the question sees everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan
from ..plan.make.rows import begins_of, edge_rows, tile_ends
from ..plan.options import TILE, host
from .base import Context, Method, Selection, begin, check_counts


@dataclass(frozen=True)
class StarAttention(Method):
    """Tokens of the context see their own block up to themselves, and the anchor; last queries see all.

    Context blocks need only the first tokens of one another, so ranks that hold different blocks exchange
    only these (`sf.distributed`, group-cast). Question and generated tokens see the whole context, by one
    merge over ranks (`sf.distributed.decode`). Facts that need attention between context blocks are missed.

    In the paper each rank recomputes the anchor before its block. The anchor's hidden states are those of the
    first block, which sees only itself; so in one pass over all tokens its keys are computed once.

    Papers: Acharya, Jia and Ginsburg, "Star Attention", arXiv 2411.17116, phases 1 and 2.

    Parameters
    ----------
    block : int
        Tokens of a block of the context.
    anchor : int
        First tokens that all blocks see, at most `block`; None: a whole block. Much smaller anchors cost
        accuracy.
    last : int
        Queries at the end (the question) that see everything before them.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query. The plan has only ranges, whatever the block.

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
        """One plan for all heads, in tiles that end where a block does.

        Example, block 4, anchor 1, last 0: the tile of tokens 8..11 has anchor [0, 1), full keys [8, 9) (up
        to its first query) and partial keys [9, 12).
        """
        Tq, Tk = q.shape[2], k.shape[2]
        position = begin(ctx, q) + torch.arange(Tq, device=q.device)
        token = torch.arange(Tq, device=q.device).expand(position.shape)
        asked = token >= Tq - self.last
        number = position.div(self.block, rounding_mode="floor").masked_fill(asked, Tk)
        row = edge_rows(begins_of(number), TILE)
        used = Tq + (Tq // self.block + 3) * (TILE - 1)  # each block, and the question, begins a tile
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
