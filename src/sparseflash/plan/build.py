"""Constructors of `Plan`, on plain tensors: each returns the fields of a plan as a dictionary.

None of them touches Tq x Tk, and none loops over rows or heads.
Positions, ranges and orders come from prefix sums and sorted searches, O(T log T) at most.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, require

Fields = dict[str, Any]
Window = tuple[int | None, int | None]

TILE = 128
UNIT = 128
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_count(x: object, least: int = 0) -> bool:
    """Whether x is an int (no bool) of at least that much; a symbolic size counts."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool) and x >= least


def is_length(x: object, least: int = 0) -> bool:
    """Whether x counts tokens: all tensors of a plan are int32."""
    return is_count(x, least) and x < 2**31  # type: ignore[operator]


def _check_options(**options: Any) -> None:
    for name, x in options.items():
        if name in ("tile", "unit"):
            require((is_length(x, 1), f"{name}={x!r}: expected a positive int of 32 bits"), error=PlanError)
        else:
            require((isinstance(x, bool), f"{name}={x!r}: expected True or False"), error=PlanError)


def host(x: Tensor) -> bool:
    """Whether values may be looked at: they lie in main memory, and this is no trace of a later run."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


SHORT = torch.iinfo(torch.int32)
"""What the tensors of a plan hold, and so what a position, a length and a number of a unit can be."""

FARTHEST = 2**32 - 1
"""No two positions are further apart."""


def fit(x: Tensor, said: str, least: int, most: int, want: str = "expected {least}..{most}") -> Tensor:
    """x, whose values lie in least..most: refused where they can be seen, elsewhere moved to the nearest.

    The message is `said` (such as "lengths hold"), the values, and what is wanted; filled in only then, since
    a number in a message would pin a symbolic length.
    """
    if not host(x):
        return (x if x.dtype in (torch.int32, torch.int64) else x.int()).clamp(least, most)
    if x.numel():
        low, high = (int(end) for end in torch.aminmax(x))
        if low < least or high > most:
            raise PlanError(f"{said} {low}..{high}: {want.format(least=least, most=most)}")
    return x


def narrow(x: Tensor, said: str = "") -> Tensor:
    """Integers as int32, never modulo 2^32, and without waiting for a device.

    With `said` (as in `fit`), a value that does not fit is refused where it can be seen. Without, and
    elsewhere, it becomes the nearest that does: "never" and "unbounded" are any large number.
    """
    if x.dtype == torch.int64:
        want = "expected integers of 32 bits"
        x = fit(x, said, SHORT.min, SHORT.max, want) if said else x.clamp(SHORT.min, SHORT.max)
    return x.int()


def normal_window(window: Window | None) -> Window | None:
    """Validate a window; `None` and -1 both mean unbounded on that side."""
    if window is None:
        return None
    require(
        (
            isinstance(window, (tuple, list)) and len(window) == 2,
            f"window={window!r}: expected (left, right)",
        ),
        error=PlanError,
    )
    sides = tuple(None if w is None or (is_count(w, -1) and w == -1) else w for w in window)
    for side in sides:
        require(
            (
                side is None or is_count(side),
                f"window={window!r}: distances are counts of tokens >= 0, or None (or -1) for unbounded",
            ),
            error=PlanError,
        )
    left, right = sides
    if left is not None and left > FARTHEST:
        left = None
    if right is not None and right > FARTHEST:
        right = None
    return None if left is None and right is None else (left, right)


def head_rules(window: Any, sink: Any) -> tuple[Window | None, int, Tensor | None, Tensor | None]:
    """Split a window and a sink that may hold a tensor [H] into numbers, and tables [1,H,2] and [1,H,1]."""
    sides = tuple(window) if isinstance(window, (tuple, list)) and len(window) == 2 else ()
    given = [x for x in (*sides, sink) if isinstance(x, Tensor)]
    if not given:
        return normal_window(window), min(sink, 2**31) if is_count(sink) else sink, None, None
    for x in given:
        require(
            (
                x.dim() == 1 and x.shape[0] > 0 and x.dtype in INTEGERS,
                f"window and sink per head: expected integers [H], got {_shape(x)} {x.dtype}",
            ),
            error=PlanError,
        )
    heads = math.lcm(*[x.shape[0] for x in given])

    def table(x: Any, far: int) -> Tensor:
        if isinstance(x, Tensor):
            want = "distances are counts of tokens >= 0, or -1 for unbounded"
            x = fit(x, "window or sink per head holds", -1, torch.iinfo(x.dtype).max, want)
            if x.dtype == torch.int64:
                x = torch.where(x > SHORT.max, far, x)
            return spread_heads(narrow(x)[None], heads)
        require(
            (x is None or is_count(x, -1), f"{x!r}: expected a count, None or a tensor [H]"), error=PlanError
        )
        x = -1 if x is None else far if x > SHORT.max else x
        return torch.full((1, heads), x, dtype=torch.int32, device=given[0].device)

    pair = torch.stack([table(x, -1) for x in (sides or (None, None))], -1)
    return None, 0, pair, table(sink, SHORT.max)[..., None]


def normal_offset(q_offset: int | Tensor) -> int | Tensor:
    """Validate a `q_offset`; a tensor becomes int32."""
    if isinstance(q_offset, Tensor):
        require(
            (
                q_offset.dtype in INTEGERS and q_offset.dim() <= 1,
                f"q_offset: {_shape(q_offset)} {q_offset.dtype}; expected an int, or int32, 0-d or [B]",
            ),
            error=PlanError,
        )
        return narrow(q_offset, "q_offset holds")
    fits = isinstance(q_offset, torch.SymInt) or (is_count(q_offset, -(2**31)) and q_offset < 2**31)
    require((fits, f"q_offset={q_offset!r}: expected an int of 32 bits, or an int32 tensor"), error=PlanError)
    return q_offset


def earlier(q_offset: int | Tensor, n: int) -> int | Tensor:
    """An offset so many tokens before; `normal_offset` says where that is too early."""
    offset = normal_offset(q_offset)
    return (offset.long() if isinstance(offset, Tensor) else offset) - n


def same_offset(a: Any, b: Any) -> bool:
    """Whether two offsets are equal, as far as that can be seen without waiting for a device."""
    given = [x for x in (a, b) if isinstance(x, Tensor)]
    if not given:
        return bool(a == b)
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in given):
        return len(given) == 2
    return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())


def spread_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat the head axis (dim 1) of a plan tensor to `heads`: list head = h * H // heads."""
    own = x.shape[1]
    if own == heads:
        return x
    if own == 1:
        return x.expand(-1, heads, *x.shape[2:])
    return x[:, torch.arange(heads, device=x.device) * own // heads]


def common_heads(*tensors: Tensor) -> int:
    """Smallest head count that every head axis (dim 1) divides."""
    return math.lcm(*(t.shape[1] for t in tensors))


def _pack_spans(lo: list[Tensor], hi: list[Tensor], full: list[bool], *, moving: bool = True) -> Fields:
    """Candidate ranges `[lo, hi)` of shape [B,H,R] as padded lists, full ones first, empty ones out.

    `moving`: from tile to tile they hardly ever jump, so that the tiles that visit a group of keys are
    neighbours.
    """
    first = torch.stack([x.expand_as(lo[0]) for x in lo], -1)
    last = torch.stack([x.expand_as(lo[0]) for x in hi], -1)
    width = len(lo)
    alive = last > first
    # filled in on the device: a tensor of a Python list would be copied there, and waited for
    kind = [torch.full_like(lo[0], int(not sure)) for sure in full]
    is_full = torch.stack(kind, -1) == 0
    rank = torch.where(alive, torch.where(is_full, 0, 1), 2)
    order = torch.argsort(rank, dim=-1, stable=True)
    pairs = torch.stack([first.gather(-1, order), last.gather(-1, order)], -1)
    pairs = pairs * (rank.gather(-1, order) < 2)[..., None]
    rows = first[..., 0].numel()
    start = torch.arange(rows, device=first.device) * width
    return {
        "span_start": start.view(first.shape[:-1]),
        "span_full": (alive & is_full).sum(-1, dtype=torch.int32),
        "span_count": alive.sum(-1, dtype=torch.int32),
        "spans": pairs.reshape(-1, 2).to(torch.int32),
        "span_room": width if moving else 0,
    }


def _band(
    first: Tensor,
    last: Tensor,
    low: Tensor | int,
    high: Tensor | int,
    *,
    causal: bool,
    window: Any,
    sink: int | Tensor,
    include_self: bool = True,
    live: Tensor | None = None,
) -> Fields:
    """Spans of tiles whose rows sit at positions `first..last`, over keys at positions `low..high-1`.

    Row p sees `[p-left, p+right]` (right = 0 when causal, -1 without itself) and the sink; the union over the
    tile's rows is visited, the intersection is full.
    """
    left, right = window or (None, None)
    if causal:
        right = 0 if include_self else -1
    low = low.expand_as(first) if isinstance(low, Tensor) else torch.full_like(first, low)
    high = high.expand_as(first) if isinstance(high, Tensor) else torch.full_like(first, high)

    def clamp(x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, low), high)

    outer_lo = low if left is None else clamp(first - left)
    inner_lo = low if left is None else clamp(last - left)
    outer_hi = high if right is None else clamp(last + right + 1)
    inner_hi = high if right is None else clamp(first + right + 1)
    if live is not None:  # tiles without a real row visit nothing
        outer_hi, inner_hi = torch.where(live, outer_hi, low), torch.where(live, inner_hi, low)
        outer_lo, inner_lo = torch.where(live, outer_lo, low), torch.where(live, inner_lo, low)
    whole = inner_lo < inner_hi  # otherwise no key is seen by all rows: one partial range
    a, b = torch.where(whole, inner_lo, outer_hi), torch.where(whole, inner_hi, outer_hi)
    lo, hi, full = [a, outer_lo, b], [b, a, outer_hi], [True, False, False]
    if window is not None and (isinstance(sink, Tensor) or sink):  # sinks outside the band: all rows see them
        edge = clamp(sink.expand_as(low) if isinstance(sink, Tensor) else torch.full_like(low, sink))
        lo, hi, full = [low, *lo], [torch.minimum(edge, outer_lo), *hi], [True, *full]
        if not causal and right is not None:
            lo, hi, full = [outer_hi, *lo], [edge, *hi], [True, *full]
        if live is not None:
            hi = [torch.where(live, x, low) for x in hi]
    return _pack_spans(lo, hi, full)


