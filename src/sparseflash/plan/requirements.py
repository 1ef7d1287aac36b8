"""What the fields of a plan must be: types, shapes, dtypes, devices. `checks` looks at values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .options import is_count, is_length
from .record import FLAT, LISTS, Record

_ORDERS = ("q_order", "k_order")
_TOKENS = {"q_pos": "Tq", "q_seg": "Tq", "k_pos": "Tk", "k_end": "Tk", "k_seg": "Tk"}
_HEADS = {"head_window": 2, "head_sink": 1}
_TENSORS = ("spans", "index", "bits", "overflow", *LISTS, *_ORDERS, *_TOKENS, *_HEADS)
_INT64 = {"span_start", "start", "bits_start"}


def requirements(p: Record) -> Iterator[tuple[bool, str]]:
    """Table of (condition, message): types, shapes, dtypes and devices; values come after."""
    for name in ("Tq", "Tk"):
        yield (
            is_length(getattr(p, name)),
            f"{name}={getattr(p, name)!r}: expected an int >= 0 of 32 bits",
        )
    for name in ("tile", "unit"):
        fits = is_length(getattr(p, name), 1)
        yield fits, f"{name}={getattr(p, name)!r}: expected a positive int of 32 bits"
    for name in ("causal", "include_self"):
        yield isinstance(getattr(p, name), bool), f"{name}={getattr(p, name)!r}: expected True or False"
    yield is_count(p.sink), f"sink={p.sink!r}: expected an int >= 0"
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
    for name in LISTS:
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
    alike: tuple[tuple[str, ...], ...] = (LISTS[:3], LISTS[3:])
    for names in alike:
        shapes = {tuple(x.shape) for n in names if (x := getattr(p, n)) is not None}
        yield len(shapes) <= 1, f"{', '.join(names)} differ in shape: {sorted(shapes)}"
    laid = {n: x for n, x in p.tensors().items() if n not in FLAT}
    batches = {n: x.shape[0] for n, x in laid.items()}
    if isinstance(p.q_offset, Tensor) and p.q_offset.dim():
        batches["q_offset"] = p.q_offset.shape[0]
    yield len(set(batches.values()) - {1}) <= 1, f"batch axes {batches}: expected 1 or one common size"
    yield (
        all(x.shape[1] > 0 for x in laid.values()),
        "a head axis of size 0: one list for all heads has size 1",
    )
