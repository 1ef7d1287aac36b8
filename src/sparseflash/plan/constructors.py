"""The constructors of `Plan`: one class method for each input format, with an example.

The implementations are in `make/`, on plain tensors, one family a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..common.errors import PlanError, require
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
    """The class methods that build a `Plan`."""

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
        """Attend to every key that the rules allow: dense, causal, sliding window, sinks. O(R) memory.

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
        """Combine disjoint plans of one softmax into one `Plans`."""
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
            Integers `[n+1]`: document i holds queries `cu_seqlens[i]` to `cu_seqlens[i+1] - 1`, and keys
            likewise by `cu_seqlens_k` (the same by default). Documents may be empty. Where a document has
            different numbers of queries and keys, its last query sits at the position of its last key.
        Tq, Tk : int, optional
            Tokens of the tensors, if they hold more than the documents (the rest sees nothing). Given on an
            accelerator, they avoid a copy of the totals to the host.
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
        """Read any bool mask, True = attends, as `scaled_dot_product_attention` takes it. Skips empty tiles.

        The mask is read once. Full tiles become ranges, mixed ones keep their bits (arXiv 2409.15097). Their
        number depends on values: pass the plan as an argument to a function compiled with `fullgraph=True`.

        Parameters
        ----------
        mask : Tensor
            Bool `[B|1, H|1, Tq, Tk]`, `[H, Tq, Tk]` or `[Tq, Tk]`.
        Tq, Tk : int, optional
            Numbers of tokens, needed if the mask's axis has size 1 and broadcasts: with `Tq`, a padding mask
            `[B, 1, 1, Tk]` that is True at real keys.

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
        """Keep the pairs that a sparse matrix stores. O(n log n) for n pairs, without a Tq x Tk mask.

        `mask` is a SciPy sparse matrix `[Tq, Tk]`, or a sparse tensor (COO, CSR, CSC) of that shape, or COO
        of shape `[B|1, H|1, Tq, Tk]`. Every stored value other than zero is a visible pair.

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
        """Let each query see keys `lo ... hi - 1`: any mask whose rows are a few ranges, without the mask.

        Parameters
        ----------
        lo, hi : Tensor
            Integers `[B|1, H|1, Tq]`, or `[B|1, H|1, Tq, m]` for m ranges a query (they may overlap; `hi <=
            lo` is empty). `lo=None`: each query sees a prefix, its first `hi` keys, and no bits are needed.
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
        """Keep key j visible from position j up to, not including, `k_end[j]`: caches that evict, trees.

        A tile lists only the keys that are alive at one of its query positions (`from_lifetimes`).

        Parameters
        ----------
        k_end : Tensor
            Integers `[B|1, H|1, Tk]`; any large number means never. Tokens of a tree in depth-first order
            expire where their subtree ends.
        Tq, q_offset
            Number of queries (Tk by default) and position of the first.
        unit : int, optional
            Keys of one list entry: a tile visits all keys of a unit if one of them is alive. None: ranges and
            single keys, so that no dead key is visited.
        capacity : int, optional
            The most entries that a tile lists, as in `from_lifetimes`.

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
        """Keep key j visible at positions `begin[j] ... end[j] - 1`; a tile lists only its living keys.

        Parameters
        ----------
        begin, end : Tensor
            Integers `[B|1, H|1, Tk]`; any large end means never.
        Tq, q_offset
            Number of queries; position of the first, an int or integers 0-d or `[B]`.
        capacity : int, optional
            Most keys that a tile lists, so that shapes are static (accelerators); `overflow` is set if any
            were dropped.

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
        """Attend to blocks of `tile` queries x `unit` keys, True = attends.

        With `causal`, blocks in the future are left out and those on the diagonal masked.

        Parameters
        ----------
        keep_blocks : Tensor
            bool `[B|1, H|1, R, C]`: R tiles of `tile` query rows, C units of `unit` key rows.
        q_offset : int or Tensor
            Position of the first query: an int, or integers 0-d or `[B]` (chunks of a prompt).
        q_order, k_order : Tensor, optional
            Integers `[B|1, H|1, rows]`: the token of each row, -1 for an empty lane; blocks then consist of
            rows (sorted or clustered tokens, tiles of an image or a video). Positions stay those of tokens.
        capacity : int, optional
            Most blocks that a tile lists, so that shapes do not depend on values (on accelerators the default
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
        """Let each tile see listed keys (or units): integers `[B|1, H|1, ceil(Tq/tile), n]`, -1 = none.

        `unique=True` promises that no list names a key twice; otherwise duplicates are dropped.
        `ascending=True` promises that each list is also sorted, with the -1 at its end (as `top_indices`
        returns it): the lists are then used as they are, at the cost of a few small operations. The other
        arguments are those of `from_blocks`.

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
        """Let each query see the keys, or blocks of `unit` keys, it selected: a learned indexer's top-k.

        One list per query computes the fewest pairs, but a gathered pair costs about three pairs of a tile:
        if 128 neighbouring queries overlap enough, they share a tile whose bits say which query sees a key.

        Parameters
        ----------
        index : Tensor
            Integers `[B|1,Tq,n]` for all heads, or `[B|1,H,Tq,n]`: keys (blocks where `unit` > 1), -1 = none,
            in any order; doubles count once, and keys of the future (stock indexers name some) are dropped.
        Tk : int
            Number of keys.
        unit : int
            Keys of a block; block i begins at key `i * unit`.
        causal : bool
            Query i sees only keys up to its own position, `q_offset + i`.
        q_offset : int or Tensor
            Position of the first query; integers `[B]` where sequences differ.
        k_keep : Tensor, optional
            bool `[B,Tk]`, True = a real key.
        unique : bool
            A promise that no query names a key twice (true of `indexer_topk`); else lists are sorted first.
        tile : int, optional
            Queries that share a list: 1, or more with bits. None picks what is less work (1 on accelerators,
            where a comparison would synchronise).

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
        """Let each tile see key ranges: integers `[B|1, H|1, ceil(Tq/tile), m, 2]`, lo = hi is empty.

        A range `[lo, hi)` is of key rows, which are tokens unless `k_order` is given. The other arguments are
        those of `from_blocks`.

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
        """Vertical-slash pattern: some keys for all queries, and keys at some distances before each; causal.

        Slashes are widened to tiles: a query of the tile whose first query sits at position p sees, for each
        distance d, the keys at positions p - d ... p - d + tile - 1 that are not after its own. Columns and
        slashes may overlap; a pair counts once. O((columns + slashes) x tiles) work and memory.

        Parameters
        ----------
        columns, distances : Tensor
            Integers `[B|1, H|1, n]` in any order, -1 = none, duplicates count once: keys, and distances
            `query position - key position >= 0`.
        Tq, Tk, q_offset
            Numbers of queries and keys; position of the first query, an int or integers 0-d or `[B]`.
        capacity : int, optional
            Most ranges, and most columns, that a tile lists, so that shapes are static; `overflow` is set if
            any were dropped.

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
        """Let the last Tq queries of each sequence see a cache whose first `lengths` keys are in use.

        Query i of sequence b sits at position `lengths[b] - Tq + i` and sees the keys up to that position; a
        query at a negative position sees none.

        Parameters
        ----------
        lengths : Tensor
            Integers `[B]` (or `[1]` for all sequences), 0 to Tk.
        Tk, Tq : int
            Capacity of the cache in keys; number of queries.

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
        window: Window | None = None,
        sink_tokens: int = 0,
    ) -> Self:
        """Let the last queries of each sequence see a paged cache: k and v are one pool, of batch size 1.

        A cache `[pages, page_size, Hkv, D]` is the pool `cache.view(1, -1, Hkv, D).transpose(1, 2)`, without
        a copy. Sequences may share pages, at any place; unused table entries may hold any page or -1, and
        unused pages NaN. The cost follows the pages of the table, not those of the pool.

        Parameters
        ----------
        block_table : Tensor
            Integers `[B, n]`: the pages of each sequence, in order; entries beyond its length are ignored.
        lengths : Tensor
            Integers `[B]`: keys in use. Query i of a sequence sits at position `length - queries + i`.
        page_size, Tk : int
            Keys of a page; keys of the whole pool.
        Tq : int, optional
            Queries of each sequence, its last ones; default 1. With `cu_seqlens_q`: of all sequences.
        cu_seqlens_q : Tensor, optional
            Integers `[B + 1]`: running totals of queries, if sequences have different numbers; q is then
            packed, `[1, Hq, Tq, D]`: the queries of all sequences concatenated.
        choice : Tensor, optional
            Integers `[B, H, m]`: the visible pages, by their place in the sequence, each once; -1 = none.
            None: all pages.
        first_page : int or Tensor, optional
            First visible page of a sequence, `[B]` if they differ; earlier pages are hidden.
        window : (left, 0), optional
            Inclusive distance: how many keys before its own each query sees. Pages that no query sees are not
            visited, and their table entries may hold anything.
        sink_tokens : int
            The first keys of each sequence, exempt from the window.

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
                window=window,
                sink_tokens=sink_tokens,
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
        """Read FlashMask's format: for each key, the query rows from which it is hidden. O(Tk) input.

        Parameters
        ----------
        startend_row_indices : Tensor
            Integers `[B|1, H|1, Tk, n]`. Causal: n = 1, a key is hidden from that row on, or n = 2, from the
            first row up to (not including) the second. Not causal: n = 2, hidden from the first row on and
            before the second, or n = 4, from the first row up to the second and the third up to the fourth.
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
        """Read MagiAttention's format: rectangles of queries and keys, each full, causal, inverse or both.

        Parameters
        ----------
        q_ranges, k_ranges : Tensor or list
            Integers `[n, 2]`: `[begin, end)` of each slice. Slices may overlap; a pair counts once.
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
        """Read block sparse rows, as FlashInfer's block sparse attention and SciPy or PyTorch matrices do.

        Parameters
        ----------
        indptr : Tensor or matrix
            Integers `[R + 1]`: row r of blocks lists `indices[indptr[r]:indptr[r + 1]]`. Or, alone, a BSR
            matrix of SciPy or PyTorch: its stored blocks are visible.
        indices : Tensor
            Integers: unit numbers.
        Tq, Tk, tile, unit : int
            Numbers of queries and keys, and the block's size in queries and keys; a matrix brings its own.
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
        """Read a FlexAttention `BlockMask`; its mask function is evaluated on its partial blocks only."""
        return cls._made(**flex.from_block_mask(block_mask))
