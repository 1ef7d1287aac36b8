"""Seeded random plans of every kind, each with its mask by a formula of its own. For tests and benchmarks.

    example = plans.example(7, "buckets", batch=2, heads=4)
    example.plan, example.mask, example.line

The mask never comes from the library: constructors are checked against one line of boolean algebra, plans
made by hand against `by_definition`, which walks the lists of a plan as `docs/design.md` defines them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseflash import Plan

ANY, NONE = -1, -2
UNITS = (1, 16, 64, 128)
TILES = (1, 5, 7, 16, 32, 33, 64, 96, 128)
LENGTHS = (0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 200, 257)


@dataclass(frozen=True)
class Example:
    """A plan, its mask (bool [B|1, H', Tq, Tk], made on demand) and the line that makes it again."""

    plan: Plan
    formula: Callable[[], Tensor]
    line: str
    pool: bool = False
    """Whether all batch slots share one set of keys: k and v have batch size 1."""

    @cached_property
    def mask(self) -> Tensor:
        """Which keys each query sees."""
        return self.formula()


class _Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.pick, self.int, self.chance = self.random.choice, self.random.randint, self._chance

    def _chance(self, p: float) -> bool:
        return self.random.random() < p

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers low..high inclusive, int32."""
        return torch.randint(low, high + 1, shape, generator=self.torch, dtype=torch.int32)

    def coins(self, p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.torch) < p

    def axes(self, batch: int, heads: int) -> tuple[int, int]:
        """A batch axis (1 or B) and a head axis (a divisor of the heads)."""
        return self.pick((1, batch)), self.pick([d for d in range(1, heads + 1) if heads % d == 0])


def _spread(x: Tensor, heads: int) -> Tensor:
    return x[:, torch.arange(heads) * x.shape[1] // heads]


def rules(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    include_self: bool = True,
    window: tuple[int | None, int | None] | None = None,
    sink: int = 0,
) -> Tensor:
    """The rules on positions alone, q [..., m, 1] against k [..., 1, n]."""
    keep = (q >= k) if causal else torch.ones(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool)
    if not include_self:
        keep = keep & (q != k)
    if window is not None:
        left, right = (float("inf") if w is None else w for w in window)
        keep = keep & (((q - k <= left) & (k - q <= right)) | (k < sink))
    return keep


# ---------------------------------------------------------------- by constructor


def _window(d: _Draw) -> tuple[int | None, int | None]:
    return d.pick((None, 0, 1, 3, 17, 64, 300)), d.pick((None, 0, 0, 1, 5, 40))


def _dense(
    d: _Draw,
    batch: int,
    heads: int,
    Tq: int,
    Tk: int,
    tile: int,
    unit: int,
    *,
    window: Any = None,
    sink: int = 0,
    shift: bool = False,
) -> tuple[Plan, Callable[[], Tensor]]:
    causal = d.chance(0.6)
    offset: int | Tensor = 0
    if shift:
        offset = d.pick((Tk - Tq, d.int(-Tq - 3, Tk + 3)))
        if d.chance(0.5):
            offset = torch.tensor(offset, dtype=torch.int32)
            offset = d.ints(-Tq - 3, Tk + 3, batch) if d.chance(0.6) else offset
    plan = Plan.dense(
        Tq, Tk, causal=causal, window=window, sink_tokens=sink, q_offset=offset, tile=tile, unit=unit
    )

    def formula() -> Tensor:
        q = torch.arange(Tq)[:, None] + torch.as_tensor(offset).long().reshape(-1, 1, 1, 1)
        return rules(q, torch.arange(Tk)[None], causal=causal, window=window, sink=sink)

    return plan, formula


def _keep(d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int) -> tuple[Plan, Callable]:
    causal, include_self = d.chance(0.7), d.chance(0.7)
    q, k = (d.coins(d.pick((0.0, 0.1, 0.5, 0.9, 1.0)), *d.axes(batch, heads), T) for T in (Tq, Tk))
    if d.chance(0.3) and Tq:
        q[:, d.int(0, q.shape[1] - 1)] = False  # a head without queries
    if d.chance(0.3):
        q, k = q.to(torch.uint8), k.to(torch.uint8)
    if d.chance(0.2) and Tq == Tk:
        k = q
    plan = Plan.from_keep(q, k, causal=causal, include_self=include_self, tile=tile, unit=unit)

    def formula() -> Tensor:
        both = _spread(q, heads).bool()[..., :, None] & _spread(k, heads).bool()[..., None, :]
        return both & rules(
            torch.arange(Tq)[:, None], torch.arange(Tk)[None], causal=causal, include_self=include_self
        )

    return plan, formula


def _buckets(
    d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int
) -> tuple[Plan, Callable]:
    causal, include_self = d.chance(0.7), d.chance(0.7)
    low, high = d.pick(((0, 0), (0, 3), (0, 15), (-7, 7), (0, 1000), (-(2**31), 2**31 - 1)))
    if high == 2**31 - 1:
        ids = d.ints(low, high - 1, 5)  # a few ids from end to end
        ids[0] = high
    else:
        ids = torch.arange(low, high + 1, dtype=torch.int32)
    q, k = (ids[d.ints(0, len(ids) - 1, *d.axes(batch, heads), T).long()] for T in (Tq, Tk))
    if d.chance(0.3) and Tq == Tk:
        k = q
    wide = d.pick((torch.int32, torch.int64, torch.int64))
    if wide == torch.int64 and d.chance(0.3):
        q, k = q.long() * 2**31, k.long() * 2**31
    plan = Plan.from_buckets(
        q.to(wide), k.to(wide), causal=causal, include_self=include_self, tile=tile, unit=unit
    )

    def formula() -> Tensor:
        same = _spread(q, heads)[..., :, None] == _spread(k, heads)[..., None, :]
        return same & rules(
            torch.arange(Tq)[:, None], torch.arange(Tk)[None], causal=causal, include_self=include_self
        )

    return plan, formula


def _documents(
    d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int
) -> tuple[Plan, Callable]:
    causal, window, itself = d.chance(0.7), d.pick((None, _window(d))), d.chance(0.7)
    itself = itself or not causal
    cuts = sorted(d.int(0, Tq) for _ in range(d.int(0, 5)))
    edges = [0, *cuts, *cuts[:1] * d.int(0, 1), Tq]  # with empty documents
    edges = sorted(edges)
    edges_k = edges
    if Tk != Tq or d.chance(0.3):
        edges_k = sorted([0, *(d.int(0, Tk) for _ in edges[2:]), Tk])
    plan = Plan.from_documents(
        torch.tensor(edges),
        None if edges_k is edges else torch.tensor(edges_k),
        causal=causal,
        include_self=itself,
        window=window,
        tile=tile,
        unit=unit,
    )

    def formula() -> Tensor:
        return documents(edges, edges_k, causal=causal, include_self=itself, window=window)[None, None]

    return plan, formula


def documents(edges: list[int], edges_k: list[int], **options: Any) -> Tensor:
    """What packed documents see, bool [Tq, Tk]: each its own keys, their last tokens at one position."""
    mask = torch.zeros(edges[-1], edges_k[-1], dtype=torch.bool)
    for lo, hi, k_lo, k_hi in zip(edges, edges[1:], edges_k, edges_k[1:]):
        q, k = torch.arange(hi - lo)[:, None] + (k_hi - k_lo) - (hi - lo), torch.arange(k_hi - k_lo)[None]
        mask[lo:hi, k_lo:k_hi] = rules(q, k, **options)
    return mask


def _mask(d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int) -> tuple[Plan, Callable]:
    b, h = d.axes(batch, heads)
    mask = d.coins(d.pick((0.0, 0.02, 0.5, 0.98, 1.0)), b, h, Tq, Tk)
    if d.chance(0.5) and Tq and Tk:  # blocks, so that some units are full and some empty
        block = (
            d.coins(0.5, b, h, -(-Tq // 32), -(-Tk // 32)).repeat_interleave(32, 2).repeat_interleave(32, 3)
        )
        mask = block[:, :, :Tq, :Tk] | (mask & d.coins(0.1, b, h, Tq, Tk))
    return Plan.from_mask(mask, tile=tile, unit=unit), lambda: mask


# ---------------------------------------------------------------- listed


def _blocks(
    d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int
) -> tuple[Plan, Callable]:
    """Blocks as booleans or as indices, these with doubles and gaps; with room to spare, or compact."""
    causal = d.chance(0.5)
    R, C = -(-Tq // tile), -(-Tk // unit)
    keep = d.coins(d.pick((0.0, 0.1, 0.5, 1.0)), *d.axes(batch, heads), R, C)
    capacity = d.pick((None, None, C + 2 if C else 1))
    size = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": causal, "capacity": capacity}
    if d.chance(0.5):
        plan = Plan.from_blocks(keep, **size)
    else:
        unique = d.chance(0.5)
        index = torch.where(keep, torch.arange(C), -1).to(d.pick((torch.int32, torch.int64)))
        index = index if unique else torch.cat([index, index], -1)
        index = index[..., torch.randperm(index.shape[-1], generator=d.torch)]
        if not unique and capacity is not None:
            size["capacity"] = 2 * capacity
        plan = Plan.from_keys(index, unique=unique, **size)

    def formula() -> Tensor:
        mask = keep.repeat_interleave(tile, 2).repeat_interleave(unit, 3)[:, :, :Tq, :Tk]
        return mask & rules(torch.arange(Tq)[:, None], torch.arange(Tk)[None], causal=causal)

    return plan, formula


def _spans(d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int) -> tuple[Plan, Callable]:
    causal, R = d.chance(0.5), -(-Tq // tile)
    edges = d.ints(0, Tk, *d.axes(batch, heads), R, 2 * d.int(0, 4)).sort(-1).values
    spans = edges.unflatten(-1, (-1, 2)) if edges.shape[-1] else edges[..., None].expand(*edges.shape, 2)
    spans = spans[..., torch.randperm(spans.shape[3], generator=d.torch), :]
    plan = Plan.from_spans(spans, Tq=Tq, Tk=Tk, tile=tile, unit=unit, causal=causal)

    def formula() -> Tensor:
        k = torch.arange(Tk)
        inside = ((k >= spans[..., :1]) & (k < spans[..., 1:])).any(3)
        mask = inside.repeat_interleave(tile, 2)[:, :, :Tq]
        return mask & rules(torch.arange(Tq)[:, None], k[None], causal=causal)

    return plan, formula


def _offset(d: _Draw, batch: int) -> int | Tensor:
    """Where the first query sits: one number, or one a sequence."""
    return d.pick((0, d.int(-9, 90), d.ints(-9, 90, batch), d.ints(-9, 90, 1)))


def _at(offset: int | Tensor, Tq: int) -> Tensor:
    """Positions of the queries, [B|1, 1, Tq, 1]."""
    return torch.arange(Tq)[:, None] + torch.as_tensor(offset).reshape(-1, 1, 1, 1)


def _slashes(
    d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int
) -> tuple[Plan, Callable]:
    columns, distances = (
        d.ints(-1, max(Tk - 1, 0) + beyond, *d.axes(batch, heads), d.int(0, 9)) for beyond in (0, 9)
    )
    columns, offset = columns.clamp(max=Tk - 1), _offset(d, batch)
    plan = Plan.from_slashes(columns, distances, Tq=Tq, Tk=Tk, tile=tile, q_offset=offset)

    def formula() -> Tensor:
        at, key = _at(offset, Tq), torch.arange(Tk)
        first = at - (torch.arange(Tq) % tile)[:, None]
        named = (_spread(columns, heads)[..., None] == key).any(-2)[..., None, :]
        far = _spread(distances, heads)[..., None, :, None]
        begin = first[..., None, :] - far
        near = ((far >= 0) & (begin <= key) & (key < begin + tile)).any(-2)
        return (named | near) & (at >= key)

    return plan, formula


def _lives(d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int) -> tuple[Plan, Callable]:
    begin, offset = d.ints(-5, Tk + 5, *d.axes(batch, heads), Tk), _offset(d, batch)
    end = begin + d.ints(-2, d.pick((3, 40, 2 * Tk + 3)), d.pick((1, len(begin))), begin.shape[1], Tk)
    plan = Plan.from_lifetimes(begin, end, Tq=Tq, q_offset=offset, tile=tile)

    def formula() -> Tensor:
        at = _at(offset, Tq)
        return (_spread(begin, heads)[..., None, :] <= at) & (at < _spread(end, heads)[..., None, :])

    return plan, formula


def _members(
    d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int
) -> tuple[Plan, Callable]:
    """Buckets under a window that counts their members."""
    q, k = (d.ints(0, d.pick((0, 3)), *d.axes(batch, heads), T) for T in (Tq, Tk))
    window, include_self = _window(d), d.chance(0.7)
    given = {"include_self": include_self, "window": window, "tile": tile, "unit": unit}
    plan = Plan.from_buckets(q, k, **given)

    def formula() -> Tensor:
        at, key = torch.arange(Tq)[:, None], torch.arange(Tk)
        same = _spread(q, heads)[..., :, None] == _spread(k, heads)[..., None, :]
        behind = same & ((key <= at) if include_self else (key < at))
        # how many members lie between a key and the nearest that the query sees
        between = behind.flip(-1).long().cumsum(-1).flip(-1) - int(include_self)
        left = torch.inf if window[0] is None else window[0]
        return behind & (between <= left)

    return plan, formula


def _head_rules(d: _Draw, heads: int) -> tuple[Any, Any]:
    """A window and a sink, at least one of them per head."""
    side = d.pick((None, 0, 5, d.ints(-1, 40, d.axes(1, heads)[1])))
    window = (d.ints(-1, 70, d.axes(1, heads)[1]), side)
    return window[:: d.pick((1, -1))], d.pick((0, 3, d.ints(0, 20, d.axes(1, heads)[1])))


def _heads(d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int) -> tuple[Plan, Callable]:
    """A window and a sink of its own for every head."""
    causal = d.chance(0.6)
    window, sink = _head_rules(d, heads)
    offset = d.pick((0, Tk - Tq, d.ints(-3, Tk, batch)))
    plan = Plan.dense(
        Tq, Tk, causal=causal, window=window, sink_tokens=sink, q_offset=offset, tile=tile, unit=unit
    )

    def formula() -> Tensor:
        def of(x: Any, h: int) -> Any:
            x = x[h * len(x) // heads].item() if isinstance(x, Tensor) else x
            return x

        q = torch.arange(Tq)[:, None] + torch.as_tensor(offset).long().reshape(-1, 1, 1)
        each = []
        for h in range(heads):
            sides = [None if (w := of(x, h)) is None or w < 0 else w for x in window]
            own = {"causal": causal, "window": tuple(sides), "sink": of(sink, h)}
            each.append(rules(q, torch.arange(Tk)[None], **own))
        return torch.stack(each, 1)

    return plan, formula


def _pool(d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int) -> tuple[Plan, Callable]:
    """A paged cache: a shared prefix as a span, pages of each sequence as units, positions per slot."""
    pages = -(-Tk // unit)
    shared = d.int(0, pages) if pages else 0
    own = d.ints(-1, batch - 1, pages)  # -1: a free page, that may hold anything
    own[:shared] = -2
    position = torch.arange(Tk, dtype=torch.int32)
    lists = []
    for b in range(batch):
        mine = [p for p in range(shared, pages) if int(own[p]) == b]
        d.random.shuffle(mine)
        lists.append(mine)
        for n, p in enumerate(mine):
            lanes = range(p * unit, min((p + 1) * unit, Tk))
            position[list(lanes)] = torch.arange(len(lanes), dtype=torch.int32) + (shared + n) * unit
    offset = d.ints(-2, Tk + 3, batch)
    left = d.pick((None, None, 9))
    end = d.ints(0, 2 * Tk + 3, 1, 1, Tk) if d.chance(0.3) else None
    R = -(-Tq // tile)
    counts = torch.tensor([len(x) for x in lists], dtype=torch.int32)
    wide = torch.zeros(batch, 1, R, dtype=torch.int32)
    prefix = min(shared * unit, Tk)
    plan = Plan(
        Tq=Tq,
        Tk=Tk,
        tile=tile,
        unit=unit,
        causal=True,
        window=None if left is None else (left, 0),
        q_offset=offset,
        k_pos=position.view(1, 1, -1),
        k_end=end,
        span_start=torch.zeros(1, 1, R, dtype=torch.int64),
        span_full=torch.zeros(1, 1, R, dtype=torch.int32),
        span_count=torch.ones(1, 1, R, dtype=torch.int32),
        spans=torch.tensor([[0, prefix]], dtype=torch.int32),
        start=(counts.cumsum(0) - counts).view(-1, 1, 1) + wide.long(),
        full=wide,
        count=counts.view(-1, 1, 1) + wide,
        index=torch.tensor(sum(lists, []), dtype=torch.int32),
    )

    def formula() -> Tensor:
        owner = own.repeat_interleave(unit)[:Tk]
        visible = (owner == -2) | (owner == torch.arange(batch)[:, None])
        q = (torch.arange(Tq) + offset[:, None])[:, :, None]
        mask = visible[:, None] & rules(q, position, causal=True, window=None if left is None else (left, 0))
        if end is not None:
            mask = mask & (q < end[0, 0])
        return mask[:, None]

    return plan, formula


# ---------------------------------------------------------------- by hand


def _order(d: _Draw, b: int, h: int, T: int) -> Tensor:
    """Injective, with tokens dropped and empty lanes anywhere."""
    kept = [[[t for t in range(T) if d.chance(0.85)] for _ in range(h)] for _ in range(b)]
    rows = max([len(x) for y in kept for x in y], default=0) + d.pick((0, 0, 3, 40))
    order = torch.full((b, h, rows), -1, dtype=torch.int32)
    for i, y in enumerate(kept):
        for j, tokens in enumerate(y):
            lanes = sorted(d.random.sample(range(rows), len(tokens)))
            if d.chance(0.7):
                d.random.shuffle(tokens)
            order[i, j, lanes] = torch.tensor(tokens, dtype=torch.int32)
    return order


def _positions(d: _Draw, b: int, h: int, T: int) -> Tensor:
    kind = d.pick(("any", "shifted", "repeated"))
    if kind == "shifted":
        return (torch.arange(T, dtype=torch.int32) + d.int(-9, 9)).expand(b, h, T).contiguous()
    return d.ints(-20, T + 20, b, h, T) if kind == "any" else d.ints(0, max(T // 4, 1), b, h, T)


def _segments(d: _Draw, b: int, h: int, T: int) -> Tensor:
    return torch.tensor([ANY, NONE, 0, 1, 1, 2], dtype=torch.int32)[d.ints(0, 5, b, h, T).long()]


def _row(d: _Draw, rows: int, unit: int, use: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Disjoint entries of one tile over key rows 0..rows-1: spans and unit numbers, in any order."""
    busy = d.pick((0.0, 0.2, 0.6, 1.0))
    units = [u for u in range(-(-rows // unit)) if "units" in use and d.chance(busy)]
    free = np.ones(rows + 1, dtype=bool)
    free[rows] = False
    for u in units:
        free[u * unit : (u + 1) * unit] = False
    spans, lo = [], None
    if "spans" in use:
        for key in range(rows + 1):
            stop = lo is not None and (not free[key] or d.chance(0.04))
            if stop:
                spans.append((lo, key))
                lo = None
            if lo is None and free[key] and d.chance(busy * 0.2):
                lo = key
    if d.chance(0.1):
        spans.append((rows // 2,) * 2)  # an empty range is no entry at all
    d.random.shuffle(spans)
    d.random.shuffle(units)
    return spans, units


def _by_hand(
    d: _Draw, batch: int, heads: int, Tq: int, Tk: int, tile: int, unit: int
) -> tuple[Plan, Callable]:
    fields: dict[str, Any] = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit}
    fields["causal"], fields["include_self"] = d.chance(0.5), d.chance(0.75)
    if d.chance(0.4):
        by_head = d.chance(0.4)
        fields["window"], fields["sink"] = (
            _head_rules(d, heads) if by_head else (_window(d), d.pick((0, 1, 5)))
        )
    if d.chance(0.3):
        fields["q_offset"] = d.pick(
            (d.int(-9, 9), torch.tensor(d.int(-9, 9), dtype=torch.int32), d.ints(-9, 9, batch))
        )
    if d.chance(0.5):
        fields["q_order"] = _order(d, *d.axes(batch, heads), Tq)
    if d.chance(0.5):
        fields["k_order"] = _order(d, *d.axes(batch, heads), Tk)
    for name, make, T in (
        ("q_pos", _positions, Tq),
        ("k_pos", _positions, Tk),
        ("k_end", _positions, Tk),
        ("q_seg", _segments, Tq),
        ("k_seg", _segments, Tk),
    ):
        if d.chance(0.25):
            fields[name] = make(d, *d.axes(batch, heads), T)
    bare = Plan(**fields, **_no_spans(fields))
    # the lists: entries first, then which of them are full everywhere their list is used
    b, h = d.axes(batch, heads)
    R, use = bare.tiles, d.pick(("spans", "units", "spans and units", "spans and units"))
    entries = [[[_row(d, bare.k_rows, unit, use) for _ in range(R)] for _ in range(h)] for _ in range(b)]
    sure = _always(bare, batch, heads, b, h)
    often = d.pick((0.0, 0.7, 1.0))
    spans, index, bits = [], [], []
    lists = {
        n: np.zeros((b, h, R), dtype=np.int64)
        for n in ("span_start", "span_full", "span_count", "start", "full", "count", "bits_start")
    }
    pad = d.pick((0, 0, 2))  # unused room between the lists, holding anything
    with_bits = "units" in use and d.chance(0.4)
    cells = [(i, j, r) for i in range(b) for j in range(h) for r in range(R)]
    d.random.shuffle(cells)
    for at in cells:
        i, j, r = at
        own_spans, own_units = entries[i][j][r]
        ranges = [(u * unit, (u + 1) * unit) for u in own_units]
        for kind, items, reach, pool in (
            ("span_", own_spans, own_spans, spans),
            ("", own_units, ranges, index),
        ):
            whole = [
                hi <= bare.k_rows and bool(sure[i][j][r][lo:hi].all()) and d.chance(often) for lo, hi in reach
            ]
            first = [x for x, w in zip(items, whole) if w]
            rest = [x for x, w in zip(items, whole) if not w]
            lists[f"{kind}start"][at], lists[f"{kind}full"][at] = len(pool), len(first)
            lists[f"{kind}count"][at] = len(items)
            pool += [*first, *rest, *[(-7, 10**6) if kind else -1] * pad]
            if not kind and with_bits:
                lists["bits_start"][at] = len(bits)
                bits += [d.ints(-(2**31), 2**31 - 1, tile, -(-unit // 32)) for _ in rest]
    wide = ("span_start", "start", "bits_start")
    made = {n: torch.from_numpy(x if n in wide else x.astype(np.int32)) for n, x in lists.items()}
    if "spans" in use or spans:
        fields |= {n: made[n] for n in ("span_start", "span_full", "span_count")}
        fields["spans"] = torch.tensor(spans, dtype=torch.int32).view(-1, 2)
    if "units" in use:
        fields |= {n: made[n] for n in ("start", "full", "count")}
        fields["index"] = torch.tensor(index, dtype=torch.int32)
    if with_bits:
        fields["bits_start"] = made["bits_start"]
        fields["bits"] = (
            torch.stack(bits) if bits else torch.zeros(0, tile, -(-unit // 32), dtype=torch.int32)
        )
    plan = Plan(**fields)
    return plan, lambda: torch.from_numpy(by_definition(plan))


def _no_spans(fields: dict[str, Any]) -> dict[str, Tensor]:
    rows = fields["Tq"] if fields.get("q_order") is None else fields["q_order"].shape[-1]
    R = -(-rows // fields["tile"])
    return {
        "span_start": torch.zeros(1, 1, R, dtype=torch.int64),
        "spans": torch.zeros(0, 2, dtype=torch.int32),
        **{n: torch.zeros(1, 1, R, dtype=torch.int32) for n in ("span_full", "span_count")},
    }


def _always(plan: Plan, batch: int, heads: int, b: int, h: int) -> list[list[list[np.ndarray]]]:
    """Per list and tile, the key rows that every real query row sees, in every batch slot and head."""
    found = [
        [[np.ones(plan.k_rows, dtype=bool) for _ in range(plan.tiles)] for _ in range(h)] for _ in range(b)
    ]
    own_batch, own_heads = plan.extent()
    for i in range(batch):
        for j in range(heads):
            of = (i if own_batch > 1 else 0, j * own_heads // heads)
            q, k = (
                tokens(plan.q_order, plan.Tq, *of, own_heads),
                tokens(plan.k_order, plan.Tk, *of, own_heads),
            )
            real, sees = _formula(plan, q, k, *of)
            for r in range(plan.tiles):
                part = slice(r * plan.tile, (r + 1) * plan.tile)
                cell = found[i if b > 1 else 0][j * h // heads]
                cell[r] &= (sees[part] | ~real[part, None]).all(0) & (k >= 0)
    return found


def _of(x: Tensor, b: int, h: int, heads: int) -> np.ndarray:
    return x[b if x.shape[0] > 1 else 0, h * x.shape[1] // heads].numpy().astype(np.int64)


def tokens(order: Tensor | None, T: int, b: int, h: int, heads: int) -> np.ndarray:
    """Token of each row, -1 for an empty lane."""
    if order is None:
        return np.arange(T, dtype=np.int64)
    return _of(order, b, h, heads)


def _formula(plan: Plan, q: np.ndarray, k: np.ndarray, b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """(which rows hold a real token, the formula of `docs/design.md` for rows x key rows), bits apart."""
    heads = plan.extent()[1]

    def at(x: Tensor | None, token: np.ndarray, default: np.ndarray | int) -> np.ndarray:
        if x is None:
            return np.broadcast_to(default, token.shape)
        return _of(x, b, h, heads)[token] if x.shape[-1] else np.zeros_like(token)

    offset = plan.q_offset
    if isinstance(offset, Tensor):
        offset = int(offset.reshape(-1)[b if offset.numel() > 1 else 0])
    q_pos, k_pos = at(plan.q_pos, q, q + offset)[:, None], at(plan.k_pos, k, k)[None]
    q_seg, k_seg = at(plan.q_seg, q, ANY), at(plan.k_seg, k, ANY)
    real_q, real_k = (q >= 0) & (q_seg != NONE), (k >= 0) & (k_seg != NONE)
    sees = real_q[:, None] & real_k[None]
    if plan.causal:
        sees &= q_pos >= k_pos
    if not plan.include_self:
        sees &= q_pos != k_pos
    if plan.window is not None:
        left, right = (2**40 if w is None else w for w in plan.window)
        sees &= ((q_pos - k_pos <= left) & (k_pos - q_pos <= right)) | (k_pos < plan.sink)
    if plan.head_window is not None:
        left, right = (2**40 if w < 0 else w for w in _of(plan.head_window, b, h, heads))
        sink = 0 if plan.head_sink is None else int(_of(plan.head_sink, b, h, heads)[0])
        sees &= ((q_pos - k_pos <= left) & (k_pos - q_pos <= right)) | (k_pos < sink)
    if plan.k_end is not None:
        sees &= q_pos < at(plan.k_end, k, 0)[None]
    sees &= (q_seg[:, None] == k_seg[None]) | (q_seg[:, None] == ANY) | (k_seg[None] == ANY)
    return real_q, sees


def by_definition(plan: Plan) -> np.ndarray:
    """The mask of a plan, bool [B, H, Tq, Tk], read off its lists one entry and row at a time."""
    batch, heads = plan.extent()
    mask = np.zeros((batch, heads, plan.Tq, plan.Tk), dtype=bool)
    for b in range(batch):
        for h in range(heads):
            q, k = tokens(plan.q_order, plan.Tq, b, h, heads), tokens(plan.k_order, plan.Tk, b, h, heads)
            _, sees = _formula(plan, q, k, b, h)
            for r in range(plan.tiles):
                rows = range(r * plan.tile, min((r + 1) * plan.tile, len(q)))
                ranges: list[tuple[int, int, np.ndarray | None]] = []
                if plan.spans is not None:
                    start, count = (int(_of(x, b, h, heads)[r]) for x in (plan.span_start, plan.span_count))
                    ranges += [
                        (int(lo), int(hi), None) for lo, hi in plan.spans[start : start + count].tolist()
                    ]
                if plan.index is not None:
                    start, full, count = (
                        int(_of(x, b, h, heads)[r]) for x in (plan.start, plan.full, plan.count)
                    )
                    for n, unit in enumerate(plan.index[start : start + count].tolist()):
                        word = None
                        if plan.bits is not None and n >= full:
                            word = plan.bits[int(_of(plan.bits_start, b, h, heads)[r]) + n - full].numpy()
                        ranges.append((unit * plan.unit, min((unit + 1) * plan.unit, len(k)), word))
                for lo, hi, word in ranges:
                    lane = np.arange(hi - lo)
                    for row in rows:
                        seen = sees[row, lo:hi]
                        if word is not None:
                            seen = seen & (word[row - r * plan.tile, lane // 32] >> (lane % 32) & 1 != 0)
                        if seen.any():
                            mask[b, h, q[row], k[lo:hi][seen]] = True
    return mask


# ---------------------------------------------------------------- the generator

KINDS: dict[str, Callable[..., tuple[Plan, Callable]]] = {
    "dense": _dense,
    "window": lambda d, *a: _dense(d, *a, window=_window(d)),
    "sink": lambda d, *a: _dense(d, *a, window=_window(d), sink=d.pick((1, 4, 70))),
    "offset": lambda d, *a: _dense(d, *a, window=d.pick((None, _window(d))), sink=d.pick((0, 3)), shift=True),
    "keep": _keep,
    "buckets": _buckets,
    "documents": _documents,
    "mask": _mask,
    "blocks": _blocks,
    "spans": _spans,
    "heads": _heads,
    "pool": _pool,
    "slashes": _slashes,
    "lives": _lives,
    "members": _members,
    "lists": _by_hand,
}


def example(
    seed: int,
    kind: str | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    Tq: int | None = None,
    Tk: int | None = None,
    tile: int | None = None,
    unit: int | None = None,
) -> Example:
    """A random plan from a seed; whatever is not given is drawn too.

    Parameters
    ----------
    kind : str, optional
        One of `KINDS`.
    batch, heads : int
        Batch size and query heads of the tensors it is for; the plan's own axes are 1, a divisor, or those.
    Tq, Tk, tile, unit : int, optional
        As in `Plan`.
    """
    d = _Draw(seed)
    kind = d.pick(tuple(KINDS)) if kind is None else kind
    Tq = d.pick(LENGTHS) if Tq is None else Tq
    Tk = (Tq if d.chance(0.5) else d.pick(LENGTHS)) if Tk is None else Tk
    tile = d.pick(TILES) if tile is None else tile
    unit = d.pick(UNITS) if unit is None else unit
    plan, formula = KINDS[kind](d, batch, heads, Tq, Tk, tile, unit)
    line = f"plans.example({seed}, {kind!r}, {batch=}, {heads=}, {Tq=}, {Tk=}, {tile=}, {unit=})"
    return Example(plan, formula, line, kind == "pool")
