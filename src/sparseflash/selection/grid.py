"""`Grid`: the geometry of tiles of queries x units of keys, shared by estimators, budgets and plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import PlanError, SparseFlashError, require
from ..plan import Plan
from ..plan.make.extremes import Extremes, extremes, rows_of
from ..plan.options import FAR, TILE, UNIT, is_count, is_length, known, normal_offset


@dataclass(frozen=True, eq=False)
class Grid:
    """Tiles of `tile` queries x units of `unit` keys, and the positions of both.

    Query i has position `i + q_offset`, key j position j. Estimators, budgets and lists that take the same
    grid treat chunks of a prompt (`q_offset`), padding and ragged ends in the same way.

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
        Whether keys after a query's position are hidden from it.
    q_keep, k_keep : Tensor, optional
        bool `[B|1, Tq]` and `[B|1, Tk]`, True = a real token. Estimates ignore padding: a unit of padding is
        out of reach, no query sees a padded key, a padded query sees nothing.
    device : optional
        Device of `reach` and `near`, if none of the arguments above is a tensor.

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
        require((isinstance(self.causal, bool), lambda: f"causal={self.causal!r}: expected True or False"))
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

    def reach(self, *, q_order: Tensor | None = None, k_order: Tensor | None = None) -> Tensor:
        """Whether some query of the tile may see some key of the unit.

        With orders (as in `Plan`: int `[B|1, H|1, rows]`, `order[row] = token`, -1 is no token), tiles and
        units consist of rows.

        Returns
        -------
        Tensor, bool [B|1, H|1, R, C]
            H is 1 unless an order has more heads.
        """
        device = next((x.device for x in (q_order, k_order) if x is not None), self._place())
        return self._reach(self._tiles(self.tile, q_order, device), self._units(self.unit, k_order, device))

    def near(self, sink: int = 0, local: int = 1) -> Tensor:
        """Mask of units that are kept whatever their scores: sink units, and units around the tile.

        Parameters
        ----------
        sink : int
            Number of sink units, counted from the first unit with a real key.
        local : int
            1: the tile's own units, which hold its positions (several if tiles are longer than units or cross
            their edges); n: also the n - 1 units before them and, if the grid is not causal, as many after;
            0: none.

        Returns
        -------
        Tensor, bool [B|1, 1, R, C]
            Within `reach`.
        """
        for name, n in (("sink", sink), ("local", local)):
            require((is_count(n), lambda: f"{name}={n!r}: expected a count of units >= 0"))
        device = self._place()
        q, k = self._tiles(self.tile, None, device), self._units(self.unit, None, device)
        unit = torch.arange(self.units, device=device)
        near = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        if sink and self.units:
            begin = torch.where(k.high >= 0, unit, FAR).amin(-1, keepdim=True)
            near = near | (unit < begin + sink)[:, :, None, :]
        if local:
            first, last = (torch.div(x, self.unit, rounding_mode="floor")[..., None] for x in (q.low, q.high))
            behind = 0 if self.causal else local - 1
            near = near | ((unit >= first - (local - 1)) & (unit <= last + behind))
        return near & self._reach(q, k)

    def ended(self, keep: Tensor, tiles: int) -> Tensor:
        """Add to `keep` everything in reach of the last `tiles` tiles, where a prompt's question is.

        Parameters
        ----------
        keep : Tensor
            bool `[B|1, H|1, R, C]`.
        tiles : int
            Number of tiles, counted back from the last tile with a real query.

        Examples
        --------
        >>> import torch
        >>> from sparseflash.selection import Grid
        >>> grid = Grid(4, 4, tile=2, unit=2)
        >>> grid.ended(torch.zeros(1, 1, 2, 2, dtype=torch.bool), 1).int().tolist()
        [[[[0, 0], [1, 1]]]]
        """
        check_mask("keep", keep)
        require((is_count(tiles), lambda: f"tiles={tiles!r}: expected a count >= 0"))
        if not tiles:
            return keep
        reach = self.reach().to(keep.device)
        number = torch.arange(self.tiles, device=keep.device)
        real = torch.where(reach.any(-1), number, -1).amax(-1, keepdim=True) if self.tiles else number
        return keep | (reach & (number > real - tiles)[..., None])

    def plan(
        self,
        keep: Tensor,
        *,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
        capacity: int | None = None,
    ) -> Plan:
        """Make the plan of the units that each tile keeps, within `reach`; causality masks single elements.

        Parameters
        ----------
        keep : Tensor
            bool `[B|1, H|1, R, C]`, True = attends. H is any divisor of the query heads.
        q_order, k_order : Tensor, optional
            Integers `[B|1, H|1, rows]`: tiles and units then consist of rows, as in `Plan`.
        capacity : int, optional
            Most units of a tile: shapes then depend on no value (on accelerators the default is all units);
            units beyond it are dropped and `plan.overflow` is set.

        Examples
        --------
        >>> import torch
        >>> from sparseflash.selection import Grid
        >>> grid = Grid(2, 4, tile=1, unit=2, q_offset=2)
        >>> grid.plan(torch.ones(1, 1, 2, 2, dtype=torch.bool)).to_dense()[0, 0].int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
        """
        check_mask("keep", keep)
        return Plan.from_blocks(
            keep,
            Tq=self.Tq,
            Tk=self.Tk,
            tile=self.tile,
            unit=self.unit,
            causal=self.causal,
            q_offset=_to(self.q_offset if self.causal else 0, keep.device),
            q_order=_without(q_order, self.q_keep, keep.device),
            k_order=_without(k_order, self.k_keep, keep.device),
            capacity=capacity,
        )

    def ends(self, group: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Last position of each group of queries, first of each block of keys, int64 `[B|1, n]` each.

        Only real tokens count; a group without one ends at -2^40, a block without one begins at 2^40.
        """
        q, k = self._tiles(group, None, device), self._units(block, None, device)
        return q.high[:, 0], k.low[:, 0]

    def _reach(self, q: Extremes, k: Extremes) -> Tensor:
        some = (q.high[..., None] > -FAR) & (k.high[..., None, :] > -FAR)
        return some & (k.low[..., None, :] <= q.high[..., None]) if self.causal else some

    def _tiles(self, size: int, order: Tensor | None, device: torch.device) -> Extremes:
        order = _without(order, self.q_keep, device)
        return extremes(
            self.Tq,
            _within(size, rows_of(self.Tq, order)),
            order=order,
            offset=_to(self.q_offset, device),
            device=device,
        )

    def _units(self, size: int, order: Tensor | None, device: torch.device) -> Extremes:
        order = _without(order, self.k_keep, device)
        return extremes(self.Tk, _within(size, rows_of(self.Tk, order)), order=order, device=device)


def _within(size: int, rows: int) -> int:
    """Clamp a tile or unit size to the number of rows, if that is concrete, to avoid padding."""
    return min(size, max(1, rows)) if known(rows) else size


def _without(order: Tensor | None, keep: Tensor | None, device: torch.device) -> Tensor | None:
    """Empty the lanes of padding tokens in an order of rows (None: the identity)."""
    if keep is None:
        return order
    keep = keep.to(device)[:, None]
    if order is None:
        token = torch.arange(keep.shape[-1], device=device, dtype=torch.int32)
        return torch.where(keep, token, -1)
    batch, heads = max(len(order), len(keep)), order.shape[1]
    order = order.expand(batch, -1, -1)
    real = keep.expand(batch, heads, -1).gather(-1, order.long().clamp(min=0))
    return torch.where(real, order, -1)


def check_mask(name: str, x: object) -> None:
    """Check that a selection of units is a bool tensor; `Plan.from_blocks` checks its shape."""
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        given = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise PlanError(f"{name}: {given}; expected bool [B|1, H|1, tiles, units], True = attends")


def _to(x: int | Tensor, device: torch.device) -> int | Tensor:
    return x.to(device) if isinstance(x, Tensor) else x


def check_keep(name: str, keep: object, T: int, batch: int | None = None) -> None:
    """Check a padding mask: None, or bool [B|1, T]."""
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
