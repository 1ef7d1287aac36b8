"""Tensors and plans as the C structures of `native/abi.h`: addresses, strides, sizes; nothing is copied."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.options import narrow

# Tensors that kernels write are in main memory, whatever `torch.set_default_device` says.
empty, zeros = (functools.partial(make, device=torch.device("cpu")) for make in (torch.empty, torch.zeros))
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SMALL = 1_500_000  # multiply-adds of S = Q K^T below which waking threads costs more than it saves


class View(ctypes.Structure):
    """SfView: a [B,H,T,D] tensor."""

    _fields_ = [("data", ctypes.c_void_p)] + [(n, ctypes.c_int64) for n in ("batch", "head", "row", "lane")]


class Table(ctypes.Structure):
    """SfTable: a plan tensor [batch, heads, length]."""

    _fields_ = [("data", ctypes.c_void_p)] + [(n, ctypes.c_int64) for n in ("batch", "heads", "length")]


_PLAN_INTS = (
    "q_rows",
    "k_rows",
    "tiles",
    "tile",
    "unit",
    "causal",
    "include_self",
    "windowed",
    "left",
    "right",
    "sink",
    "q_offset",
    "spans_size",
    "index_size",
    "bits_size",
)
_PLAN_TABLES = (
    "span_start",
    "span_full",
    "span_count",
    "start",
    "full",
    "count",
    "bits_start",
    "q_order",
    "k_order",
    "q_shift",
    "q_pos",
    "k_pos",
    "k_end",
    "q_seg",
    "k_seg",
)
_PLAN_FLAT = ("spans", "index", "bits")
_PLAN_HEADS = ("head_window", "head_sink")
_PLAN_TENSORS = tuple(
    (name, torch.int64 if name in ("span_start", "start", "bits_start") else torch.int32)
    for name in (*_PLAN_TABLES, *_PLAN_HEADS)
    if name != "q_shift"
)
FAR = 1 << 40  # larger than any position
_VIEWS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")


class Record(ctypes.Structure):
    """SfRecord."""

    _fields_ = [(n, ctypes.c_int32) for n in ("bytes", "kept", "item", "reserved")]


class NativePlan(ctypes.Structure):
    """SfPlan."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in _PLAN_INTS]
        + [(n, Table) for n in _PLAN_TABLES]
        + [(n, ctypes.c_void_p) for n in _PLAN_FLAT]
        + [(n, Table) for n in _PLAN_HEADS]
    )


class Call(ctypes.Structure):
    """SfCall."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("B", "Hq", "Hkv", "Tq", "Tk", "D", "Dv")]
        + [(n, ctypes.c_int32) for n in ("dtype", "out_dtype", "grad_dtype", "threads")]
        + [(n, ctypes.c_float) for n in ("scale", "softcap")]
        + [(n, View) for n in _VIEWS]
        + [
            ("lse", ctypes.c_void_p),
            ("norm", ctypes.c_void_p),
            ("dlse", ctypes.c_void_p),
            ("key_bias", Table),
            ("dbias", ctypes.c_void_p),
        ]
        + [("plan", NativePlan)]
        + [
            ("Bk", ctypes.c_int64),
            ("over", ctypes.c_int32),
            ("peak", ctypes.c_int32),
            ("stat", ctypes.c_void_p),
        ]
        + [("stat_width", ctypes.c_int64), ("entry_width", ctypes.c_int64)]
        + [("weights", ctypes.c_int32), ("out_scale", ctypes.c_float), ("delta", ctypes.c_void_p)]
        + [
            ("dropout_seed", ctypes.c_int64),
            ("dropout_bar", ctypes.c_uint32),
            ("dropout_scale", ctypes.c_float),
        ]
        + [("skipped", ctypes.c_void_p), ("skip_below", ctypes.c_float)]
        + [("stat_tile", ctypes.c_int64), ("stat_unit", ctypes.c_int64)]
        + [("alibi", Table), ("pair", View), ("pair_dtype", ctypes.c_int32), ("dpair", ctypes.c_void_p)]
        + [("distance", Table), ("ddistance", ctypes.c_void_p)]
        + [("k_record", Record), ("v_record", Record)]
        + [("q_number", Table), ("k_number", Table), ("first_head", ctypes.c_int64)]
    )


class Decode(ctypes.Structure):
    """SfDecode."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("calls", ctypes.POINTER(Call)),
        ("plans", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("sink", ctypes.c_void_p),
    ]


def aligned(x: Tensor, alive: list[Tensor]) -> Tensor:
    """x, or a copy added to `alive` if x is not aligned to its items (`torch.frombuffer`, mapped files)."""
    if x.data_ptr() % x.element_size():
        x = x.clone()
        alive.append(x)
    return x


def view(x: Tensor) -> View:
    """Address and strides of a [B,H,T,D] tensor."""
    return View(x.data_ptr(), *x.stride())


def _misfit(name: str, x: Tensor, want: str) -> ValueError:
    return ValueError(
        f"the plan's {name} is {list(x.shape)} {x.dtype}: expected {want} (plan.check() says more)"
    )


