"""FlexPrefill: vertical-slash or query-aware blocks, chosen per head and prompt by its last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.errors import SparseFlashError
from ..selection.budgets import top_k, top_p
from ..selection.grid import Grid
from ..selection.mass import tile_mass
from ..selection.probes import probe
from .base import Context, Method, Selection, Share, begin, check_counts, check_share, check_shares, shared


@dataclass(frozen=True)
class FlexPrefill(Method):
    """Each head chooses its pattern and its budget by the attention of the last queries.

    If pooled queries and keys approximate the softmax of the last block (a Jensen-Shannon distance below
    `tau`), the head is query-aware: pooled scores select the blocks of all tiles. Other heads see the block
    columns and block diagonals that hold the share `gamma` of the last queries' mass. The first column and
    the main diagonal are always visible.

    Papers: Lai et al., "FlexPrefill", arXiv 2502.20766, algorithms 1 to 4.

    Parameters
    ----------
    gamma : float
        Share of the estimated mass that is kept, in (0, 1]; not a recall.
    tau : float
        A head is query-aware below this distance, in [0, 1]; 0 means never, 0.84 always.
    block : int
        Queries of a tile, and keys of a block; also the number of last queries that are probed.
    min_budget, max_budget : int
        Least and most keys in columns, and in diagonals (None: no limit).
    halo : bool
        A diagonal of tokens crosses two diagonals of blocks: True keeps both, for more work and recall.
    shared : bool
        Whether the tiles of a query-aware head share one budget, as in the paper (here each tile keeps at
        least its best block). The selection of a tile then depends on the other tiles of its chunk.
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
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.FlexPrefill(gamma=0.5, block=64, min_budget=64, tau=0.0)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.9
    (torch.Size([1, 2, 1024, 32]), True)
    """

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    min_budget: int = 512
    max_budget: int | None = None
    halo: bool = False
    shared: bool = True
    share: Share = ""

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2502.20766"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        check_share(self)
        check_shares(self, "gamma")
        check_counts(self, 1, "block", "min_budget")
        if self.max_budget is not None:
            check_counts(self, self.min_budget, "max_budget")
        if isinstance(self.tau, bool) or not (isinstance(self.tau, (int, float)) and 0 <= self.tau <= 1):
            raise SparseFlashError(f"tau={self.tau!r}: expected a number in [0, 1]")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select block columns and diagonals, and on query-aware heads the blocks with high pooled scores."""
        ctx, (Tq, Tk) = ctx or {}, (q.shape[2], k.shape[2])
        at = ctx.get("q_offset", 0)
        told = self._told(ctx)
        grid = Grid(Tq, Tk, self.block, self.block, at, device=q.device)
        seen = probe(q, k, self.block, q_offset=at, **told)
        (columns, n_columns), (diagonals, n_diagonals) = (
            self._blocks(self._judged(x, k)) for x in (seen.keys(), seen.distances())
        )
        aware = self._apart(q, k, columns, at, told) < self.tau
        least = -(-self.min_budget // self.block)
        column = top_k(_first(columns), torch.where(aware, least, n_columns))
        diagonal = top_k(_first(diagonals), torch.where(aware, least, n_diagonals))
        if self.halo:
            diagonal = diagonal | pad(diagonal, (1, 0))[..., :-1]
        keep = column[:, :, None]
        first = begin(ctx, q) + torch.arange(0, Tq, self.block, device=q.device)
        for position in (first, (first + self.block).clamp(max=begin(ctx, q) + Tq) - 1):
            keep = keep | _on(diagonal, position, self.block, grid.units)
        mass = self._judged(tile_mass(q, k, grid, "mean", **told), k)
        chosen = top_p(mass, self.gamma, among=grid.reach(), over=2 if self.shared else 1)
        return Selection(grid.plan((keep & grid.reach()) | (chosen & aware[..., None, None])))

    def distances(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        """Distances that `tau` bounds, `[B, H]`: between pooled scores of the last block and its softmax."""
        at, told = (ctx or {}).get("q_offset", 0), self._told(ctx)
        seen = probe(q, k, self.block, q_offset=at, **told)
        return self._apart(q, k, self._blocks(self._judged(seen.keys(), k))[0], at, told)

    def notes(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> dict[str, Tensor]:
        """`aware`: whether each head is query-aware, 0 or 1, mean over the batch."""
        return {"aware": (self.distances(q, k, ctx) < self.tau).float().mean(0)}

    @staticmethod
    def _told(ctx: Context | None) -> dict[str, Any]:
        return {name: (ctx or {}).get(name) for name in ("scale", "softcap")}

    def _apart(self, q: Tensor, k: Tensor, columns: Tensor, at: Any, told: dict[str, Any]) -> Tensor:
        (Tq, Tk), n = (q.shape[2], k.shape[2]), min(self.block, q.shape[2])
        last = Grid(n, Tk, max(n, 1), self.block, at + (Tq - n), device=q.device)
        pooled = self._judged(tile_mass(q[:, :, Tq - n :], k, last, "mean", **told).sum(2), k)
        return distance(pooled, columns)

    def _judged(self, mass: Tensor, k: Tensor) -> Tensor:
        """Reduce mass over shared heads, and normalise it to sum to 1."""
        mass = shared(mass, k, self.share)
        return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)

    def _blocks(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Sum token shares over blocks, and compute the number of blocks to keep."""
        count = -(-mass.shape[-1] // self.block)
        least = -(-self.min_budget // self.block)
        most = count if self.max_budget is None else -(-self.max_budget // self.block)
        n = top_p(mass, self.gamma).sum(-1) // self.block + 1
        whole = pad(mass, (0, count * self.block - mass.shape[-1]))
        return whole.view(*mass.shape[:-1], count, self.block).sum(-1), n.clamp(min=least).clamp(max=most)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon distance of distributions along the last axis: 0 if equal, at most sqrt(ln 2)."""
    middle = (a + b) / 2
    apart = sum(torch.special.xlogy(x, x) - torch.special.xlogy(x, middle) for x in (a, b))
    assert isinstance(apart, Tensor)
    return (apart.sum(-1) / 2).clamp(min=0).sqrt()


def _first(score: Tensor) -> Tensor:
    """Set the first score to infinity, so that it is always selected."""
    return torch.where(torch.arange(score.shape[-1], device=score.device) == 0, torch.inf, score)


def _on(diagonal: Tensor, position: Tensor, block: int, units: int) -> Tensor:
    """Whether units lie on selected block diagonals [B,H,n] of positions [B|1,1,R]: bool [B,H,R,units]."""
    own = torch.div(position, block, rounding_mode="floor")[..., None]
    away = own - torch.arange(units, device=own.device)
    n = diagonal.shape[-1]
    shape = (*diagonal.shape[:2], position.shape[-1])
    found = (
        diagonal[:, :, None].expand(*shape, n).gather(-1, away.clamp(0, max(n - 1, 0)).expand(*shape, units))
    )
    return found & (away >= 0) & (away < n)
