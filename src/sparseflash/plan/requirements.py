"""Requirements on a plan's fields: types, shapes, dtypes, devices. `checks` checks the values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .options import is_count, is_length, joint
from .record import FLAT, LISTS, Record

_ORDERS = ("q_order", "k_order")
_TOKENS = {"q_pos": "Tq", "q_seg": "Tq", "k_pos": "Tk", "k_end": "Tk", "k_seg": "Tk"}
_HEADS = {"head_window": 2, "head_sink": 1}
_TENSORS = ("spans", "index", "bits", "overflow", *LISTS, *_ORDERS, *_TOKENS, *_HEADS)
_INT64 = {"span_start", "start", "bits_start"}


def faults(p: Record) -> Iterator[str]:
    """Yield an error message for each wrong type, shape, dtype or device; `checks` then checks values."""
    for name in ("Tq", "Tk"):
        if not is_length(getattr(p, name)):
            yield f"{name}={getattr(p, name)!r}: expected an int >= 0 of 32 bits"
    for name in ("tile", "unit"):
        if not is_length(getattr(p, name), 1):
            yield f"{name}={getattr(p, name)!r}: expected a positive int of 32 bits"
    for name in ("causal", "include_self"):
        if not isinstance(getattr(p, name), bool):
            yield f"{name}={getattr(p, name)!r}: expected True or False"
    if not is_count(p.sink):
        yield f"sink={p.sink!r}: expected an int >= 0"
    for name in _TENSORS:
        x = getattr(p, name)
        if x is not None and not isinstance(x, Tensor):
            yield f"{name} is a {type(x).__name__}: expected a tensor, or None"
    for group in (("span_start", "span_full", "span_count", "spans"), ("start", "full", "count", "index")):
        given = [n for n in group if getattr(p, n) is not None]
        if len(given) not in (0, 4):
            yield f"{', '.join(group)} belong together; given: {', '.join(given)}"
    if p.spans is None and p.index is None:
        yield "a plan needs lists: spans, units (index), or both"
    if (p.bits is None) != (p.bits_start is None):
        yield "bits and bits_start belong together"
    if p.bits is not None and p.index is None:
        yield "bits describe partial units: they need start, full, count, index"
    yield from _of_tensors(p)
    yield from _of_lists(p)


def _of_tensors(p: Record) -> Iterator[str]:
    device = p.device
    for name, x in p.tensors().items():
        wide = torch.int64 if name in _INT64 else torch.int32
        if x.dtype != wide:
            yield f"{name} has dtype {x.dtype}: expected {wide}; try {name}.to({wide})"
        if x.device != device:
            yield f"{name} is on {x.device}, the lists on {device}: move them to one device"
        if name in _ORDERS:
            if x.dim() != 3:
                yield f"{name} {list(x.shape)}: expected [B, H, rows]"
        elif name in _TOKENS:
            T = getattr(p, _TOKENS[name])
            if x.dim() != 3 or x.shape[2] != T:
                yield f"{name} {list(x.shape)}: expected [B, H, {T} tokens]"
    for name, n in _HEADS.items():
        x = getattr(p, name)
        if x is not None and not (x.dim() == 3 and x.shape[0] == 1 and x.shape[2] == n):
            yield f"{name}: expected [1, H, {n}]"
    if p.head_window is not None and p.window is not None:
        yield "window and head_window: give one (a tensor [H] in window makes head_window)"
    if p.head_sink is not None and p.head_window is None:
        yield "head_sink needs head_window"


def _of_lists(p: Record) -> Iterator[str]:
    for name in LISTS:
        x = getattr(p, name)
        if x is not None and not (x.dim() == 3 and x.shape[2] == p.tiles):
            yield f"{name} {list(x.shape)}: expected [B, H, {p.tiles} tiles]"
    if p.spans is not None and not (p.spans.dim() == 2 and p.spans.shape[1] == 2):
        yield f"spans {list(p.spans.shape)}: expected [Ns, 2]"
    if p.overflow is not None and p.overflow.dim():
        yield f"overflow {list(p.overflow.shape)}: expected one number, 0-d"
    if p.index is not None and p.index.dim() != 1:
        yield f"index {list(p.index.shape)}: expected [Nu]"
    if p.bits is not None:
        want = (p.tile, -(-p.unit // 32))
        if p.bits.dim() != 3 or tuple(p.bits.shape[1:]) != want:
            yield f"bits {list(p.bits.shape)}: expected [Nb, tile={want[0]}, {want[1]} words of 32 keys]"
    for names in (LISTS[:3], LISTS[3:]):
        shapes = [tuple(x.shape) for n in names if (x := getattr(p, n)) is not None]
        if any(x != shapes[0] for x in shapes):
            yield f"{', '.join(names)} differ in shape: {sorted(set(shapes))}"
    laid = {n: x for n, x in p.tensors().items() if n not in FLAT}
    batches = {n: x.shape[0] for n, x in laid.items()}
    if isinstance(p.q_offset, Tensor) and p.q_offset.dim():
        batches["q_offset"] = p.q_offset.shape[0]
    if joint(batches.values()) is None:
        yield f"batch axes {batches}: expected 1 or one common size"
    if not all(x.shape[1] > 0 for x in laid.values()):
        yield "a head axis of size 0: one list for all heads has size 1"