def table(name: str, x: Tensor, dtype: torch.dtype, alive: list[Tensor]) -> Table:
    """Address and shape of a [batch,heads,length] tensor; a copy, if one is needed, is added to `alive`."""
    if x.dtype is not dtype or x.dim() != 3:
        raise _misfit(name, x, f"[B,H,length] {dtype}")
    shape = x.shape
    if not x.is_contiguous():
        x = x.contiguous()
        alive.append(x)
    x = aligned(x, alive)
    if not x.numel():  # an empty table is not a missing one: it needs a non-null address
        x = x.new_zeros(1)
        alive.append(x)
    return Table(x.data_ptr(), *shape)


def fill_plan(plan: Plan, into: NativePlan, alive: list[Tensor]) -> None:
    """Write a plan into its C structure."""
    into.q_rows, into.k_rows, into.tiles = plan.q_rows, plan.k_rows, plan.tiles
    into.tile, into.unit = tile, unit = plan.tile, plan.unit
    into.causal, into.include_self, into.sink = plan.causal, plan.include_self, min(plan.sink, FAR)
    if plan.window is not None:
        left, right = plan.window
        into.windowed = True
        into.left = -1 if left is None else min(left, FAR)
        into.right = -1 if right is None else min(right, FAR)
    given = vars(plan)
    offset = given["q_offset"]
    if isinstance(offset, Tensor):
        flat = narrow(offset, "q_offset holds").reshape(-1, 1, 1)
        if flat.data_ptr() != offset.data_ptr():
            alive.append(flat)
        into.q_shift = table("q_offset", flat, torch.int32, alive)
    else:
        into.q_offset = max(-FAR, min(offset, FAR))
    for name, dtype in _PLAN_TENSORS:
        x = given[name]
        if x is not None:
            setattr(into, name, table(name, x, dtype, alive))
    for name in _PLAN_FLAT:
        x = given[name]
        if x is not None:
            if x.dtype is not torch.int32:
                raise _misfit(name, x, "torch.int32")
            if not x.is_contiguous():
                x = x.contiguous()
                alive.append(x)
            x = aligned(x, alive)
            # number of entries that the memory holds, whatever the tensor's shape says
            words = 1 if name == "index" else 2 if name == "spans" else tile * -(-unit // 32)
            setattr(into, name, x.data_ptr())
            setattr(into, name + "_size", x.numel() // words if words > 0 else 0)


def names_all(plan: Plan) -> bool:
    """True if every query token has a row: kernels then write all results, and nothing needs clearing."""
    order = plan.q_order
    return order is None or bool(((order >= 0).sum(-1) == plan.Tq).all())


_Ask = list[Callable[[], int]]
_known: dict[int, tuple[weakref.ref[Plan], NativePlan, _Ask, list[int]]] = {}


def _native(plan: Plan, alive: list[Tensor]) -> NativePlan:
    """The plan as a C structure; cached if it only points into the plan's tensors.

    A plan that is seen for the first time is not cached: most plans of a decode method serve one call.
    A tensor may get other memory behind our back (`share_memory_`, `set_`, `resize_`, `.data =`, a plan sent
    to another process): the cached structure is valid while every tensor has the same address and size.
    """
    at = id(plan)
    known = _known.get(at)
    met = known is not None and known[0]() is plan
    if known is not None and met and known[2] and [ask() for ask in known[2]] == known[3]:
        return known[1]
    made, copies = NativePlan(), len(alive)
    fill_plan(plan, made, alive)
    if not met:
        _known[at] = (weakref.ref(plan, lambda gone: _forget(at, gone)), made, [], [])
    elif len(alive) == copies:
        asked = [ask for x in plan.tensors().values() for ask in (x.data_ptr, x.numel, x.is_contiguous)]
        answers = [ask() for ask in asked]
        _known[at] = (weakref.ref(plan, lambda gone: _forget(at, gone)), made, asked, answers)
    return made


def _forget(at: int, gone: weakref.ref[Plan]) -> None:
    if at in _known and _known[at][0] is gone:
        del _known[at]


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    alive: list[Tensor],
) -> Call:
    """The call structure of an op over a plan, without results. `alive` must outlive the call."""
    c = Call()
    c.B, c.Hq, c.Tq, c.D = q.shape
    c.Bk, c.Hkv, c.Tk, c.Dv = k.shape[0], k.shape[1], k.shape[2], v.shape[3]
    c.dtype = c.out_dtype = c.grad_dtype = CODES[q.dtype]
    keys = plan.Tk if plan.spans is not None else 0
    keys += 0 if plan.index is None else plan.index.shape[0] * plan.unit
    work = c.B * c.Hq * c.Tq * c.D * min(c.Tk, keys)
    c.threads = 1 if work < SMALL else max(1, torch.get_num_threads())
    c.scale, c.softcap = scale, softcap
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % q.element_size():
        q, k, v = (aligned(x, alive) for x in (q, k, v))
    c.q, c.k, c.v = view(q), view(k), view(v)
    if key_bias is not None:
        bias = key_bias.to(torch.float32).contiguous()
        alive.append(bias)
        c.key_bias = table("key_bias", bias, torch.float32, alive)
    c.plan = _native(plan, alive)
    return c
