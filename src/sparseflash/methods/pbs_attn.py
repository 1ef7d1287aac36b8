"""PBS-Attn: sort keys by importance before block selection, so that fewer blocks hold the mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..ops._arguments import as_scale, as_softcap
from ..plan.options import precise
from ..selection.budgets import share, top_p
from ..selection.grid import Grid
from ..selection.probes import probe
from ..selection.scores import pooled
from .base import Context, Method, Selection, Share, begin, check_counts, check_share, check_shares, shared


@dataclass(frozen=True)
class PBSAttn(Method):
    """Keys are sorted inside segments by the weights of the last queries; then blocks of keys are selected.

    Attention does not depend on the order of keys, and all keys of an earlier segment stay in the past in any
    order, so only the block selection is an approximation. Queries see their own segment, the block that
    holds the first key, and the blocks of earlier segments with most of the mass, as pooled queries and keys
    estimate it.

    Papers: Wang et al., "Sparser Block-Sparse Attention via Token Permutation", arXiv 2510.21270.

    Parameters
    ----------
    threshold : float
        Share of the estimated mass of earlier segments that a tile keeps, in (0, 1]; not a recall.
    block : int
        Queries of a tile, and keys of a block; also the number of last queries that score keys for sorting.
    segment : int
        Keys that are sorted together: a multiple of the block. An incomplete last segment is not sorted.
    pooling : "mean" or "max"
        How queries and keys of a block are pooled.
    share : "", "sum" or "max"
        "": each query head selects blocks for itself; "sum" or "max": the query heads of a KV head together.
        Keys are sorted per KV head in any case.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, `scale` and `softcap`. With a chunked prompt, the
    last queries of each chunk determine the order for that chunk.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.PBSAttn(threshold=0.5, block=64, segment=128)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.8
    (torch.Size([1, 2, 1024, 32]), True)
    """

    threshold: float = 0.9
    block: int = 128
    segment: int = 256
    pooling: Literal["mean", "max"] = "mean"
    share: Share = ""

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2510.21270"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_share(self)
        check_shares(self, "threshold")
        check_counts(self, 1, "block", "segment")
        if self.segment % self.block:
            raise SparseFlashError(f"segment={self.segment}: expected a multiple of block={self.block}")
        if self.pooling not in ("mean", "max"):
            raise SparseFlashError(f"pooling={self.pooling!r}: expected mean or max")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Sort the keys, and select blocks of each tile in that order."""
        ctx, (Tq, Tk), block = ctx or {}, (q.shape[2], k.shape[2]), self.block
        told: dict[str, Any] = {name: ctx.get(name) for name in ("scale", "softcap")}
        grid = Grid(Tq, Tk, block, block, ctx.get("q_offset", 0), device=q.device)
        order = self._sorted(q, k, told)
        reach = grid.reach(k_order=order)

        at = begin(ctx, q)
        first = at + torch.arange(0, Tq, block, device=q.device)
        own = torch.div(first, self.segment, rounding_mode="floor")[..., None]
        unit = torch.arange(grid.units, device=q.device)
        segment = unit * block // self.segment
        earlier = reach & (segment < own)
        origin = (order[..., : self.segment] == 0).int().argmax(-1) if Tk else order.sum(-1)
        seen = (segment >= own) | (unit == origin[..., None, None] // block)

        mass = self._mass(q, k, order, earlier, told)
        mass = shared(mass, k, self.share)
        group = mass.shape[1] // k.shape[1]
        seen, earlier = (
            (x & reach).repeat_interleave(group if x.shape[1] > 1 else 1, 1) for x in (seen, earlier)
        )
        return Selection(grid.plan(top_p(mass, self.threshold, among=earlier) | seen, k_order=order.int()))

    def _sorted(self, q: Tensor, k: Tensor, told: dict[str, Any]) -> Tensor:
        """Order of the keys, [B,Hkv,Tk]: the best keys of each segment first."""
        whole = k.shape[2] // self.segment * self.segment
        place = torch.arange(k.shape[2], device=k.device).expand(*q.shape[:1], k.shape[1], -1)
        if not (whole and q.shape[2]):
            return place
        # as in the paper, not causal: keys after a probed query are in the query's own segment
        given = probe(q, k[:, :, :whole], self.block, causal=False, **told).keys()
        score = k.new_zeros(
            *place.shape[:2], -(-k.shape[2] // self.segment) * self.segment, dtype=given.dtype
        )
        score.scatter_(-1, place[..., :whole], share(given, k.shape[1], "sum"))  # a last part keeps its order
        best = score.unflatten(-1, (-1, self.segment)).argsort(dim=-1, descending=True, stable=True)
        best = best + torch.arange(0, score.shape[-1], self.segment, device=k.device)[:, None]
        return best.flatten(2)[..., : k.shape[2]]

    def _mass(self, q: Tensor, k: Tensor, order: Tensor, among: Tensor, told: dict[str, Any]) -> Tensor:
        """Softmax of pooled queries over keys pooled in this order, within `among`: [B,Hq,R,C]."""
        rows = pooled(q, self.block, self.pooling)
        columns = pooled(k, self.block, self.pooling, order=order)
        columns = columns.repeat_interleave(q.shape[1] // k.shape[1], 1)
        with precise(q):
            score = rows @ columns.mT * as_scale(told["scale"], q.shape[3])
        if cap := as_softcap(told["softcap"]):
            score = cap * (score / cap).tanh()
        among = among.repeat_interleave(q.shape[1] // among.shape[1], 1)
        return score.masked_fill(~among, -torch.inf).softmax(-1).nan_to_num(nan=0)
