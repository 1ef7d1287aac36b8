"""Vertical-slash plans: columns (keys that all queries of a head see) and slashes (diagonals).

A slash widened to a tile is a range of tile length at a fixed distance from the tile: the ranges of a head
are merged once, and shifted from tile to tile. Columns outside the ranges of a tile are gathered keys of the
tile, in the same softmax.

Source: Jiang et al., "MInference 1.0", arXiv 2407.02490, section 3.2 and appendix C.4 (vertical-slash); their
sequential merge for each tile is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...common.errors import PlanError, require
from ..options import FAR, INTEGERS, Fields, fit, host, laid_out, narrow, same_batch, shape_of
from ..ragged import begins
from .listed import Frame, check_capacity
from .spans import pack_spans


def _named(x: object, name: str) -> Tensor:
    if not (isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] > 0):
        raise PlanError(f"{name}: {shape_of(x)}; expected integers [B|1, H|1, n], -1 = none")
    require(
        (x.dtype in INTEGERS, lambda: f"{name} has dtype {x.dtype}: expected integers; try {name}.int()"),
        error=PlanError,
    )
    return x


@dataclass(frozen=True)
class _Runs:
    """The key ranges that the slashes of a head cover, relative to the position of a tile's first query.

    Disjoint ranges `[lo, hi)`, [B, H, n] each, ascending; unused ones lie beyond FAR. E.g. tile 4, distances
    0, 2, 9: [-9, -5), [-2, 4).
    """

    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, distances: Tensor, tile: int) -> _Runs:
        """Make a range of tile length at each distance [B, H, n] (-1: none), and join those that touch."""
        lo = torch.where(distances < 0, FAR, -distances).sort(-1).values
        n = lo.shape[-1]
        new = pad(lo[..., 1:] > lo[..., :-1] + tile, (1, 0), value=True)[..., :n]
        run = new.cumsum(-1) - 1
        begin, end = (torch.full_like(lo, 2 * FAR) for _ in range(2))
        begin.scatter_reduce_(-1, run, lo, "amin")
        end.scatter_reduce_(-1, run, lo + tile, "amax", include_self=False)
        return cls(begin, end)

    def table(self, first: Tensor, size: int) -> Tensor:
        """Whether positions first ... first + size - 1 lie in a range: bool [B, H, size]; first [B, H, 1]."""
        edge = torch.zeros(*self.lo.shape[:2], size + 1, dtype=torch.int8, device=self.lo.device)
        one = torch.ones_like(self.lo, dtype=torch.int8)
        for ends, step in ((self.lo, one), (self.hi, -one)):
            edge.scatter_add_(-1, (ends - first).clamp(0, size), step)
        return edge.cumsum(-1, dtype=torch.int8)[..., :-1] > 0


def from_slashes(
    columns: Tensor,
    distances: Tensor,
    *,
    Tq: int,
    Tk: int,
    tile: int = 64,
    q_offset: int | Tensor = 0,
    capacity: int | None = None,
) -> Fields:
    """Fields of `Plan.from_slashes`."""
    frame = Frame(Tq, Tk, tile, 1, True, q_offset)
    check_capacity(capacity)
    columns, distances = _named(columns, "columns"), _named(distances, "distances")
    same_batch(columns, distances, "columns, distances")
    columns = fit(columns, "columns hold", -1, max(Tk - 1, -1), "keys are 0..{most}, -1 = none").long()
    distances = fit(
        distances.long(), "distances hold", -1, FAR, "a query minus a key is 0 or more, -1 = none"
    )
    extent = frame.extent(columns, distances)
    columns, distances = (laid_out(x, *extent).contiguous() for x in (columns, distances))
    q = frame.of_tiles(columns.device).laid_out(*extent)
    runs = _Runs.of(distances, tile)
    ranges = _slashes(frame, runs, q.low, q.high, capacity)
    keys = _columns(frame, columns, runs, q.low, q.high, capacity)
    lost = [x.pop("overflow") for x in (ranges, keys) if "overflow" in x]
    overflow = torch.stack(lost).amax() if lost else None
    return {**frame.fields(), **ranges, **keys, "overflow": overflow}


def _slashes(frame: Frame, runs: _Runs, first: Tensor, last: Tensor, capacity: int | None) -> Fields:
    """Span lists of the runs shifted to each tile, cut at its first query: full before, partial after."""
    begin = torch.searchsorted(runs.hi, (-first).contiguous(), right=True)
    count = torch.searchsorted(runs.lo, (frame.Tk - first).contiguous()) - begin
    # runs are disjoint, each at least a tile long: this bounds how many start within the keys
    width = min(runs.lo.shape[-1], frame.Tk // (frame.tile + 1) + 2)
    if host(count):
        width = max(0, int(count.max())) if count.numel() else 0
    place = torch.arange(width, device=count.device)
    run = (begin[..., None] + place).clamp(max=max(runs.lo.shape[-1] - 1, 0)).flatten(2)
    shift, live = first[..., None], place < count[..., None]
    lo, hi = (x.gather(-1, run).view(live.shape) + shift for x in (runs.lo, runs.hi))
    middle = (shift + 1).clamp(min=0)
    ends = [
        (lo.clamp(min=0), torch.minimum(hi, middle).clamp(max=frame.Tk)),
        (torch.maximum(lo, middle), torch.minimum(hi, last[..., None] + 1).clamp(max=frame.Tk)),
    ]
    (lo, hi), (a, b) = ((x, torch.where(live, y, x)) for x, y in ends)
    if width:  # only the last run extends past the tile's first query
        at = (count - 1).clamp(min=0)[..., None]
        a, b = a.gather(-1, at), b.gather(-1, at)
    lows, highs = ([*x.unbind(-1), *y.unbind(-1)] for x, y in ((lo, a), (hi, b)))
    if not lows:
        lows = highs = [torch.zeros_like(first)]
    return pack_spans(
        lows, highs, [True] * max(width, 1) + [False] * min(width, 1), moving=False, most=capacity
    )


def _columns(
    frame: Frame, columns: Tensor, runs: _Runs, first: Tensor, last: Tensor, capacity: int | None
) -> Fields:
    """Unit lists of the columns outside each tile's runs, ascending, so that full ones come first."""
    key = columns.sort(-1).values
    key = torch.where(pad(key[..., 1:] == key[..., :-1], (1, 0)), -1, key)[..., None, :]  # drop duplicates
    B, H, R = first.shape
    if (
        R and frame.Tk
    ):  # keys relative to a tile are those of the last tile shifted by tiles: strided views of one table
        size = (R - 1) * frame.tile + frame.Tk
        table = runs.table(-first[..., -1:], size)
        strides = (table.stride(0), table.stride(1), frame.tile, 1)
        covered = table.as_strided((B, H, R, frame.Tk), strides).gather(
            -1, key.clamp(min=0).expand(B, H, R, -1)
        )
        covered = covered.flip(2)
    else:
        covered = torch.zeros(B, H, R, key.shape[-1], dtype=torch.bool, device=key.device)
    key, first, last = key.int(), narrow(first), narrow(last)
    alive = (key >= 0) & (key <= last[..., None]) & ~covered
    count, sure = alive.sum(-1), (alive & (key <= first[..., None])).sum(-1)
    if capacity is None and host(alive):
        index = key.expand(alive.shape).masked_select(alive)
        return {"start": begins(count), "full": sure.int(), "count": count.int(), "index": index}
    width = key.shape[-1] if capacity is None else min(key.shape[-1], capacity)
    at = torch.where(alive, alive.cumsum(-1) - 1, width).clamp(max=width)
    index = torch.zeros(*count.shape, width + 1, dtype=torch.int32, device=key.device)
    index.scatter_(-1, at, key.expand(at.shape))
    return {
        "start": (torch.arange(count.numel(), device=key.device) * width).view(count.shape),
        "full": sure.clamp(max=width).int(),
        "count": count.clamp(max=width).int(),
        "index": index[..., :width].flatten(),
        "overflow": (count > width).any().int(),
    }
