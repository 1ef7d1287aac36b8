"""BigBird: global, window and random blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..plan import Plan
from ..selection.orders import random_picks
from .base import Context, Method, Selection, check_counts, check_square


@dataclass(frozen=True)
class BigBird(Method):
    """Each block of queries sees the global blocks, its neighbours and some blocks drawn at random.

    The first blocks of the sequence are global: they see, and are seen by, everything. Any two tokens are
    then two hops apart, and random blocks add shortcuts between distant ones. The draw for a block depends on
    its number and the KV head, not on the length of the sequence.

    Papers: Zaheer et al., "Big Bird: Transformers for Longer Sequences", arXiv 2007.14062, section 2 (its
    internal construction); with blocks of one token, the feature attention of Orion-MSP, arXiv 2511.02818
    (`window_blocks=0` is what its released code computes, where the window has no effect).

    Parameters
    ----------
    block : int
        Tokens per block.
    global_blocks, window_blocks, random_blocks : int
        Global blocks at the start; neighbours on each side; blocks drawn for each block of queries (never
        global or neighbouring ones; fewer if not enough are left).
    causal : bool
        Hide keys later than the query; random blocks are then earlier ones.
    seed : int
        Seed of the random blocks, which also depend on the KV head and the block number, and nothing else.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 6, 32)
    >>> method = sf.methods.BigBird(block=1, global_blocks=1, window_blocks=1, random_blocks=1)
    >>> method.select(q, k).plan.to_dense()[0, 0].sum(-1).tolist()
    [6, 4, 5, 5, 5, 4]
    """

    block: int = 64
    global_blocks: int = 2
    window_blocks: int = 1
    random_blocks: int = 3
    causal: bool = False
    seed: int = 0

    paper = "arXiv 2007.14062"
    phases = ("training", "prefill")
    by_shape = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "block")
        check_counts(self, 0, "global_blocks", "window_blocks", "random_blocks")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Global and near blocks as ranges shared by all heads; random blocks as units of each KV head."""
        T, b, device = check_square(self, q, k), self.block, q.device
        blocks = -(-T // b)
        own = torch.arange(blocks, device=device)
        head = min(self.global_blocks, blocks)
        everything = own < head
        lo = (own - self.window_blocks).clamp(min=head)
        hi = (own + self.window_blocks + 1).clamp(max=blocks)
        zero, lo, hi = torch.zeros_like(own), torch.where(everything, 0, lo), torch.where(everything, 0, hi)
        first = torch.where(everything, blocks, head)
        spans = (torch.stack([zero, first, lo, hi], -1) * b).clamp(max=T).view(1, 1, -1, 2, 2)
        near = Plan.from_spans(spans, Tq=T, Tk=T, tile=b, unit=b, causal=self.causal)
        if not self.random_blocks or not blocks:
            return Selection(near)

        left = lo - head if self.causal else blocks - head - (hi - lo)  # blocks to draw from
        left = torch.where(everything, 0, left).expand(1, k.shape[1], -1)
        pick = random_picks(left, self.random_blocks, seed=self.seed) + head
        if not self.causal:
            pick = torch.where(pick >= lo[:, None], pick + (hi - lo)[:, None], pick)
        count = left.clamp(max=self.random_blocks).int()
        live = torch.arange(self.random_blocks, device=device) < count[..., None]
        cut = (
            (live & ((pick + 1) * b > T)).sum(-1).int()
        )  # a short last block is partial, and ascending draws put it last
        start = torch.arange(0, pick.numel(), self.random_blocks, device=device)
        return Selection(
            replace(
                near,
                start=start.view(count.shape),
                full=count - cut,
                count=count,
                index=torch.where(live, pick, 0).flatten().int(),
            )
        )
