"""MInference: a-shape, vertical-slash and block-sparse heads for long prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan
from ..selection.budgets import top_indices, top_k
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from ..selection.probes import probe
from .base import Context, Method, Selection, Share, check_counts, check_share, shared

PATTERNS = ("vertical-slash", "a-shape", "block-sparse")


@dataclass(frozen=True)
class MInference(Method):
    """Each head has one of three patterns, whose indices are estimated for each prompt.

    A vertical-slash head sees, from every query, some keys (columns) and keys at some distances (slashes):
    those with the largest weights of the last queries. Slashes are widened to tiles of 64
    (`Plan.from_slashes`). An a-shape head sees the first keys and a window. A block-sparse head sees, for
    each tile, the blocks whose mean key has the largest product with its mean query.

    Papers: Jiang et al., "MInference 1.0", arXiv 2407.02490, section 3 and algorithms 1 to 3.

    Parameters
    ----------
    pattern : str
        "vertical-slash", "a-shape" or "block-sparse"; a tuple where heads differ, as for every other field.
    vertical, slash : int
        Columns and distances of a vertical-slash head; first keys and window of an a-shape head.
    blocks : int
        Blocks of a tile, in a block-sparse head.
    last : int
        Number of last queries that are probed for columns and distances.
    sinks, near : int
        First keys and nearest distances that are always kept.
    share : "", "sum" or "max"
        "": each query head selects for itself; otherwise the query heads of a KV head share a selection, by
        the sum or maximum of their scores.

    Notes
    -----
    `ctx` keys: `q_offset`, the position of the first query, `scale` and `softcap`. With a chunked prompt, the
    last queries of each chunk select for that chunk.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 2048, 32)
    >>> method = sf.methods.MInference(vertical=30, slash=10, near=5)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.6
    (torch.Size([1, 2, 2048, 32]), True)
    """

    pattern: str = "vertical-slash"
    vertical: int = 1000
    slash: int = 6096
    blocks: int = 100
    last: int = 64
    sinks: int = 30
    near: int = 100
    share: Share = ""

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2407.02490"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_counts(self, 1, "vertical", "slash", "blocks", "last")
        check_counts(self, 0, "sinks", "near")
        if self.pattern not in PATTERNS:
            raise SparseFlashError(f"pattern={self.pattern!r}: expected one of {', '.join(PATTERNS)}")
        check_share(self)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select by the pattern, for queries from `q_offset` on."""
        ctx, (Tq, Tk) = ctx or {}, (q.shape[2], k.shape[2])
        at, told = ctx.get("q_offset", 0), {name: ctx.get(name) for name in ("scale", "softcap")}
        if self.pattern == "a-shape":
            shape = {"window": (self.slash - 1, 0), "sink_tokens": self.vertical}
            return Selection(Plan.dense(Tq, Tk, causal=True, q_offset=at, device=q.device, **shape))
        if self.pattern == "block-sparse":
            grid = Grid(Tq, Tk, tile=64, unit=64, q_offset=at, device=q.device)
            mass = shared(tile_mass(q, k, grid, "mean", **told), k, self.share)
            return Selection(grid.plan(top_k(mass, self.blocks, among=grid.reach())))
        seen = probe(q, k, self.last, q_offset=at, **told)
        columns, distances = (shared(x, k, self.share) for x in (seen.keys(), seen.distances()))
        return Selection(
            Plan.from_slashes(
                _best(columns, max(self.vertical, self.sinks), self.sinks),
                _best(distances, max(self.slash, self.near), self.near),
                Tq=Tq,
                Tk=Tk,
                q_offset=at,
            )
        )


def _best(score: Tensor, n: int, first: int) -> Tensor:
    """Return the n best indices of each row, always including the first `first` ones."""
    if not score.shape[-1]:
        return score.int()
    place = torch.arange(score.shape[-1], device=score.device)
    return top_indices(torch.where(place < first, torch.inf, score), n)
