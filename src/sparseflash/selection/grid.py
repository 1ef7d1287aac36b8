"""`Grid`: tiles of queries against units of keys, and where both stand, said once for everything here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, SparseFlashError, require
from ..plan import Plan
from ..plan.options import FAR, SHORT, TILE, UNIT, host, is_count, is_length, normal_offset, shift_of
from ..plan.ragged import begins


@dataclass(frozen=True, eq=False)
class Grid:
    """Tiles of `tile` queries against units of `unit` keys, and the positions of both.

    Query i stands at position `i + q_offset`, key j at position j. Estimators, budgets and lists that are
    given one grid agree about chunks of a prompt (`q_offset`), padding and ragged ends.

    Parameters
    ----------
    Tq, Tk : int
        Numbers of queries and of keys.
    tile, unit : int
        Queries of a tile, keys of a unit: R = ceil(Tq / tile) tiles, C = ceil(Tk / unit) units. The last ones
        may be shorter.
    q_offset : int or Tensor
        Position of the first query: an int, or integers, 0-d or `[B]`. Under `causal`, queries at negative
        positions see nothing: they are the padding of a batch whose keys begin at their first real token.
    causal : bool
        Whether a query sees no key behind its own position.
    q_keep, k_keep : Tensor, optional
        bool `[B|1, Tq]` and `[B|1, Tk]`, True = a real token. Padding is in no estimate. A unit of padding is
        out of reach, and a key of padding is seen by nobody. A padded query sees what its tile does: nobody
        reads it.
    device : optional
        Where `reach` and `near` are made, if no tensor above says so.

    Examples
    --------
    >>> from sparseflash.selection import Grid
    >>> grid = Grid(4, 8, tile=2, unit=2, q_offset=4)  # the second half of eight tokens
    >>> grid.reach().int().tolist()
    [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]
    >>> grid.near(sink=1, local=2).int().tolist()
    [[[[1, 1, 1, 0], [1, 0, 1, 1]]]]
    """

    Tq: int
    Tk: int
    tile: int = TILE
    unit: int = UNIT
    q_offset: int | Tensor = 0
    causal: bool = True
    q_keep: Tensor | None = None
    k_keep: Tensor | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        for name in ("Tq", "Tk"):
            if not is_length(getattr(self, name)):
                raise SparseFlashError(f"{name}={getattr(self, name)!r}: expected an int >= 0, of 32 bits")
        for name in ("tile", "unit"):
            if not is_length(getattr(self, name), 1):
                raise SparseFlashError(
                    f"{name}={getattr(self, name)!r}: expected a positive int, the tokens that share an entry"
                )
        require((isinstance(self.causal, bool), f"causal={self.causal!r}: expected True or False"))
        object.__setattr__(self, "q_offset", normal_offset(self.q_offset))
        for name, T in (("q_keep", self.Tq), ("k_keep", self.Tk)):
            check_keep(name, getattr(self, name), T)
        object.__setattr__(self, "device", self._place())

    def _place(self) -> torch.device:
        for x in (self.q_offset, self.q_keep, self.k_keep):
            if isinstance(x, Tensor):
                return x.device
        return torch.device("cpu" if self.device is None else self.device)

    @property
    def tiles(self) -> int:
        """Number R of tiles."""
        return -(-self.Tq // self.tile)

    @property
    def units(self) -> int:
        """Number C of units."""
        return -(-self.Tk // self.unit)

    def __repr__(self) -> str:
        offset = "per sequence" if isinstance(self.q_offset, Tensor) else self.q_offset
        return (
            f"Grid(Tq={self.Tq}, Tk={self.Tk}, tile={self.tile}, unit={self.unit}, q_offset={offset}, "
            f"causal={self.causal})"
        )

    def q_positions(self, device: torch.device | None = None) -> Tensor:
        """Position of every query, int64 `[B|1, Tq]`; padding included."""
        at = torch.arange(self.Tq, device=device or self.device)[None]
        return at + _to(shift_of(self.q_offset, 1), at.device)

    def reach(self, *, q_order: Tensor | None = None, k_order: Tensor | None = None) -> Tensor:
        """Whether some query of the tile may see some key of the unit.

        With orders (as in `Plan`: int `[B|1, H|1, rows]`, `order[row] = token`, -1 is no token), tiles and
        units are those of their rows.

        Returns
        -------
        Tensor, bool [B|1, H|1, R, C]
            H is 1 but for orders that have more heads.
        """
        device = next((x.device for x in (q_order, k_order) if x is not None), self._place())
        q, k = self._of_tiles(q_order, device), self._of_units(k_order, device)
        return self._reach(q, k)

    def near(self, sink: int = 0, local: int = 1) -> Tensor:
        """The units that are kept whatever the scores say: the first ones, and those around the tile itself.

        Parameters
        ----------
        sink : int
            So many units from the first with a real key on.
        local : int
            1 is the tile's own units, those that hold its positions (several where tiles are longer than
            units or lie across their edges); n adds the n - 1 units before them, and, where the grid is not
            causal, as many behind; 0 is none.

        Returns
        -------
        Tensor, bool [B|1, 1, R, C]
            Within `reach`.
        """
        for name, n in (("sink", sink), ("local", local)):
            require((is_count(n), f"{name}={n!r}: expected a count of units >= 0"))
        device = self._place()
        q, k = self._of_tiles(None, device), self._of_units(None, device)
        unit = torch.arange(self.units, device=device)
        near = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        if sink and self.units:
            begin = torch.where(k.last >= 0, unit, FAR).amin(-1, keepdim=True)
            near = near | (unit < begin + sink)[:, :, None, :]
        if local:
            first, last = (
                torch.div(x, self.unit, rounding_mode="floor")[..., None] for x in (q.first, q.last)
            )
            behind = 0 if self.causal else local - 1
            near = near | ((unit >= first - (local - 1)) & (unit <= last + behind))
        return near & self._reach(q, k)

    def plan(
        self,
        keep: Tensor,
        *,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
        capacity: int | None = None,
    ) -> Plan:
        """The plan of the units that each tile keeps, within `reach`; elements of the future are masked.

        Parameters
        ----------
        keep : Tensor
            bool `[B|1, H|1, R, C]`, True = attends. H is any divisor of the query heads.
        q_order, k_order : Tensor, optional
            Integers `[B|1, H|1, rows]`: tiles and units are those of rows, as in `Plan`.
        capacity : int, optional
            Units of a tile, at most: shapes then depend on no value (on accelerators the default is all of
            them); what is beyond is dropped and `plan.overflow` set.

        Examples
        --------
        >>> import torch
        >>> from sparseflash.selection import Grid
        >>> grid = Grid(2, 4, tile=1, unit=2, q_offset=2)
        >>> grid.plan(torch.ones(1, 1, 2, 2, dtype=torch.bool)).to_dense()[0, 0].int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
        """
        rows, cols = (T if x is None else x.shape[-1] for x, T in ((q_order, self.Tq), (k_order, self.Tk)))
        want = (-(-rows // self.tile), -(-cols // self.unit))
        good = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.dim() == 4 and keep.shape[1] > 0
        if not good or tuple(keep.shape[2:]) != want:
            given = f"{list(keep.shape)} {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
            raise PlanError(
                f"keep: {given}; expected bool [B|1, H|1, {want[0]} tiles of {self.tile}, {want[1]} units of "
                f"{self.unit}], True = attends"
            )
        if capacity is not None and not is_count(capacity, 1):
            raise PlanError(f"capacity={capacity!r}: expected a positive int, or None")
        q, k = self._of_tiles(q_order, keep.device), self._of_units(k_order, keep.device)
        keep = keep & self._reach(q, k)
        sure = k.whole[..., None, :]
        if self.causal:
            sure = sure & (k.last[..., None, :] <= q.least[..., None])
        fields = _lists(keep, sure, capacity)
        if self.k_keep is not None:
            ends = torch.where(self.k_keep, SHORT.max, SHORT.min).to(keep.device, torch.int32)
            fields["k_end"] = ends[:, None]
        for name, order in (("q_order", q_order), ("k_order", k_order)):
            if order is not None:
                fields[name] = order.int()
        offset = self.q_offset
        if isinstance(offset, Tensor):
            offset = offset.to(keep.device)
        return Plan._made(
            Tq=self.Tq,
            Tk=self.Tk,
            tile=self.tile,
            unit=self.unit,
            causal=self.causal,
            q_offset=offset if self.causal else 0,
            **fields,
        )

    def ends(self, group: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions where groups of so many queries end and blocks of so many keys begin, int64 `[B|1, n]`.

        Real tokens count; a group without one ends at -2^40, a block without one begins at 2^40.
        """
        q = _ends(self.q_positions(device), self.q_keep, None, group)
        k = _ends(torch.arange(self.Tk, device=device)[None], self.k_keep, None, block)
        return q.last[:, 0], k.first[:, 0]

    def _reach(self, q: _Ends, k: _Ends) -> Tensor:
        some = (q.last[..., None] > -FAR) & (k.last[..., None, :] > -FAR)
        return some & (k.first[..., None, :] <= q.last[..., None]) if self.causal else some

    def _of_tiles(self, order: Tensor | None, device: torch.device) -> _Ends:
        at = self.q_positions(device)
        return _ends(at, self.q_keep, order, self.tile)

    def _of_units(self, order: Tensor | None, device: torch.device) -> _Ends:
        at = torch.arange(self.Tk, device=device)[None]
        return _ends(at, self.k_keep, order, self.unit)


