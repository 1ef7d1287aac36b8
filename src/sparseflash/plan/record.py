"""`Record`: the fields of a plan, and properties that follow from their shapes; the base class of `Plan`.

`Plan` adds constructors and methods. The functions of this package take and return records, so that they do
not depend on `Plan`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .lists import Bits, Lists, Spans, Units
from .options import TILE, UNIT, Window, joint, multiple
from .rules import Rules

FLAT = frozenset(("spans", "index", "bits", "q_offset", "overflow"))
"""Tensors that are not laid out by batch and head."""
LISTS = ("span_start", "span_full", "span_count", "start", "full", "count", "bits_start")
_LISTED = frozenset((*LISTS, "spans", "index", "bits", "tile", "unit", "q_order", "k_order", "Tq", "Tk"))
_FORGOTTEN = {"span_keys": None, "unit_keys": None, "span_room": 0, "room": 0}


@dataclass(frozen=True)
class KeyLists:
    """The transpose of a plan's lists: for each group of keys, the query tiles that visit it.

    Entries of group c of (batch, head) are `start` to `start + count - 1`; the first `full` of them need no
    element test. Entry n names the query tiles `index[n]` to `until[n] - 1`; for units `until` is None, and
    entry n names tile `index[n]` alone. `source[n]` is the forward entry it comes from: for spans its place
    in the list of each of these tiles, for units its slot in the pool `Plan.index`.
    """

    start: Tensor
    count: Tensor
    full: Tensor
    index: Tensor
    source: Tensor
    until: Tensor | None
    group: int


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """The fields of a plan, as `Plan` describes them."""

    Tq: int
    Tk: int
    tile: int = TILE
    unit: int = UNIT
    causal: bool = False
    include_self: bool = True
    window: Window | None = None
    sink: int = 0
    q_offset: int | Tensor = 0
    span_start: Tensor | None = None
    span_full: Tensor | None = None
    span_count: Tensor | None = None
    spans: Tensor | None = None
    start: Tensor | None = None
    full: Tensor | None = None
    count: Tensor | None = None
    index: Tensor | None = None
    bits: Tensor | None = None
    bits_start: Tensor | None = None
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    k_end: Tensor | None = None
    q_seg: Tensor | None = None
    k_seg: Tensor | None = None
    head_window: Tensor | None = None
    head_sink: Tensor | None = None
    overflow: Tensor | None = None
    span_keys: KeyLists | None = None
    unit_keys: KeyLists | None = None
    span_room: int = dataclasses.field(default=0, init=False, compare=False)
    room: int = dataclasses.field(default=0, init=False, compare=False)
    # Fixed-capacity lists, set by the library's constructors (0: compact lists): list n owns the slots
    # [n * room, (n + 1) * room) of its pool, and unused slots are empty. Code that sees only shapes (CUDA
    # graphs, compilers) can so iterate over the lists. `_changed` resets both when lists change.
    of_inference: ClassVar[bool] = False
    """Whether some tensor was made under `torch.inference_mode()`: autograd refuses to save it. `_told` sets
    it when the record is made, because a compiler cannot trace the query."""

    def _told(self, inherited: bool = False) -> Self:
        """Set `of_inference`: by asking the tensors, or, while compiling, `inherited` from another record."""
        if torch.compiler.is_compiling():
            known = inherited
        else:
            given = [x for x in vars(self).values() if x is not None and isinstance(x, Tensor)]
            known = any(x.is_inference() for x in given)
        if known:
            object.__setattr__(self, "of_inference", True)
        return self

    @classmethod
    def _made(cls, **fields: Any) -> Self:
        """Build a record from fields that the library computed, without checks."""
        made = object.__new__(cls)
        vars(made).update(_DEFAULTS)
        vars(made).update(fields)
        return made._told()

    def _changed(self, **fields: Any) -> Self:
        """Copy the record with other field values that the library computed, without checks.

        If lists change, the transposed lists and the fixed capacities derived from them are dropped.
        """
        own = {n: x for n, x in vars(self).items() if n in _DEFAULTS}
        made = object.__new__(type(self))
        vars(made).update(own)
        if not _LISTED.isdisjoint(fields):
            vars(made).update(_FORGOTTEN)
        vars(made).update(fields)
        return made._told(self.of_inference)

    @property
    def q_rows(self) -> int:
        """Query rows, padded and dropped lanes counted: the length of `q_order`, or Tq."""
        return self.Tq if self.q_order is None else self.q_order.shape[-1]

    @property
    def k_rows(self) -> int:
        """Key rows: the length of `k_order`, or Tk."""
        return self.Tk if self.k_order is None else self.k_order.shape[-1]

    @property
    def tiles(self) -> int:
        """Number R of query tiles."""
        return -(-self.q_rows // self.tile)

    @property
    def span_lists(self) -> Spans | None:
        """The span lists as one object, or None."""
        start, full, count, pool = self.span_start, self.span_full, self.span_count, self.spans
        if start is None or full is None or count is None or pool is None:
            return None
        return Spans(start, full, count, pool, self.span_room)

    @property
    def unit_lists(self) -> Units | None:
        """The unit lists as one object, or None."""
        start, full, count, pool = self.start, self.full, self.count, self.index
        if start is None or full is None or count is None or pool is None:
            return None
        bits = None if self.bits is None or self.bits_start is None else Bits(self.bits, self.bits_start)
        return Units(start, full, count, pool, self.room, self.unit, self.k_rows, bits)

    def lists(self) -> tuple[Lists, ...]:
        """The present lists, spans before units; at least one kind is present."""
        return tuple(x for x in (self.span_lists, self.unit_lists) if x is not None)

    @property
    def rules(self) -> Rules:
        """The rules that a listed pair must satisfy, as one object."""
        found: Rules | None = getattr(self, "_rules", None)
        if found is None:  # cached: set algebra reads it many times
            found = Rules(**{name: getattr(self, name) for name in _RULES})
            object.__setattr__(self, "_rules", found)
        return found

    @property
    def device(self) -> torch.device:
        """Device of the plan's tensors."""
        lists = self.span_start if self.span_start is not None else self.start
        assert lists is not None  # every plan has one of the two
        return lists.device

    def tensors(self) -> dict[str, Tensor]:
        """The plan's own tensors by field name (derived data not included)."""
        own = vars(self).items()  # a fast path: every attention call runs it
        return {n: x for n, x in own if x is not None and n in _DEFAULTS and isinstance(x, Tensor)}

    def extent(self) -> tuple[int, int]:
        """Return the smallest (batch, heads) that all tensors of the plan broadcast to."""
        found: tuple[int, int] | None = getattr(self, "_extent", None)
        if found is None:  # cached: every attention call runs it
            laid = [x for n, x in self.tensors().items() if n not in FLAT]
            sizes = [x.shape[0] for x in laid]
            if isinstance(self.q_offset, Tensor) and self.q_offset.dim():
                sizes.append(self.q_offset.shape[0])
            batch = joint(sizes)
            assert batch is not None  # guaranteed by `requirements.faults`
            found = batch, multiple(*[x.shape[1] for x in laid])
            object.__setattr__(self, "_extent", found)
        return found


_RULES = tuple(f.name for f in dataclasses.fields(Rules))
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Record)}
