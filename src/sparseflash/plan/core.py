"""`Plan`: which keys each tile of queries sees. The one object between a method and a kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import PlanError, require
from . import build, caches, documents, intervals, listed, masks, sparse
from .build import TILE, UNIT, Window

ANY = -1
"""Segment label that matches every segment."""
NONE = -2
"""Segment label of a lane that is no real token (padding)."""


@dataclass(frozen=True)
class KeyLists:
    """The transpose of a plan's lists: for each group of keys, the query tiles that visit it.

    Entries of group c of (batch, head) are `start` to `start + count - 1`; the first `full` of them need no
    element test. Entry n names the query tiles `index[n]` to `until[n] - 1`; units have no `until`: there it
    is tile `index[n]` alone. `source[n]` says where it comes from: for spans the place in the list of each of
    these tiles, for units the number of the list entry.
    """

    start: Tensor
    count: Tensor
    full: Tensor
    index: Tensor
    source: Tensor
    until: Tensor | None
    group: int


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which keys each tile of queries sees, in one softmax: contiguous spans and gathered units, then rules.

    Build one with a constructor (`dense`, `from_keep`, `from_buckets`, `from_mask`, ...) or from
    the lists themselves. A query sees a key when an entry of its tile's lists covers the key and every rule
    that is set holds (`docs/design.md` has the formula). Tensors are int32, the three `start`s int64; a batch
    axis is B or 1, a head axis any divisor of the number of query heads (list head = `hq * H // Hq`).
    Out-of-range values are refused where they can be seen, in CPU tensors; `check` looks deeper, anywhere.

    Parameters
    ----------
    Tq, Tk : int
        Numbers of query and key tokens.
    tile, unit : int
        Consecutive rows that share one list; consecutive keys that one `index` entry names.
    span_start, span_full, span_count : Tensor, [B, H, R]
        Where a tile's ranges begin in `spans`, how many need no element test, how many there are.
    spans : Tensor, [Ns, 2] int32
        Key ranges `[lo, hi)` in row space.
    start, full, count : Tensor, [B, H, R]
        The same for gathered units.
    index : Tensor, [Nu] int32
        Unit numbers: unit u holds key rows `u * unit ... u * unit + unit - 1`.
    bits, bits_start : Tensor
        `[Nb, tile, ceil(unit / 32)]` int32 words of the partial units of a tile, in list order from
        `bits_start [B, H, R]`.
    q_order, k_order : Tensor, [B, H, rows] int32
        Token of each row; -1 is an empty lane. Injective. None: rows are tokens.
    q_offset : int or Tensor
        Position of the first query (0-d or [B] int32 tensor); used where `q_pos` is None.
    causal, include_self : bool
        Keep `q_pos >= k_pos` (`>` without `include_self`; without `causal`, `!=`).
    window : (left, right) or None
        Inclusive distances, None = unbounded: keep `q_pos - left <= k_pos <= q_pos + right`.
    sink : int
        Keys at positions below it are exempt from the window (only).
    head_window, head_sink : Tensor, [1, H, 2] and [1, H, 1] int32
        Window (left, right; -1 = unbounded) and sink of each head; made of a `window` or `sink` that holds
        tensors [H].
    overflow : Tensor, int32
        Not 0 when lists of a static capacity did not hold all entries (`check` says so).
    q_pos, k_pos, k_end, q_seg, k_seg : Tensor, [B, H, T] int32, token space
        Positions, key expiry (a key is seen by `q_pos < k_end`), segments (`ANY` matches all, `NONE` is
        padding).

    Examples
    --------
    >>> import sparseflash as sf
    >>> plan = sf.Plan.dense(512, 512, causal=True, window=(127, 0), sink_tokens=4)
    >>> round(plan.density, 3)
    1.0
    """

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

    def __post_init__(self) -> None:
        window, sink, head_window, head_sink = build.head_rules(self.window, self.sink)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "sink", sink)
        if head_window is not None:
            object.__setattr__(self, "head_window", head_window)
            object.__setattr__(self, "head_sink", head_sink)
        object.__setattr__(self, "q_offset", build.normal_offset(self.q_offset))
        for holds, message in _rules(self):
            require((holds, message), error=PlanError)
        if all(build.host(x) for x in self.tensors().values()):
            from .checks import check_values

            check_values(self)

    @classmethod
    def _made(cls, **fields: Any) -> Plan:
        """A plan whose fields the library made itself: nothing is left to check."""
        plan = object.__new__(cls)
        for name, default in _DEFAULTS.items():
            object.__setattr__(plan, name, fields.get(name, default))
        return plan

    # ---------------------------------------------------------------- constructors

    @classmethod
    def dense(
        cls,
        Tq: int,
        Tk: int,
        *,
        causal: bool = False,
        window: Window | None = None,
        sink_tokens: int = 0,
        q_offset: int | Tensor = 0,
        tile: int = TILE,
        unit: int = UNIT,
        device: torch.device | str | None = None,
    ) -> Plan:
        """Every key within the rules: dense, causal, sliding window, with attention sinks. O(R) memory.

        Parameters
        ----------
        Tq, Tk : int
            Numbers of query and key tokens; with `causal`, query i sits at position `i + q_offset`.
        window : (left, right), optional
            Inclusive distances; None (or -1) on a side is unbounded.
        sink_tokens : int
            The first keys, exempt from the window.

        Examples
        --------
        >>> import sparseflash as sf
        >>> sf.Plan.dense(4, 4, causal=True).to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
        """
        return cls._made(
            **build.dense(
                Tq,
                Tk,
                causal=causal,
                window=window,
                sink_tokens=sink_tokens,
                q_offset=q_offset,
                tile=tile,
                unit=unit,
                device=device,
            )
        )

    @classmethod
    def from_keep(
        cls,
        q_keep: Tensor,
        k_keep: Tensor,
        *,
        causal: bool = True,
        include_self: bool = True,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Plan:
        """Drop any queries and keys, per head (QK-sparse; SCFA, arXiv 2306.01160).

        `q_keep [B|1, H|1, Tq]`, `k_keep [B|1, H|1, Tk]`: bool or uint8, True = kept. Causality is that of the
        original token order. Kept counts may differ from head to head; nothing is padded to the longest.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> keep = torch.tensor([[[True, False, True]]])
        >>> sf.Plan.from_keep(keep, keep).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
        """
        return cls._made(
            **build.from_keep(q_keep, k_keep, causal=causal, include_self=include_self, tile=tile, unit=unit)
        )

    @classmethod
    def from_buckets(
        cls,
        q_bucket: Tensor,
        k_bucket: Tensor,
        *,
        causal: bool = True,
        include_self: bool = True,
        tile: int = TILE,
        unit: int = UNIT,
        buckets: int | None = None,
    ) -> Plan:
        """Queries see the keys of their bucket, per head (hash-sparse; SCFA, arXiv 2306.01160).

        `q_bucket [B|1, H|1, Tq]`, `k_bucket [B|1, H|1, Tk]`: any integer ids. Every pair of equal ids is
        attended (coverage 1). Tiles end at bucket edges and ranges are exact in (bucket, position).
        `buckets` bounds the number of distinct ids, so that no value has to reach the host (accelerators).

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> bucket = torch.tensor([[[7, 3, 7]]])
        >>> sf.Plan.from_buckets(bucket, bucket).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
        """
        return cls._made(
            **build.from_buckets(
                q_bucket,
                k_bucket,
                causal=causal,
                include_self=include_self,
                tile=tile,
                unit=unit,
                buckets=buckets,
            )
        )

    @classmethod
    def from_documents(
        cls,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        Tq: int | None = None,
        Tk: int | None = None,
        causal: bool = True,
        include_self: bool = True,
        window: Window | None = None,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Plan:
        """Packed documents: tokens attend inside their own. `cu_seqlens [n+1]`: running totals, from 0.

        Tiles end at document edges, so nothing (not even a NaN) crosses from one document into another.

        Parameters
        ----------
        cu_seqlens, cu_seqlens_k : Tensor
            Integers `[n+1]`: document i holds queries `cu_seqlens[i]` to `cu_seqlens[i+1] - 1`, and the keys
            that `cu_seqlens_k` says (the same by default). Documents may be empty. With other lengths of keys
            than of queries, the last query of a document sits at the position of its last key.
        Tq, Tk : int, optional
            Tokens of the tensors, where they hold more than the documents (the rest sees nothing). On an
            accelerator: say them, and no value has to reach the host.
        causal, include_self, window
            As in `Plan`; distances are counted inside the document.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> sf.Plan.from_documents(torch.tensor([0, 1, 3])).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
        >>> edges, edges_k = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 4])
        >>> sf.Plan.from_documents(edges, edges_k).to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        """
        return cls._made(
            **documents.from_documents(
                cu_seqlens,
                cu_seqlens_k,
                Tq=Tq,
                Tk=Tk,
                causal=causal,
                include_self=include_self,
                window=window,
                tile=tile,
                unit=unit,
            )
        )

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        Tq: int | None = None,
        Tk: int | None = None,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Plan:
        """Any bool mask, True = attends: what `scaled_dot_product_attention` takes. Empty tiles cost nothing.

        The mask is read once. Full tiles become ranges, mixed ones keep their bits (arXiv 2409.15097).

        Parameters
        ----------
        mask : Tensor
            Bool `[B|1, H|1, Tq, Tk]`, `[H, Tq, Tk]` or `[Tq, Tk]`.
        Tq, Tk : int, optional
            Numbers of tokens where the mask's axis has size 1 and stands for all: with `Tq`, a mask
            `[B, 1, 1, Tk]` of the keys that are no padding.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> mask = torch.rand(1, 2, 100, 100) < 0.3
        >>> bool((sf.Plan.from_mask(mask).to_dense() == mask).all())
        True
        """
        return cls._made(**masks.from_mask(mask, Tq=Tq, Tk=Tk, tile=tile, unit=unit))

    @classmethod
    def from_sparse(cls, mask: Any, *, tile: int = TILE, unit: int = UNIT) -> Plan:
        """The pairs that a sparse matrix stores; nothing of size Tq x Tk is made. O(n log n) of n pairs.

        `mask` is a SciPy sparse matrix `[Tq, Tk]`, or a sparse tensor (COO, CSR, CSC) of that shape, or COO
        of shape `[B|1, H|1, Tq, Tk]`. Stored zeros are no pairs, whatever else is stored is one.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> mask = torch.eye(3).flip(0).to_sparse()
        >>> sf.Plan.from_sparse(mask).to_dense()[0, 0].int().tolist()
        [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
        """
        return cls._made(**sparse.from_sparse(mask, tile=tile, unit=unit))

    @classmethod
    def from_intervals(
        cls, lo: Tensor | None, hi: Tensor, *, Tk: int, tile: int = TILE, unit: int = UNIT
    ) -> Plan:
        """Each query sees keys `lo ... hi - 1`: any mask whose rows are a few ranges, without the mask.

        Parameters
        ----------
        lo, hi : Tensor
            Integers `[B|1, H|1, Tq]`, or `[B|1, H|1, Tq, m]` for m ranges a query (they may overlap; `hi <=
            lo` is empty). `lo` of None begins at key 0 and needs no bits: a prefix of every query's own.
        Tk : int
            Number of keys.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> lo, hi = torch.tensor([[[0, 1, 0]]]), torch.tensor([[[2, 3, 0]]])
        >>> sf.Plan.from_intervals(lo, hi, Tk=4).to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
        """
        return cls._made(**intervals.from_intervals(lo, hi, Tk=Tk, tile=tile, unit=unit))

    @classmethod
    def from_expiry(
        cls,
        k_end: Tensor,
        *,
        Tq: int | None = None,
        q_offset: int | Tensor = 0,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Plan:
        """Key j is seen from position j up to, not including, position `k_end[j]`: caches that evict, trees.

        Parameters
        ----------
        k_end : Tensor
            Integers `[B|1, H|1, Tk]`. Tokens of a tree in depth-first order expire where their subtree ends.
        Tq, q_offset
            Number of queries (Tk by default) and position of the first.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> sf.Plan.from_expiry(torch.tensor([[[3, 2, 3]]])).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
        """
        return cls._made(**intervals.from_expiry(k_end, Tq=Tq, q_offset=q_offset, tile=tile, unit=unit))

    @classmethod
    def from_blocks(
        cls,
        keep_blocks: Tensor,
        *,
        Tq: int,
        Tk: int,
        tile: int = TILE,
        unit: int = UNIT,
        causal: bool = False,
        capacity: int | None = None,
    ) -> Plan:
        """Blocks of `tile` queries x `unit` keys, True = attends.

        `keep_blocks` is bool `[B|1, H|1, ceil(Tq/tile), ceil(Tk/unit)]`.
        With `causal` (queries at positions 0, 1, ...), blocks in the future are left out and those on the
        diagonal masked. `capacity` bounds the blocks of a tile, so that shapes do not depend on values (the
        default on accelerators is no bound); blocks beyond it are dropped and `overflow` is set.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> blocks = torch.eye(4, dtype=torch.bool)[None, None]
        >>> sf.Plan.from_blocks(blocks, Tq=512, Tk=512).work
        0.25
        """
        return cls._made(
            **listed.from_blocks(
                keep_blocks, Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=causal, capacity=capacity
            )
        )

    @classmethod
    def from_keys(
        cls,
        index: Tensor,
        *,
        Tq: int,
        Tk: int,
        tile: int = 1,
        unit: int = 1,
        causal: bool = False,
        unique: bool = False,
        capacity: int | None = None,
    ) -> Plan:
        """Keys (or units of keys) listed for each tile: integers `[B|1, H|1, ceil(Tq/tile), n]`, -1 = none.

        Say `unique=True` where no list names a key twice; otherwise doubles are dropped.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> index = torch.tensor([[[[0, 3], [2, -1]]]])
        >>> sf.Plan.from_keys(index, Tq=2, Tk=4).to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 1], [0, 0, 1, 0]]
        """
        return cls._made(
            **listed.from_keys(
                index, Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=causal, unique=unique, capacity=capacity
            )
        )

    @classmethod
    def from_spans(
        cls, spans: Tensor, *, Tq: int, Tk: int, tile: int = TILE, unit: int = UNIT, causal: bool = False
    ) -> Plan:
        """Key ranges `[lo, hi)` of each tile: integers `[B|1, H|1, ceil(Tq/tile), m, 2]`, lo = hi is empty.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> spans = torch.tensor([[[[[0, 2], [5, 6]]]]])
        >>> sf.Plan.from_spans(spans, Tq=1, Tk=6).to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 0, 0, 1]]
        """
        return cls._made(**listed.from_spans(spans, Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=causal))

    @classmethod
    def from_lengths(cls, lengths: Tensor, *, Tk: int, Tq: int = 1) -> Plan:
        """The last Tq queries of each sequence over a cache whose first `lengths` keys are in use.

        Query i of sequence b sits at position `lengths[b] - Tq + i` and sees the keys up to there; where that
        is negative, none.

        Parameters
        ----------
        lengths : Tensor
            Integers `[B]` (or `[1]` for all sequences), 0 to Tk.
        Tk, Tq : int
            Keys that the cache has room for; queries.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> sf.Plan.from_lengths(torch.tensor([3, 1]), Tk=4).to_dense()[:, 0, 0].int().tolist()
        [[1, 1, 1, 0], [1, 0, 0, 0]]
        """
        return cls._made(**caches.from_lengths(lengths, Tk=Tk, Tq=Tq))

    @classmethod
    def from_pages(
        cls, block_table: Tensor, lengths: Tensor, *, page_size: int, Tk: int, Tq: int = 1
    ) -> Plan:
        """The last Tq queries of each sequence over a paged cache: k and v are one pool, of batch size 1.

        A cache `[pages, page_size, Hkv, D]` is the pool `cache.view(1, -1, Hkv, D).transpose(1, 2)`, without
        a copy. Sequences may share pages where they begin alike (a page stands at one place in all of them).

        Parameters
        ----------
        block_table : Tensor
            Integers `[B, n]`: the pages of each sequence, in order; anything beyond its length.
        lengths : Tensor
            Integers `[B]`: keys in use.
        page_size, Tk, Tq : int
            Keys of a page; keys of the whole pool; queries of a sequence, its last ones.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> table = torch.tensor([[2, 0], [1, -1]])
        >>> plan = sf.Plan.from_pages(table, torch.tensor([3, 2]), page_size=2, Tk=6)
        >>> plan.to_dense()[:, 0, 0].int().tolist()
        [[1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
        """
        return cls._made(**caches.from_pages(block_table, lengths, page_size=page_size, Tk=Tk, Tq=Tq))

    @classmethod
    def from_block_mask(cls, block_mask: Any) -> Plan:
        """A FlexAttention `BlockMask`; its mask function is evaluated on its partial blocks only."""
        from . import flex

        return cls._made(**flex.from_block_mask(block_mask))

    def to_block_mask(self, block: int = 128) -> Any:
        """The plan as a FlexAttention `BlockMask` (plans without row orders)."""
        from . import flex

        return flex.to_block_mask(self, block)

    # ---------------------------------------------------------------- algebra

    def retile(self, tile: int, unit: int | None = None) -> Plan:
        """The same visible set with other tiles and units, exactly.

        Examples
        --------
        >>> import sparseflash as sf
        >>> plan = sf.Plan.dense(300, 300, causal=True)
        >>> bool((plan.retile(64, 16).to_dense() == plan.to_dense()).all())
        True
        """
        from . import algebra

        return algebra.retile(self, tile, self.unit if unit is None else unit)

    def reordered(self) -> Plan:
        """The same visible set with its tokens in another order, where that visits less. Needs SciPy.

        Reverse Cuthill-McKee brings the pairs of a scattered mask close to a diagonal. Results do not change,
        only the tiles they are computed in; a plan that would gain nothing is returned as it is. Work and
        memory follow the visible pairs, so make it once, on the host, and use it in all layers and steps.

        Source: Sharma and Geiping, arXiv 2409.15097, section on extremely sparse masks.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> token = torch.randperm(1024)
        >>> band = (token[:, None] - token).abs() < 8
        >>> plan = sf.Plan.from_mask(band)
        >>> plan.work, plan.reordered().work < 0.4  # doctest: +SKIP
        (1.0, True)
        """
        from . import reorder

        return reorder.reordered(self)

    def __and__(self, other: Plan) -> Plan:
        """Pairs that both plans let see, exactly."""
        both: Plan = self._with(other, "intersect")
        return both

    def __sub__(self, other: Plan) -> Plan:
        """Pairs of this plan that the other does not have, exactly."""
        rest: Plan = self._with(other, "subtract")
        return rest

    def __or__(self, other: Plan) -> Plan | tuple[Plan, Plan]:
        """Pairs of either plan: one plan where one holds the other, else two disjoint ones (one softmax)."""
        union: Plan | tuple[Plan, Plan] = self._with(other, "unite")
        return union

    def _with(self, other: Any, operation: str) -> Any:
        if not isinstance(other, Plan):
            given = "a tuple of plans" if isinstance(other, tuple) else f"a {type(other).__name__}"
            raise PlanError(
                f"a plan combines with a plan, not with {given}: combine the plans of a tuple one by one"
            )
        from . import algebra

        return getattr(algebra, operation)(self, other)

    def explain(self) -> str:
        """Rows, tiles, entries, density, work and memory, in words. Synchronises.

        Examples
        --------
        >>> import sparseflash as sf
        >>> print(sf.Plan.dense(256, 256, causal=True).explain().splitlines()[0])
        256 queries x 256 keys, 1 list of 2 tiles (128 rows each)
        """
        from .draw import explain

        return explain(self)

    # ---------------------------------------------------------------- shape and identity

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
    def device(self) -> torch.device:
        """Where the plan's tensors live."""
        lists = self.span_start if self.span_start is not None else self.start
        assert lists is not None  # one of the two is always there
        return lists.device

    def tensors(self) -> dict[str, Tensor]:
        """The plan's own tensors by field name (derived data not included)."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: x for name, x in fields if isinstance(x, Tensor)}

    def extent(self) -> tuple[int, int]:
        """(batch, heads) of the plan: the smallest that all its tensors broadcast to."""
        found: tuple[int, int] | None = getattr(self, "_extent", None)
        if found is None:  # every call of attention asks
            laid = [x for n, x in self.tensors().items() if n not in _FLAT]
            sizes = {x.shape[0] for x in laid}
            if isinstance(self.q_offset, Tensor) and self.q_offset.dim():
                sizes.add(self.q_offset.shape[0])
            found = next((n for n in sizes if n != 1), 1), math.lcm(*[x.shape[1] for x in laid])
            object.__setattr__(self, "_extent", found)
        return found

    def _static(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return tuple(type(v).__name__ if isinstance(v, (Tensor, KeyLists)) else v for v in values)

    def __hash__(self) -> int:
        return hash(self._static())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan) or self._static() != other._static():
            return False
        mine, theirs = self.tensors(), other.tensors()
        return self.device == other.device and all(torch.equal(x, theirs[n]) for n, x in mine.items())

    def __repr__(self) -> str:
        said = [f"Tq={self.Tq}", f"Tk={self.Tk}", f"tile={self.tile}", f"unit={self.unit}"]
        said += [n for n in ("causal",) if getattr(self, n)]
        said += [f"include_self={self.include_self}"] if not self.include_self else []
        said += [f"window={self.window}"] if self.window else []
        said += [f"sink={self.sink}"] if self.sink else []
        said += [f"{n}{list(x.shape)}" for n, x in self.tensors().items() if n not in ("span_full", "full")]
        return f"Plan({', '.join(said)})"

    def __str__(self) -> str:
        from .draw import draw

        return draw(self)

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0, size: int = 128) -> Path:
        """Write a picture of one head: which cells all pairs of are visible, some, or none. Needs matplotlib.

        Parameters
        ----------
        path : str or Path
            A .png, .svg or .pdf file.
        size : int
            Cells along each side, at most; a cell of more than 16 x 16 pairs is sampled.

        Examples
        --------
        >>> import sparseflash as sf, tempfile, pathlib
        >>> plan = sf.Plan.dense(256, 256, causal=True, window=(63, 0))
        >>> plan.plot(pathlib.Path(tempfile.mkdtemp()) / "window.png").name
        'window.png'
        """
        from .draw import plot

        return plot(self, path, batch=batch, head=head, size=size)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        moved: Plan = pytree.tree_map_only(Tensor, lambda x: x.to(device), self)
        return moved

    # ---------------------------------------------------------------- figures

    @property
    def density(self) -> float:
        """Visible pairs over those of the dense plan with the same causal and window rules. Synchronises."""
        from .figures import dense_pairs, visible_pairs

        allowed = dense_pairs(self)
        return visible_pairs(self) / allowed if allowed else 1.0

    @property
    def work(self) -> float:
        """Visited area (tile rows x listed keys) over Tq x Tk. Synchronises."""
        from .figures import visited_area

        batch, heads = self.extent()
        area = self.Tq * self.Tk * batch * heads
        return visited_area(self) / area if area else 0.0

    def to_dense(self) -> Tensor:
        """The mask, bool `[B, H, Tq, Tk]` in token space. For tests and pictures: materialises Tq x Tk."""
        from .lists import to_dense

        return to_dense(self)

    def check(self) -> Plan:
        """Validate the values (ranges, uniqueness, disjointness, orders, full entries); returns the plan.

        Raises
        ------
        PlanError
            Naming the first violated rule, where it was found and how to mend it.
        """
        from .checks import check

        check(self)
        return self

    def prepare(self, *, backward: bool = True, device: torch.device | str | None = None) -> Plan:
        """The plan with its transposed key lists attached, made once, reused by all layers and steps."""
        from .transpose import transpose_spans, transpose_units

        plan = self if device is None else self.to(device)
        if not backward or plan.span_keys is not None or plan.unit_keys is not None:
            return plan
        fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
        fields["span_keys"] = transpose_spans(plan) if plan.spans is not None else None
        fields["unit_keys"] = transpose_units(plan) if plan.index is not None else None
        return Plan._made(**fields)


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Plan)}
_FLAT = {"spans", "index", "bits", "q_offset", "overflow"}
_LISTS = ("span_start", "span_full", "span_count", "start", "full", "count", "bits_start")
_ORDERS = ("q_order", "k_order")
_TOKENS = {"q_pos": "Tq", "q_seg": "Tq", "k_pos": "Tk", "k_end": "Tk", "k_seg": "Tk"}
_HEADS = {"head_window": 2, "head_sink": 1}
_TENSORS = ("spans", "index", "bits", "overflow", *_LISTS, *_ORDERS, *_TOKENS, *_HEADS)
_INT64 = {"span_start", "start", "bits_start"}


def _rules(p: Plan) -> Iterator[tuple[bool, str]]:
    """Table of (condition, message): types, shapes, dtypes and devices; values come after."""
    for name in ("Tq", "Tk"):
        yield (
            build.is_length(getattr(p, name)),
            f"{name}={getattr(p, name)!r}: expected an int >= 0 of 32 bits",
        )
    for name in ("tile", "unit"):
        fits = build.is_length(getattr(p, name), 1)
        yield fits, f"{name}={getattr(p, name)!r}: expected a positive int of 32 bits"
    for name in ("causal", "include_self"):
        yield isinstance(getattr(p, name), bool), f"{name}={getattr(p, name)!r}: expected True or False"
    yield build.is_count(p.sink), f"sink={p.sink!r}: expected an int >= 0"
    for name in _TENSORS:
        x = getattr(p, name)
        yield (
            x is None or isinstance(x, Tensor),
            f"{name} is a {type(x).__name__}: expected a tensor, or None",
        )
    for group in (("span_start", "span_full", "span_count", "spans"), ("start", "full", "count", "index")):
        given = [n for n in group if getattr(p, n) is not None]
        yield len(given) in (0, 4), f"{', '.join(group)} belong together; given: {', '.join(given)}"
    yield p.spans is not None or p.index is not None, "a plan needs lists: spans, units (index), or both"
    yield (p.bits is None) == (p.bits_start is None), "bits and bits_start belong together"
    yield (
        p.bits is None or p.index is not None,
        "bits describe partial units: they need start, full, count, index",
    )
    for name, x in p.tensors().items():
        wide = torch.int64 if name in _INT64 else torch.int32
        yield x.dtype == wide, f"{name} has dtype {x.dtype}: expected {wide}; try {name}.to({wide})"
        yield (
            x.device == p.device,
            f"{name} is on {x.device}, the lists on {p.device}: move them to one device",
        )
        if name in _ORDERS:
            yield x.dim() == 3, f"{name} {list(x.shape)}: expected [B, H, rows]"
        elif name in _TOKENS:
            T = getattr(p, _TOKENS[name])
            yield x.dim() == 3 and x.shape[2] == T, f"{name} {list(x.shape)}: expected [B, H, {T} tokens]"
    for name, n in _HEADS.items():
        x = getattr(p, name)
        yield (
            x is None or (x.dim() == 3 and x.shape[0] == 1 and x.shape[2] == n),
            f"{name}: expected [1, H, {n}]",
        )
    yield (
        p.head_window is None or p.window is None,
        "window and head_window: give one (a tensor [H] in window makes head_window)",
    )
    yield p.head_sink is None or p.head_window is not None, "head_sink needs head_window"
    for name in _LISTS:
        x = getattr(p, name)
        if x is not None:
            yield (
                x.dim() == 3 and x.shape[2] == p.tiles,
                f"{name} {list(x.shape)}: expected [B, H, {p.tiles} tiles]",
            )
    if p.spans is not None:
        yield p.spans.dim() == 2 and p.spans.shape[1] == 2, f"spans {list(p.spans.shape)}: expected [Ns, 2]"
    if p.index is not None:
        yield p.index.dim() == 1, f"index {list(p.index.shape)}: expected [Nu]"
    if p.bits is not None:
        want = (p.tile, -(-p.unit // 32))
        yield (
            p.bits.dim() == 3 and tuple(p.bits.shape[1:]) == want,
            f"bits {list(p.bits.shape)}: expected [Nb, tile={want[0]}, {want[1]} words of 32 keys]",
        )
    alike: tuple[tuple[str, ...], ...] = (_LISTS[:3], _LISTS[3:])
    for names in alike:
        shapes = {tuple(x.shape) for n in names if (x := getattr(p, n)) is not None}
        yield len(shapes) <= 1, f"{', '.join(names)} differ in shape: {sorted(shapes)}"
    laid = {n: x for n, x in p.tensors().items() if n not in _FLAT}
    batches = {n: x.shape[0] for n, x in laid.items()}
    if isinstance(p.q_offset, Tensor) and p.q_offset.dim():
        batches["q_offset"] = p.q_offset.shape[0]
    yield len(set(batches.values()) - {1}) <= 1, f"batch axes {batches}: expected 1 or one common size"
    yield (
        all(x.shape[1] > 0 for x in laid.values()),
        "a head axis of size 0: one list for all heads has size 1",
    )


def _flatten(plan: Plan) -> tuple[list[Any], Any]:
    moving, fixed = [], []
    for f in dataclasses.fields(plan):
        value = getattr(plan, f.name)
        tensor = isinstance(value, (Tensor, KeyLists))
        moving.append(value if tensor else None)
        fixed.append(None if tensor else value)
    return moving, tuple(fixed)


def _unflatten(moving: Iterable[Any], fixed: Any) -> Plan:
    names = [f.name for f in dataclasses.fields(Plan)]
    plan = object.__new__(Plan)
    for name, m, s in zip(names, moving, fixed, strict=True):
        object.__setattr__(plan, name, s if m is None else m)
    return plan


_KEYS = ("start", "count", "full", "index", "source", "until")
pytree.register_pytree_node(Plan, _flatten, _unflatten, serialized_type_name="sparseflash.Plan")
pytree.register_pytree_node(
    KeyLists,
    lambda k: ([getattr(k, n) for n in _KEYS], k.group),
    lambda xs, group: KeyLists(**dict(zip(_KEYS, xs, strict=True)), group=group),
    serialized_type_name="sparseflash.KeyLists",
)
