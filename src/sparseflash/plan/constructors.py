"""Everything a plan can be made of: one class method each, with its example.

The work is done in `make/`, on plain tensors, one family a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..errors import PlanError, require
from . import flex
from .make import buckets as buckets_
from .make import (
    caches,
    choice,
    dense,
    documents,
    formats,
    intervals,
    keep,
    lifetimes,
    listed,
    masks,
    slashes,
    sparse,
)
from .options import TILE, UNIT, Window, earlier, is_length
from .record import Record


class Bucketed(TypedDict, total=False):
    """Options of `Plan.from_buckets`."""

    causal: bool
    include_self: bool
    tile: int
    unit: int
    buckets: int | None
    q_offset: int | Tensor
    window: Window | None


class Constructors(Record):
    """The class methods of `Plan` that make one."""

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
    ) -> Self:
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
            **dense.dense(
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
        window: Window | None = None,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Self:
        """Drop any queries and keys, per head (QK-sparse; SCFA, arXiv 2306.01160).

        `q_keep [B|1, H|1, Tq]`, `k_keep [B|1, H|1, Tk]`: bool or uint8, True = kept. Causality is that of the
        original token order. Kept counts may differ from head to head; nothing is padded to the longest.
        `window=(left, right)` counts kept keys: `(2, 0)` shows a query the last three that are kept.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> keep = torch.tensor([[[True, False, True]]])
        >>> sf.Plan.from_keep(keep, keep).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
        """
        return cls._made(
            **keep.from_keep(
                q_keep,
                k_keep,
                causal=causal,
                include_self=include_self,
                window=window,
                tile=tile,
                unit=unit,
            )
        )

    @classmethod
    def _together(cls, plans: Sequence[Self]) -> Any:
        """Disjoint plans of one softmax, as one value."""
        raise NotImplementedError

    @overload
    @classmethod
    def from_buckets(
        cls, q_bucket: Tensor, k_bucket: Tensor, *, local: Literal[0] = 0, **options: Unpack[Bucketed]
    ) -> Self: ...
    @overload
    @classmethod
    def from_buckets(
        cls, q_bucket: Tensor, k_bucket: Tensor, *, local: int, **options: Unpack[Bucketed]
    ) -> Any: ...
    @classmethod
    def from_buckets(
        cls,
        q_bucket: Tensor,
        k_bucket: Tensor,
        *,
        local: int = 0,
        causal: bool = True,
        include_self: bool = True,
        tile: int = TILE,
        unit: int = UNIT,
        buckets: int | None = None,
        q_offset: int | Tensor = 0,
        window: Window | None = None,
    ) -> Any:
        """Queries see the keys of their bucket, per head (hash-sparse; SCFA, arXiv 2306.01160).

        `q_bucket [B|1, H|1, Tq]`, `k_bucket [B|1, H|1, Tk]`: any integer ids. Every pair of equal ids is
        attended (coverage 1). Tiles end at bucket edges and ranges are exact in (bucket, position).
        `buckets` bounds the number of distinct ids, so that no value has to reach the host (accelerators).
        `q_offset` is the position of the first query (int, or a tensor, 0-d or [B]). `window=(left, right)`
        counts members of the bucket: `(2, 0)` shows a query its last three, itself among them. `local=W`
        shows the last W keys too, whatever their bucket (the query's own position counted): the result is
        then `Plans`, of the window and of the buckets behind it.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> bucket = torch.tensor([[[7, 3, 7]]])
        >>> sf.Plan.from_buckets(bucket, bucket).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
        """
        require(
            (is_length(local), lambda: f"local={local!r}: expected an int >= 0, the keys of a window"),
            (not local or causal, lambda: f"local={local}: a window of last keys wants causal=True"),
            (not local or window is None, "local= and window=: give one of them"),
            error=PlanError,
        )
        far = cls._made(
            **buckets_.from_buckets(
                q_bucket,
                k_bucket,
                causal=causal,
                include_self=include_self or local > 0,
                tile=tile,
                unit=unit,
                buckets=buckets,
                q_offset=earlier(q_offset, local),
                window=window,
            )
        )
        if not local:
            return far
        strict = int(not include_self)
        if local == strict:  # the query's own key alone, which it may not see
            return cls._together([far])
        near = cls.dense(
            far.Tq,
            far.Tk,
            causal=True,
            window=(local - 1 - strict, 0),
            q_offset=earlier(q_offset, strict),
            device=q_bucket.device,
        )
        return cls._together([far, near])

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
    ) -> Self:
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
    ) -> Self:
        """Any bool mask, True = attends: what `scaled_dot_product_attention` takes. Empty tiles cost nothing.

        The mask is read once. Full tiles become ranges, mixed ones keep their bits (arXiv 2409.15097). Their
        number depends on values: a function compiled with `fullgraph=True` takes the plan as an argument.

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
    def from_sparse(cls, mask: Any, *, tile: int = TILE, unit: int = UNIT) -> Self:
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
        cls,
        lo: Tensor | None,
        hi: Tensor,
        *,
        Tk: int,
        moving: bool = False,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Self:
        """Each query sees keys `lo ... hi - 1`: any mask whose rows are a few ranges, without the mask.

        Parameters
        ----------
        lo, hi : Tensor
            Integers `[B|1, H|1, Tq]`, or `[B|1, H|1, Tq, m]` for m ranges a query (they may overlap; `hi <=
            lo` is empty). `lo` of None begins at key 0 and needs no bits: a prefix of every query's own.
        Tk : int
            Number of keys.
        moving : bool
            A promise, for one range a query: neither `lo` nor `hi` decreases from a query to the next
            (windows, documents, chunks, padding). The plan then needs no bits, and no value reaches the host.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> lo, hi = torch.tensor([[[0, 1, 0]]]), torch.tensor([[[2, 3, 0]]])
        >>> sf.Plan.from_intervals(lo, hi, Tk=4).to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
        """
        return cls._made(**intervals.from_intervals(lo, hi, Tk=Tk, moving=moving, tile=tile, unit=unit))

    @classmethod
    def from_expiry(
        cls,
        k_end: Tensor,
        *,
        Tq: int | None = None,
        q_offset: int | Tensor = 0,
        tile: int = TILE,
        unit: int | None = None,
        capacity: int | None = None,
    ) -> Self:
        """Key j is seen from position j up to, not including, position `k_end[j]`: caches that evict, trees.

        A tile lists the keys that live while it does (`from_lifetimes`).

        Parameters
        ----------
        k_end : Tensor
            Integers `[B|1, H|1, Tk]`; any large number is never. Tokens of a tree in depth-first order expire
            where their subtree ends.
        Tq, q_offset
            Number of queries (Tk by default) and position of the first.
        unit : int, optional
            Keys that stand or fall together in the lists; what none of a tile's queries sees is then visited
            with its neighbours.
        capacity : int, optional
            As of `from_lifetimes`: the most units that a tile lists.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> sf.Plan.from_expiry(torch.tensor([[[3, 2, 3]]])).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
        """
        return cls._made(
            **intervals.from_expiry(k_end, Tq=Tq, q_offset=q_offset, tile=tile, unit=unit, capacity=capacity)
        )

    @classmethod
    def from_lifetimes(
        cls,
        begin: Tensor,
        end: Tensor,
        *,
        Tq: int,
        q_offset: int | Tensor = 0,
        tile: int = 64,
        capacity: int | None = None,
    ) -> Self:
        """Key j is seen by queries at positions `begin[j] ... end[j] - 1`, and only the living are listed.

        Parameters
        ----------
        begin, end : Tensor
            Integers `[B|1, H|1, Tk]`; any large end is never.
        Tq, q_offset
            Number of queries; position of the first, an int or integers 0-d or `[B]`.
        capacity : int, optional
            Bounds the keys of a tile where shapes are static (on accelerators); `overflow` says what was
            dropped.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> begin, end = torch.tensor([[[0, 1, 1]]]), torch.tensor([[[2, 2, 9]]])
        >>> sf.Plan.from_lifetimes(begin, end, Tq=3).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 1], [0, 0, 1]]
        """
        return cls._made(
            **lifetimes.from_lifetimes(begin, end, Tq=Tq, q_offset=q_offset, tile=tile, capacity=capacity)
        )

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
        q_offset: int | Tensor = 0,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
        capacity: int | None = None,
    ) -> Self:
        """Blocks of `tile` queries x `unit` keys, True = attends.

        With `causal`, blocks in the future are left out and those on the diagonal masked.

        Parameters
        ----------
        keep_blocks : Tensor
            bool `[B|1, H|1, R, C]`: R tiles of `tile` query rows, C units of `unit` key rows.
        q_offset : int or Tensor
            Position of the first query: an int, or integers 0-d or `[B]` (chunks of a prompt).
        q_order, k_order : Tensor, optional
            Integers `[B|1, H|1, rows]`: the token of each row, -1 for an empty lane; blocks are then of rows
            (sorted or clustered tokens, tiles of an image or a video). Positions stay those of the tokens.
        capacity : int, optional
            Bounds the blocks of a tile, so that shapes do not depend on values (on accelerators the default
            is room for all); blocks beyond it are dropped and `overflow` is set.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> blocks = torch.eye(4, dtype=torch.bool)[None, None]
        >>> sf.Plan.from_blocks(blocks, Tq=512, Tk=512).work
        0.25
        """
        return cls._made(
            **listed.from_blocks(
                keep_blocks,
                listed.Frame(Tq, Tk, tile, unit, causal, q_offset, q_order, k_order),
                capacity=capacity,
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
        q_offset: int | Tensor = 0,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
        unique: bool = False,
        ascending: bool = False,
        capacity: int | None = None,
    ) -> Self:
        """Keys (or units of keys) listed for each tile: integers `[B|1, H|1, ceil(Tq/tile), n]`, -1 = none.

        Say `unique=True` where no list names a key twice; otherwise doubles are dropped. Say
        `ascending=True` where each list is sorted besides, with what is -1 at its end (`top_indices` makes
        such): then it is taken as it stands, which costs a few small operations. The other arguments are
        those of `from_blocks`.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> index = torch.tensor([[[[0, 3], [2, -1]]]])
        >>> sf.Plan.from_keys(index, Tq=2, Tk=4).to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 1], [0, 0, 1, 0]]
        """
        return cls._made(
            **listed.from_keys(
                index,
                listed.Frame(Tq, Tk, tile, unit, causal, q_offset, q_order, k_order),
                unique=unique,
                ascending=ascending,
                capacity=capacity,
            )
        )

    @classmethod
    def from_choice(
        cls,
        index: Tensor,
        *,
        Tk: int,
        unit: int = 1,
        causal: bool = True,
        q_offset: int | Tensor = 0,
        k_keep: Tensor | None = None,
        unique: bool = False,
        tile: int | None = None,
    ) -> Self:
        """Keys, or blocks of `unit` keys, that each query chose for itself: a learned indexer's choice.

        A query's own list is the least work, but a gathered pair costs about three of a tile's: where the
        choices of 64 neighbours overlap enough, they share tiles in which bits say who sees what.

        Parameters
        ----------
        index : Tensor
            Integers `[B|1,Tq,n]` for all heads, or `[B|1,H,Tq,n]`: keys (blocks where `unit` > 1), -1 = none,
            in any order; doubles count once, and keys of the future (stock indexers name some) are dropped.
        Tk : int
            How many keys there are.
        unit : int
            Keys of a block; block i is the keys from `i * unit` on.
        causal : bool
            Query i, at position `q_offset + i`, sees keys up to its own.
        q_offset : int or Tensor
            Position of the first query; integers `[B]` where sequences differ.
        k_keep : Tensor, optional
            bool `[B,Tk]`, True = a real key.
        unique : bool
            Whether no query names a key twice, as `indexer_topk` promises; otherwise lists are sorted first.
        tile : int, optional
            Queries that share a list: 1, or tiles with bits. None takes what is less work (1 on accelerators,
            where finding out would synchronise).

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> index = torch.tensor([[[0, 1], [1, -1], [0, 2]]])
        >>> sf.Plan.from_choice(index, Tk=3).to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
        """
        return cls._made(
            **choice.from_choice(
                index,
                Tk=Tk,
                unit=unit,
                causal=causal,
                q_offset=q_offset,
                k_keep=k_keep,
                unique=unique,
                tile=tile,
            )
        )

    @classmethod
    def from_spans(
        cls,
        spans: Tensor,
        *,
        Tq: int,
        Tk: int,
        tile: int = TILE,
        unit: int = UNIT,
        causal: bool = False,
        q_offset: int | Tensor = 0,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
        capacity: int | None = None,
    ) -> Self:
        """Key ranges `[lo, hi)` of each tile: integers `[B|1, H|1, ceil(Tq/tile), m, 2]`, lo = hi is empty.

        Ranges are of key rows, which are tokens but under a `k_order`. The other arguments are those of
        `from_blocks`.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> spans = torch.tensor([[[[[0, 2], [5, 6]]]]])
        >>> sf.Plan.from_spans(spans, Tq=1, Tk=6).to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 0, 0, 1]]
        """
        return cls._made(
            **listed.from_spans(
                spans,
                listed.Frame(Tq, Tk, tile, unit, causal, q_offset, q_order, k_order),
                capacity=capacity,
            )
        )

    @classmethod
    def from_slashes(
        cls,
        columns: Tensor,
        distances: Tensor,
        *,
        Tq: int,
        Tk: int,
        tile: int = 64,
        q_offset: int | Tensor = 0,
        capacity: int | None = None,
    ) -> Self:
        """Vertical-slash: some keys for all queries, and keys at some distances before each; causal.

        Slashes are widened to tiles: a query of the tile whose first query sits at position p sees, for each
        distance d, the keys at positions p - d ... p - d + tile - 1 that are not after its own. Columns and
        slashes may meet; a pair is seen once. O((columns + slashes) x tiles) work and memory.

        Parameters
        ----------
        columns, distances : Tensor
            Integers `[B|1, H|1, n]` in any order, -1 = none, doubles count once: keys, and distances `query
            position - key position >= 0`.
        Tq, Tk, q_offset
            Numbers of queries and keys; position of the first query, an int or integers 0-d or `[B]`.
        capacity : int, optional
            Bounds the ranges and the columns of a tile where shapes are static; `overflow` says what was
            dropped.

        Source: Jiang et al., "MInference 1.0", arXiv 2407.02490, section 3.2.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> columns, distances = torch.tensor([[[0]]]), torch.tensor([[[0, 2]]])
        >>> sf.Plan.from_slashes(columns, distances, Tq=5, Tk=5, tile=1).to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
        """
        return cls._made(
            **slashes.from_slashes(
                columns, distances, Tq=Tq, Tk=Tk, tile=tile, q_offset=q_offset, capacity=capacity
            )
        )

    @classmethod
    def from_lengths(cls, lengths: Tensor, *, Tk: int, Tq: int = 1) -> Self:
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
        cls,
        block_table: Tensor,
        lengths: Tensor,
        *,
        page_size: int,
        Tk: int,
        Tq: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        choice: Tensor | None = None,
        first_page: int | Tensor | None = None,
    ) -> Self:
        """The last queries of each sequence over a paged cache: k and v are one pool, of batch size 1.

        A cache `[pages, page_size, Hkv, D]` is the pool `cache.view(1, -1, Hkv, D).transpose(1, 2)`, without
        a copy. Sequences may share pages, at any place; what they do not use may hold any page, none (-1) and
        NaN. The cost follows the pages of the table, not those of the pool.

        Parameters
        ----------
        block_table : Tensor
            Integers `[B, n]`: the pages of each sequence, in order; anything beyond its length.
        lengths : Tensor
            Integers `[B]`: keys in use. Query i of a sequence sits at position `length - queries + i`.
        page_size, Tk : int
            Keys of a page; keys of the whole pool.
        Tq : int, optional
            Queries of a sequence, its last ones: 1. With `cu_seqlens_q` those of all sequences together.
        cu_seqlens_q : Tensor, optional
            Integers `[B + 1]`: running totals of queries, where sequences have different numbers; q is then
            one row, `[1, Hq, Tq, D]`, of the queries of all behind one another.
        choice : Tensor, optional
            Integers `[B, H, m]`: the pages that are seen, by their place in the sequence, each once; -1 =
            none. None: all.
        first_page : int or Tensor, optional
            The page that a sequence begins with, `[B]` where they differ: what lies before it is not seen.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> table = torch.tensor([[2, 0], [1, -1]])
        >>> plan = sf.Plan.from_pages(table, torch.tensor([3, 2]), page_size=2, Tk=6)
        >>> plan.to_dense()[:, 0, 0].int().tolist()
        [[1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
        """
        return cls._made(
            **caches.from_pages(
                block_table,
                lengths,
                page_size=page_size,
                Tk=Tk,
                Tq=Tq,
                cu_seqlens_q=cu_seqlens_q,
                choice=choice,
                first_page=first_page,
            )
        )

    @classmethod
    def from_flashmask(
        cls,
        startend_row_indices: Tensor,
        *,
        causal: bool,
        Tq: int | None = None,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Self:
        """FlashMask's form: for each key, between which query rows it is hidden. O(Tk) memory to say.

        Parameters
        ----------
        startend_row_indices : Tensor
            Integers `[B|1, H|1, Tk, n]`. Causal: n = 1, a key is hidden from that row on, or n = 2, from the
            first row up to (not including) the second. Not causal: n = 2, hidden from the first row on and
            before the second, or n = 4, from row 0 up to 1 and from row 2 up to 3.
        causal : bool
            Whether query i sees keys up to i only.
        Tq : int, optional
            Number of queries; Tk by default.

        Source: Wang et al., "FlashMask", arXiv 2410.01359, section 4.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> ends = torch.tensor([2, 2, 4, 4]).view(1, 1, 4, 1)  # two documents of two tokens
        >>> sf.Plan.from_flashmask(ends, causal=True).to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        """
        return cls._made(
            **formats.from_flashmask(startend_row_indices, causal=causal, Tq=Tq, tile=tile, unit=unit)
        )

    @classmethod
    def from_slices(
        cls,
        q_ranges: Any,
        k_ranges: Any,
        types: Any = None,
        *,
        Tq: int,
        Tk: int,
        tile: int = TILE,
        unit: int = UNIT,
    ) -> Self:
        """MagiAttention's form: rectangles of queries and keys, each with a shape of its own.

        Parameters
        ----------
        q_ranges, k_ranges : Tensor or list
            Integers `[n, 2]`: `[begin, end)` of each slice. Slices may meet; a pair is seen once.
        types : Tensor, list or int, optional
            Integers `[n]`, or one for all: 0 full (the default), 1 causal (the last query sees the last
            key), 2 inverse causal (the first query sees from the first key on), 3 both.

        Source: MagiAttention (SandAI, 2025), "AttnSlice".

        Examples
        --------
        >>> import sparseflash as sf
        >>> plan = sf.Plan.from_slices([[0, 2], [2, 4]], [[0, 2], [0, 4]], [1, 0], Tq=4, Tk=4)
        >>> plan.to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        """
        return cls._made(**formats.from_slices(q_ranges, k_ranges, types, Tq=Tq, Tk=Tk, tile=tile, unit=unit))

    @classmethod
    def from_bsr(
        cls,
        indptr: Any,
        indices: Tensor | None = None,
        *,
        Tq: int | None = None,
        Tk: int | None = None,
        tile: int | None = None,
        unit: int | None = None,
        causal: bool = False,
        q_offset: int | Tensor = 0,
    ) -> Self:
        """Block sparse rows: what FlashInfer's block sparse attention takes, SciPy's and PyTorch's matrices.

        Parameters
        ----------
        indptr : Tensor or matrix
            Integers `[R + 1]`: row r of blocks lists `indices[indptr[r]:indptr[r + 1]]`. Or a BSR matrix of
            SciPy or PyTorch, alone: its stored blocks are seen.
        indices : Tensor
            Integers: units of keys.
        Tq, Tk, tile, unit : int
            Numbers of queries and keys, and of a block; a matrix has its own.
        causal, q_offset
            As in `from_blocks`.

        Examples
        --------
        >>> import torch, sparseflash as sf
        >>> indptr, indices = torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1])
        >>> plan = sf.Plan.from_bsr(indptr, indices, Tq=4, Tk=4, tile=2, unit=2)
        >>> plan.to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        """
        return cls._made(
            **formats.from_bsr(
                indptr,
                indices,
                Tq=Tq,
                Tk=Tk,
                tile=tile,
                unit=unit,
                causal=causal,
                q_offset=q_offset,
            )
        )

    @classmethod
    def from_block_mask(cls, block_mask: Any) -> Self:
        """A FlexAttention `BlockMask`; its mask function is evaluated on its partial blocks only."""
        return cls._made(**flex.from_block_mask(block_mask))