def dense(
    Tq: int,
    Tk: int,
    *,
    causal: bool = False,
    window: Any = None,
    sink_tokens: int | Tensor = 0,
    q_offset: int | Tensor = 0,
    tile: int = TILE,
    unit: int = UNIT,
    device: torch.device | str | None = None,
) -> Fields:
    """Fields of `Plan.dense`."""
    _check_options(causal=causal, tile=tile, unit=unit)
    if not (is_length(Tq) and is_length(Tk)):  # said only on failure: a message would pin a symbolic length
        raise PlanError(f"Tq={Tq!r}, Tk={Tk!r}: lengths are ints >= 0, of 32 bits")
    require(
        (
            isinstance(sink_tokens, Tensor) or is_count(sink_tokens),
            f"sink_tokens={sink_tokens!r}: expected an int >= 0, or a tensor [H]",
        ),
        error=PlanError,
    )
    window, sink, head_window, head_sink = head_rules(window, sink_tokens)
    q_offset = normal_offset(q_offset)
    if head_window is not None and device is None:
        device = head_window.device
    if isinstance(q_offset, Tensor):
        device = q_offset.device if device is None else device
        q_offset = q_offset.to(device)
        shift = q_offset.to(torch.int64).reshape(-1, 1, 1)
    else:
        shift = torch.full((1, 1, 1), q_offset, dtype=torch.int64, device=device)
    row = torch.arange(0, Tq, tile, device=device)
    first = row + shift
    last = torch.clamp(row + tile, max=Tq) - 1 + shift
    band: Any = window
    exempt: int | Tensor = sink
    if head_window is not None and head_sink is not None:
        head_window, head_sink = head_window.to(device), head_sink.to(device)
        wide = torch.where(head_window < 0, 1 << 40, head_window.long())
        band, exempt = (wide[..., :1], wide[..., 1:]), head_sink.long()
        first, last = (x.expand(-1, head_window.shape[1], -1) for x in (first, last))
    fields = _band(first, last, 0, Tk, causal=causal, window=band, sink=exempt)
    return {
        "head_window": head_window,
        "head_sink": head_sink,
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        "window": window,
        "sink": sink if window else 0,
        "q_offset": q_offset,
        **fields,
    }