@dataclass(frozen=True)
class _Ends:
    """The smallest and the largest position of the real tokens of each group, int64 `[B|1, H|1, groups]`.

    A group without any is from FAR to -FAR. `least` is the smallest of its tokens that may be padding;
    `whole` is whether it has no padding, and no lane without a token.
    """

    first: Tensor
    last: Tensor
    least: Tensor
    whole: Tensor


def _ends(at: Tensor, keep: Tensor | None, order: Tensor | None, size: int) -> _Ends:
    """Of positions [B|1, T], in an order of rows."""
    at, rows = at[:, None], at.shape[-1]
    real = None if keep is None else keep.to(at.device)[:, None]
    if order is not None:
        token = order.long().clamp(min=0)
        batch = max(x.shape[0] for x in (at, order, *([] if real is None else [real])))
        token = token.expand(batch, -1, -1)
        heads, rows = token.shape[1], token.shape[-1]
        there = order >= 0
        at = at.expand(batch, heads, -1).gather(-1, token)
        real = there if real is None else there & real.expand(batch, heads, -1).gather(-1, token)
    groups = -(-rows // size)
    short = groups * size - rows
    if real is None and order is None:
        n = torch.arange(groups, device=at.device) * size
        begin = at[..., :1] if rows else at.new_zeros(at.shape[0], 1, 1)
        last = (n + size - 1).clamp(max=max(rows - 1, 0))
        return _Ends(begin + n, begin + last, begin + n, (n + size <= rows).expand(1, 1, -1))
    assert real is not None
    there = torch.ones_like(real) if order is None else order >= 0
    shape = [max(sizes) for sizes in zip(at.shape, real.shape, there.shape, strict=True)]
    at, real, there = (
        torch.nn.functional.pad(x.expand(shape), (0, short)).view(*shape[:-1], groups, size)
        for x in (at, real, there)
    )
    first, last = torch.where(real, at, FAR).amin(-1), torch.where(real, at, -FAR).amax(-1)
    return _Ends(first, last, torch.where(there, at, FAR).amin(-1), real.all(-1))


def _lists(keep: Tensor, sure: Tensor, capacity: int | None) -> dict[str, Any]:
    """Lists of units, full ones first: compact in main memory, else of a fixed width that needs no value."""
    sure = keep & sure
    *lead, C = keep.shape
    count, full = keep.sum(-1), sure.sum(-1)
    place = torch.where(sure, sure.cumsum(-1), full[..., None] + (keep & ~sure).cumsum(-1)) - 1
    units = torch.arange(C, device=keep.device, dtype=torch.int32).expand(keep.shape)
    if capacity is None and host(keep):
        start = begins(count).view(lead)
        index = torch.empty(int(count.sum()), dtype=torch.int32, device=keep.device)
        index[(start[..., None] + place)[keep]] = units[keep]
        return {"start": start, "full": full.int(), "count": count.int(), "index": index}
    width = C if capacity is None else min(capacity, C)
    start = (torch.arange(count.numel(), device=keep.device) * width).view(lead)
    room = count.numel() * width
    at = torch.where(keep & (place < width), start[..., None] + place, room)
    index = torch.zeros(room + 1, dtype=torch.int32, device=keep.device).scatter_(
        0, at.flatten(), units.flatten()
    )
    return {
        "start": start,
        "full": full.clamp(max=width).int(),
        "count": count.clamp(max=width).int(),
        "index": index[:-1],
        "overflow": (count > width).any().int(),
        "room": width,
    }


def _to(x: int | Tensor, device: torch.device) -> int | Tensor:
    return x.to(device) if isinstance(x, Tensor) else x


def check_keep(name: str, keep: object, T: int, batch: int | None = None) -> None:
    """A padding mask: None, or bool [B|1, T]."""
    if keep is None:
        return
    good = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.dim() == 2 and keep.shape[1] == T
    if good and batch is not None:
        assert isinstance(keep, Tensor)
        good = keep.shape[0] in (1, batch)
    if not good:
        given = f"{list(keep.shape)} {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
        want = "B" if batch is None else batch
        raise SparseFlashError(f"{name}: {given}; expected bool [{want}|1, {T}], True = a real token")
