"""Strided blocks (LongGen): local blocks, and every n-th earlier block, with a phase per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import require
from ..plan import Plan
from .base import Context, Method, Selection, begin, check_counts


@dataclass(frozen=True)
class Strided(Method):
    """Each query sees the last `local` blocks of keys and every `stride`-th block before them.

    The KV head determines which earlier blocks are kept, so that the heads together reach every token (if
    there are at least `stride` KV heads). Blocks are counted from the start of the sequence, not from the
    query: once a block that a head does not keep has left its window, it is never needed again, and a cache
    may evict it. All lists of a head are prefixes of one list.

    Paper: Ge, Lin, Zhang, Han, Peng, "A Little Goes a Long Way: Efficient Long Context Training and Inference
    with Partial Contexts" (LongGen), arXiv 2410.01485.

    Parameters
    ----------
    block : int
        Tokens per block.
    local : int
        Blocks in the window, the query's own included, >= 1.
    stride : int
        Every `stride`-th block before the window is visible; 1 is dense.
    offset : int
        Shift of the kept blocks: head h keeps block J if `(J + h * step + offset) % stride == 0`, where
        `step = ceil(stride / KV heads)`.
    shared : bool
        Keep the same blocks in all heads.
    dense_heads : int
        Number of last KV heads that see everything.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query (int or int32 tensor, 0-d or [B]); 0 by default.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 6, 32)
    >>> plan = sf.methods.Strided(block=1, local=1, stride=2).select(q, k).plan
    >>> plan.to_dense()[0, :, 5].int().tolist()
    [[1, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1]]
    """

    block: int = 64
    local: int = 16
    stride: int = 16
    offset: int = 0
    shared: bool = False
    dense_heads: int = 0

    reads = ("q_offset",)
    paper = "arXiv 2410.01485"
    phases = ("training", "prefill", "decode")
    by_shape = True
    decodes = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "block", "local", "stride")
        check_counts(self, 0, "offset", "dense_heads")

    def residues(self, heads: int) -> list[int]:
        """Remainder modulo `stride` of the blocks that each KV head keeps."""
        step = 0 if self.shared else -(-self.stride // heads)
        return [-(h * step + self.offset) % self.stride for h in range(heads)]

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Two spans (window, own block) and a prefix of the head's strided units per tile and KV head.

        Example, block 1, local 1, stride 2, KV head 0 of 2, tile 5: own block [5, 6), empty window [5, 5),
        units 0, 2, 4 of the strip 0, 2, 4, ...
        """
        heads, device, b, v = k.shape[1], q.device, self.block, self.stride
        Tq, Tk = q.shape[2], k.shape[2]
        require((self.dense_heads <= heads, lambda: f"dense_heads={self.dense_heads}: k has {heads} heads"))
        q_offset = (ctx or {}).get("q_offset", 0)
        order, first = self._aligned(Tq, q_offset, begin(ctx, q))  # first: [B|1, 1, R], block of each tile
        lead = (first.shape[0], heads, first.shape[2])

        head = torch.arange(heads, device=device).view(1, -1, 1)
        window = torch.where(head < heads - self.dense_heads, first - (self.local - 1), 0).clamp(min=0)
        lo, own, end = ((x * b).clamp(max=Tk).expand(lead) for x in (window, first, first + 1))
        pair = torch.arange(0, 2 * own.numel(), 2, device=device).view(lead)  # full range, own block

        residue = torch.tensor(self.residues(heads), device=device)
        units = -(-Tk // b)
        strip = residue[:, None] + torch.arange(0, units, v, device=device)

        def before(last: Tensor) -> Tensor:
            """Count the blocks of the strip that are at most `last`."""
            n = (last - residue.view(1, -1, 1)).div(v, rounding_mode="floor") + 1
            return n.clamp(min=0).int().expand(lead).contiguous()

        return Selection(
            Plan(
                Tq,
                Tk,
                tile=b,
                unit=b,
                causal=True,
                q_offset=q_offset,
                q_order=order,
                span_start=pair,
                span_full=torch.ones_like(pair, dtype=torch.int32),
                span_count=torch.full_like(pair, 2, dtype=torch.int32),
                spans=torch.stack([lo, own, own, end], -1).view(-1, 2).int(),
                start=(head * strip.shape[1]).expand(lead).contiguous(),
                full=before((window - 1).clamp(max=Tk // b - 1)),
                count=before((window - 1).clamp(max=units - 1)),
                index=strip.clamp(max=units - 1).flatten().int(),
            )
        )

    def _aligned(self, Tq: int, q_offset: int | Tensor, at: Tensor) -> tuple[Tensor | None, Tensor]:
        """Row order that makes tiles begin at block edges (None if they do), and the block of each tile."""
        b, device = self.block, at.device
        if isinstance(q_offset, int) and q_offset % b == 0:
            return None, torch.arange(-(-Tq // b), device=device).view(1, 1, -1) + q_offset // b
        token = torch.arange(Tq + b - 1, device=device) - at % b
        order = torch.where((token >= 0) & (token < Tq), token, -1).int()
        tiles = -(-order.shape[-1] // b)
        return order, torch.arange(tiles, device=device) + at.div(b, rounding_mode="floor")