def _compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Order that lists the kept tokens first, in time order (-1 behind), and the exclusive prefix count."""
    *lead, T = keep.shape
    seen = torch.nn.functional.pad(keep.cumsum(-1), (1, 0))
    token = torch.arange(T, device=keep.device, dtype=torch.int32).expand(keep.shape)
    rows = T
    if host(keep):  # no device to wait for: leave out the lanes that no head uses
        rows = int(seen[..., -1].max()) if seen.numel() else 0
    order = torch.full((*lead, rows + 1), -1, dtype=torch.int32, device=keep.device)
    order.scatter_(-1, torch.where(keep, seen[..., :-1], rows), token)
    order[..., rows] = -1  # whatever was dropped landed here
    return order[..., :rows], seen


def _as_keep(x: Tensor, name: str) -> Tensor:
    require(
        (isinstance(x, Tensor) and x.dim() == 3, f"{name}: expected [B|1, H|1, T], got {_shape(x)}"),
        error=PlanError,
    )
    require(
        (
            x.dtype in (torch.bool, torch.uint8),
            f"{name} has dtype {x.dtype}: expected bool (or uint8), True = keep; try {name} = {name} > 0",
        ),
        error=PlanError,
    )
    return x.bool()


def _shape(x: object) -> str:
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _same_batch(a: Tensor, b: Tensor, names: str) -> int:
    """The common batch size (0 of an empty batch) of two plan tensors on one device."""
    batch = b.shape[0] if a.shape[0] == 1 else a.shape[0]
    require(
        (
            a.shape[0] in (1, batch) and b.shape[0] in (1, batch),
            f"{names}: batch sizes {a.shape[0]} and {b.shape[0]}; expected one size, or 1",
        ),
        (a.shape[1] > 0 and b.shape[1] > 0, f"{names}: {a.shape[1]} and {b.shape[1]} heads; expected some"),
        (a.device == b.device, f"{names} are on {a.device} and {b.device}: move them to one device"),
        error=PlanError,
    )
    return batch


def from_keep(
    q_keep: Tensor,
    k_keep: Tensor,
    *,
    causal: bool = True,
    include_self: bool = True,
    tile: int = TILE,
    unit: int = UNIT,
) -> Fields:
    """Fields of `Plan.from_keep`."""
    _check_options(causal=causal, include_self=include_self, tile=tile, unit=unit)
    q_keep, k_keep = _as_keep(q_keep, "q_keep"), _as_keep(k_keep, "k_keep")
    batch = _same_batch(q_keep, k_keep, "q_keep, k_keep")
    Tq, Tk = q_keep.shape[-1], k_keep.shape[-1]
    q_order, _ = _compact(q_keep)
    k_order, k_seen = _compact(k_keep)
    heads = common_heads(q_keep, k_keep)
    order = spread_heads(q_order, heads).expand(batch, -1, -1)
    seen = spread_heads(k_seen, heads).expand(batch, -1, -1)
    first, last, live = _tile_ends(order, tile)
    total = seen[..., -1:].expand_as(first)
    if causal:  # kept keys not later than a row: a prefix of the compact keys
        reach = seen.gather(-1, (last + int(include_self)).clamp(0, Tk))
        sure = seen.gather(-1, (first + int(include_self)).clamp(0, Tk))
    else:
        reach = total
        sure = total if include_self else torch.zeros_like(total)
    zero = torch.zeros_like(reach)
    reach, sure = torch.where(live, reach, zero), torch.where(live, sure, zero)
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        "include_self": include_self,
        "q_order": q_order,
        "k_order": k_order,
        **_pack_spans([zero, sure], [sure, reach], [True, False]),
    }


def _tile_ends(order: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token of the first and last real row of each tile of `order` [B,H,rows]; tokens ascend in a tile."""
    *lead, rows = order.shape
    padded = torch.nn.functional.pad(order, (0, -rows % tile), value=-1).view(*lead, -(-rows // tile), tile)
    real = padded >= 0
    last = padded.amax(-1).long()
    first = torch.where(real, padded, torch.iinfo(torch.int32).max).amin(-1).long()
    live = last >= 0
    return torch.where(live, first, 0), torch.where(live, last, 0), live


def _edge_rows(new_run: Tensor, tile: int) -> Tensor:
    """Row of each element when every run is padded to whole tiles; `new_run` [..., T] marks run starts."""
    at = torch.arange(new_run.shape[-1], device=new_run.device).expand(new_run.shape)
    begin = torch.where(new_run, at, 0).cummax(-1).values
    before = torch.nn.functional.pad(begin[..., :-1], (1, 0))  # start of the run that ends here
    gap = torch.where(new_run & (at > 0), -(at - before) % tile, 0)
    return at + gap.cumsum(-1)


def _as_bucket(x: Tensor, name: str) -> Tensor:
    require(
        (isinstance(x, Tensor) and x.dim() == 3, f"{name}: expected [B|1, H|1, T], got {_shape(x)}"),
        error=PlanError,
    )
    require(
        (
            x.dtype in INTEGERS,
            f"{name} has dtype {x.dtype}: expected integer bucket ids; try {name}.long() (NaN has no bucket)",
        ),
        error=PlanError,
    )
    return x


def _in_bucket_order(x: Tensor) -> tuple[Tensor, Tensor]:
    """Ids in ascending order and their tokens, in time order inside a bucket, along the last axis."""
    *lead, T = x.shape
    if host(x) and x.numel():
        # all lists as one of small numbers: such a sort counts instead of comparing
        low, high = (int(end) for end in torch.aminmax(x))
        lists, width = x.numel() // T, high - low + 1
        if lists * width < 2**62:
            base = torch.arange(lists, device=x.device)[:, None]
            key = (x.reshape(lists, T).long() - low + base * width).flatten()
            values, at = (key.int() if lists * width < 2**31 else key).sort(stable=True)
            label = values.view(lists, T).long() - (base * width - low)
            return label.view(x.shape), (at.view(lists, T) - base * T).view(x.shape)
    label, token = x.long().sort(dim=-1, stable=True)
    return label, token


def _begins(label: Tensor) -> Tensor:
    """Where a run of equal labels begins, along the last axis."""
    edge = label[..., 1:] != label[..., :-1]
    return torch.nn.functional.pad(edge, (1, 0), value=True)[..., : label.shape[-1]]


def from_buckets(
    q_bucket: Tensor,
    k_bucket: Tensor,
    *,
    causal: bool = True,
    include_self: bool = True,
    tile: int = TILE,
    unit: int = UNIT,
    buckets: int | None = None,
    q_offset: int | Tensor = 0,
) -> Fields:
    """Fields of `Plan.from_buckets`."""
    q_offset = normal_offset(q_offset)
    q_bucket, k_bucket = _as_bucket(q_bucket, "q_bucket"), _as_bucket(k_bucket, "k_bucket")
    _check_options(causal=causal, include_self=include_self, tile=tile, unit=unit)
    require(
        (buckets is None or is_count(buckets, 1), f"buckets={buckets!r}: expected a positive int, or None"),
        error=PlanError,
    )
    batch = _same_batch(q_bucket, k_bucket, "q_bucket, k_bucket")
    if batch == 1 and isinstance(q_offset, Tensor) and q_offset.dim():
        batch = len(q_offset)
    Tq, Tk = q_bucket.shape[-1], k_bucket.shape[-1]
    q_label, q_token = _in_bucket_order(q_bucket)
    k_label, k_token = (q_label, q_token) if q_bucket is k_bucket else _in_bucket_order(k_bucket)

    # queries: every bucket begins a tile of its own
    row = _edge_rows(_begins(q_label), tile)
    if buckets is not None and not host(row):
        rows = Tq + buckets * (tile - 1)
    else:
        rows = int(row[..., -1].max()) + 1 if row.numel() else 0
    rows = -(-rows // tile) * tile
    q_order = torch.full((*q_label.shape[:2], rows), -1, dtype=torch.int32, device=row.device)
    q_order.scatter_(-1, row, q_token.int())
    label = torch.zeros((*q_label.shape[:2], rows // tile), dtype=torch.int64, device=row.device)
    label.scatter_(-1, row.div(tile, rounding_mode="floor"), q_label)  # all rows of a tile carry one label

    # keys: the range of the label, cut at the last (first) row's position; (begin of its run, token) ascends
    heads = math.lcm(q_order.shape[1], k_label.shape[1])

    def wide(x: Tensor) -> Tensor:
        return spread_heads(x, heads).expand(batch, -1, -1).contiguous()

    first, last, live = (wide(x) for x in _tile_ends(q_order, tile))
    label, labels = wide(label), wide(k_label)
    begin, end = torch.searchsorted(labels, label), torch.searchsorted(labels, label, right=True)
    if causal:
        at = torch.arange(Tk, device=row.device)
        run = torch.where(_begins(k_label), at, 0).cummax(-1).values if Tk else k_label
        keys, side = wide(run << 31 | k_token), "right" if include_self else "left"
        shift = q_offset.long().reshape(-1, 1, 1) if isinstance(q_offset, Tensor) else q_offset
        first, last = ((edge + shift).clamp(-1, 2**31 - 1) for edge in (first, last))
        reach, sure = (
            torch.minimum(torch.searchsorted(keys, (begin << 31) + edge, side=side), end)
            for edge in (last, first)
        )
    else:
        reach, sure = end, end if include_self else begin
    begin, reach, sure = (torch.where(live, x, 0) for x in (begin, reach, sure))
    return {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": causal,
        "include_self": include_self,
        "q_offset": q_offset,
        "q_order": q_order,
        "k_order": k_token.int(),
        **_pack_spans([begin, sure], [sure, reach], [True, False]),
    }


def pack_bits(cells: Tensor) -> Tensor:
    """Bool [N, tile, unit] to int32 words [N, tile, ceil(unit/32)], key j in bit j % 32 of word j // 32."""
    wide = torch.nn.functional.pad(cells, (0, -cells.shape[-1] % 32))
    return pack_words(wide.contiguous().view(torch.uint8).view(torch.int64).clone())


_GATHER = 0x0102040810204080  # takes bit 8 i of a word to bit 56 + i; no two bits meet


def pack_words(words: Tensor) -> Tensor:
    """`pack_bits` of words of eight keys: int64 [N, tile, 4 n], overwritten, to int32 [N, tile, n]."""
    packed = words.mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)
    return packed.view(torch.int32)


def unpack_bits(words: Tensor, unit: int) -> Tensor:
    """Inverse of `pack_bits`."""
    lane = torch.arange(unit, device=words.device)
    return (words[..., lane // 32] >> (lane % 32)) & 1 != 0
