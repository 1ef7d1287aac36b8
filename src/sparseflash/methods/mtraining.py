"""MTraining: vertical-slash for training, with block-aligned slashes so that ranks have equal work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan
from ..plan.options import FAR, host, known
from ..selection.budgets import top_indices, top_p
from ..selection.probes import probe
from .base import Context, Method, Selection, check_counts, check_shares


@dataclass(frozen=True)
class MTraining(Method):
    """Each head sees the block diagonals and single keys with the largest weights of the last queries.

    A diagonal of tokens crosses two diagonals of blocks: both are kept, for every tile of queries, so ranks
    that hold every n-th block (`layout="striped"`) have equal work in each step of a ring. Keys of selected
    columns are gathered where no selected block holds them.

    The released code ranks columns by the sum of raw scores; here it is that of softmax weights, as in its
    flexible mode.

    Papers: Li et al., "MTraining", arXiv 2510.18830, sections on balanced and hierarchical sparse rings.

    Parameters
    ----------
    vertical, slash : int
        Most columns, and most distances, that a head keeps.
    mass : float
        Share of the last queries' weights that the kept columns (and the kept distances) hold, in (0, 1]; 1
        keeps the maximum number.
    granularity : int
        Tokens of a block.
    last : int
        Number of last queries that are probed for columns and distances.
    sinks, near : int
        First keys, and nearest distances, that are always kept.

    Notes
    -----
    `ctx` keys: `scale` and `softcap`, and `q_offset`, a multiple of the granularity. The selection has no
    gradient.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32)
    >>> method = sf.methods.MTraining(vertical=30, slash=4, granularity=64, sinks=4, near=4)
    >>> method(q, k, v).shape, method.select(q, k).plan.density < 0.8
    (torch.Size([1, 2, 1024, 32]), True)
    """

    vertical: int = 1000
    slash: int = 1000
    mass: float = 1.0
    granularity: int = 128
    last: int = 64
    sinks: int = 30
    near: int = 100

    reads = ("q_offset", "scale", "softcap")
    paper = "arXiv 2510.18830"
    phases = ("training", "prefill")
    causal_selection = False
    layout: ClassVar[str] = "striped"

    def __post_init__(self) -> None:
        check_counts(self, 1, "vertical", "slash", "granularity", "last")
        check_counts(self, 0, "sinks", "near")
        check_shares(self, "mass")

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select columns and diagonals by the weights of the last queries."""
        ctx = ctx or {}
        at = ctx.get("q_offset", 0)
        seen = probe(q, k, self.last, q_offset=at, scale=ctx.get("scale"), softcap=ctx.get("softcap"))
        return Selection(self.plan(seen.keys(), seen.distances(), q.shape[2], q_offset=at))

    def plan(self, columns: Tensor, distances: Tensor, Tq: int, *, q_offset: Any = 0) -> Plan:
        """Make the plan from the mass of columns `[B,H,Tk]` and of distances `[B,H,n]`.

        Example, size 4: distance 6 keeps block diagonals 1 and 2; tile 3 (rows 12..15) then sees keys 8..11
        and 4..7 beside its own diagonal 12..15, and a column 9 is dropped there, column 2 gathered.
        """
        size, Tk, device = self.granularity, columns.shape[-1], columns.device
        at = torch.as_tensor(q_offset, device=device).long().reshape(-1, 1, 1, 1)
        if host(at) and bool((at % size != 0).any()):
            raise SparseFlashError(
                f"q_offset={q_offset!r}: expected a multiple of the granularity, {size}: blocks begin there"
            )
        R, none = -(-Tq // size), distances.shape[-1] // size + 2  # `none`: larger than any diagonal number
        kept = self._best(columns, self.vertical, self.sinks)
        far = self._best(distances, self.slash, self.near)
        diagonal = torch.zeros(*far.shape[:2], none + 1, dtype=torch.bool, device=device)
        for block in (far // size, (far + size - 1) // size):
            diagonal.scatter_(-1, torch.where(far < 0, none, block), True)
        place = torch.arange(none + 1, device=device)
        diagonal = (diagonal | (place == 0)) & (place < none)
        most = min(2 * far.shape[-1] + 1, none)
        if host(diagonal):
            most = int(diagonal.sum(-1).max()) if diagonal.numel() else 0
        back = torch.where(diagonal, place, FAR).sort(-1).values
        if not known(none):  # a static width for symbolic T
            most = 2 * max(self.slash, self.near) + 1
            back = torch.cat([back, back.new_full((*back.shape[:2], most), FAR)], -1)
        tile = torch.arange(R, device=device)[:, None] + at // size
        begin = (tile - back[..., None, :most]) * size
        begin, end = begin.clamp(0, Tk), (begin + size).clamp(0, Tk)
        own = kept[..., None, :].div(size, rounding_mode="floor")
        seen = diagonal[..., None, :].expand(-1, -1, R, -1).gather(-1, (tile - own).clamp(0, none))
        bars = torch.where((own < tile) & (own >= 0) & ~seen, kept[..., None, :], -1)
        frame = {"Tq": Tq, "Tk": Tk, "tile": size, "causal": True, "q_offset": q_offset}
        spans = Plan.from_spans(torch.stack([begin, end], -1), **frame)
        index = Plan.from_keys(bars, unit=1, unique=True, **frame)
        return Plan.from_lists(spans=spans, index=index, disjoint=True)

    def _best(self, mass: Tensor, most: int, first: int) -> Tensor:
        """Best indices of each row, always including the first `first` ones; padded with -1."""
        place = torch.arange(mass.shape[-1], device=mass.device)
        found = top_indices(torch.where(place < first, torch.inf, mass), max(most, first)).long()
        if self.mass < 1:
            enough = top_p(mass, self.mass).gather(-1, found.clamp(min=0))
            found = torch.where(enough | (found < first), found, -1)
        return torch.where(found < mass.shape[-1], found, -1)
