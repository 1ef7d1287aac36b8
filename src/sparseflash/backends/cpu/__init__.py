"""Native CPU backend: exact flash attention over any plan, forward and backward, fp32, bf16 and fp16."""

from __future__ import annotations

import ctypes
import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import Plan
from ...plan.flat import empty_like_layout
from . import build

NAME = "cpu"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SMALL = 3_000_000  # multiply-adds below which waking other threads costs more than it brings


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
_FAR = 1 << 40  # further than any position
_VIEWS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")


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
    )


@dataclass(frozen=True)
class Native:
    """The loaded library and which of its levels runs which dtype."""

    library: ctypes.CDLL
    path: str
    fp32: int
    bf16: int
    names: tuple[str, ...]


@functools.cache
def native() -> Native | str:
    """The native library, or the reason why there is none (said once as a warning).

    Raises
    ------
    LevelError
        When `SPARSEFLASH_CPU_LEVEL` asks for what cannot be: whoever names a level wants no other one.
    """
    failure = "no level runs here"
    try:
        for levels in build.choices():
            try:
                library, path = build.library(levels)
            except build.CompilerFailed as error:  # too old for these instructions: there are simpler ones
                failure = str(error)
                continue
            if library.sf_call_size() != ctypes.sizeof(Call):
                raise build.BuildError(f"{path} does not match this version")
            if levels[-1].name == "amx" and library.sf_request_amx() != 0:
                continue  # the system refuses the tile registers
            bf16 = next((i for i, level in enumerate(levels) if level.bf16), 0)
            return Native(library, str(path), 0, bf16, tuple(level.name for level in levels))
    except (build.BuildError, OSError) as error:
        failure = str(error)
    warnings.warn(
        f"sparseflash: the native CPU backend is not available, the slow reference runs instead: {failure}",
        RuntimeWarning,
        stacklevel=2,
    )
    return failure


def status() -> tuple[bool, str]:
    """Whether the native library is there; which levels, or why not."""
    try:
        found = native()
    except build.LevelError as error:
        return False, str(error)
    if isinstance(found, str):
        return False, found
    return True, f"fp32 and fp16: {found.names[found.fp32]}, bf16: {found.names[found.bf16]}, {found.path}"


def refuse(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> list[str]:
    """Reasons why a call cannot run here."""
    reasons = []
    if q.device.type != "cpu":
        reasons.append(f"tensors are on {q.device}")
    if q.dtype not in CODES:
        reasons.append(f"dtype {q.dtype} (fp32, bf16, fp16 run here)")
    if reasons:
        return reasons
    found = native()
    return [found] if isinstance(found, str) else []


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), *x.stride())


def _misfit(name: str, x: Tensor, want: str) -> ValueError:
    return ValueError(
        f"the plan's {name} is {list(x.shape)} {x.dtype}: expected {want} (plan.check() says more)"
    )


def _table(name: str, x: Tensor, dtype: torch.dtype, keep: list[Tensor]) -> Table:
    if x.dtype is not dtype or x.dim() != 3:
        raise _misfit(name, x, f"[B,H,length] {dtype}")
    shape = x.shape
    if not x.is_contiguous():
        x = x.contiguous()
        keep.append(x)
    if not x.numel():  # a table of nothing is not a missing table: it needs an address
        x = x.new_zeros(1)
        keep.append(x)
    return Table(x.data_ptr(), *shape)


def _native_plan(plan: Plan, into: NativePlan, keep: list[Tensor]) -> None:
    into.q_rows, into.k_rows, into.tiles = plan.q_rows, plan.k_rows, plan.tiles
    into.tile, into.unit = tile, unit = plan.tile, plan.unit
    into.causal, into.include_self, into.sink = plan.causal, plan.include_self, min(plan.sink, _FAR)
    if plan.window is not None:
        left, right = plan.window
        into.windowed = True
        into.left = -1 if left is None else min(left, _FAR)
        into.right = -1 if right is None else min(right, _FAR)
    given = vars(plan)
    offset = given["q_offset"]
    if isinstance(offset, Tensor):
        flat = offset.to(torch.int32).reshape(-1, 1, 1)
        keep.append(flat)
        into.q_shift = _table("q_offset", flat, torch.int32, keep)
    else:
        into.q_offset = offset
    for name, dtype in _PLAN_TENSORS:
        x = given[name]
        if x is not None:
            setattr(into, name, _table(name, x, dtype, keep))
    for name in _PLAN_FLAT:
        x = given[name]
        if x is not None:
            if x.dtype is not torch.int32:
                raise _misfit(name, x, "torch.int32")
            if not x.is_contiguous():
                x = x.contiguous()
                keep.append(x)
            # how many entries of their size the memory holds, whatever its shape says
            words = 1 if name == "index" else 2 if name == "spans" else tile * -(-unit // 32)
            setattr(into, name, x.data_ptr())
            setattr(into, name + "_size", x.numel() // words if words > 0 else 0)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    keep: list[Tensor],
) -> Call:
    c = Call()
    c.B, c.Hq, c.Tq, c.D = q.shape
    c.Bk, c.Hkv, c.Tk, c.Dv = k.shape[0], k.shape[1], k.shape[2], v.shape[3]
    c.dtype = c.out_dtype = c.grad_dtype = CODES[q.dtype]
    entries = 0 if plan.spans is None else plan.spans.shape[0]
    entries += 0 if plan.index is None else plan.index.shape[0]
    work = c.B * c.Hq * c.Tq * c.D * min(c.Tk, 64 * max(entries, 1))
    c.threads = 1 if work < SMALL else max(1, torch.get_num_threads())
    c.scale, c.softcap = scale, softcap
    c.q, c.k, c.v = _view(q), _view(k), _view(v)
    if key_bias is not None:
        bias = key_bias.to(torch.float32).contiguous()
        keep.append(bias)
        c.key_bias = _table("key_bias", bias, torch.float32, keep)
    _native_plan(plan, c.plan, keep)
    return c


_CODES_OF_FAILURE = {
    1: (MemoryError, "not enough memory for the scratch of this call"),
    2: (RuntimeError, "this level does not run the dtype"),
    3: (ValueError, "the plan does not fit the tensors (plan.check() says where)"),
    4: (RuntimeError, "an exception inside the native code"),
}


def _run(name: str, call: Call, dtype: torch.dtype) -> None:
    found = native()
    if isinstance(found, str):
        raise RuntimeError(found)
    level = found.bf16 if dtype == torch.bfloat16 else found.fp32
    code = getattr(found.library, name)(ctypes.byref(call), level)
    if code:
        kind, why = _CODES_OF_FAILURE.get(code, (RuntimeError, f"code {code}"))
        raise kind(f"sparseflash native {name}: {why}")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,Tq,Dv] of `out_dtype` and lse fp32 [B,Hq,Tq]."""
    keep: list[Tensor] = []
    call = _call(q, k, v, plan, scale, softcap, key_bias, keep)
    out = empty_like_layout(q, v.shape[-1], out_dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    if plan.q_order is not None:  # tokens that no row names see nothing
        out.zero_()
        lse.fill_(float("-inf"))
    call.out_dtype = CODES[out_dtype]
    call.out, call.lse = _view(out), lse.data_ptr()
    _run("sf_forward", call, q.dtype)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv (of the input's dtype, or `grad_dtype`) and dbias [B,Hq,Tk] in fp32."""
    keep: list[Tensor] = []
    call = _call(q, k, v, plan, scale, softcap, key_bias, keep)
    wanted = grad_dtype or q.dtype
    dout, out = dout.to(q.dtype), out if out.dtype in CODES else out.to(q.dtype)
    lse = lse.to(torch.float32).contiguous()
    make = torch.empty if plan.q_order is None else torch.zeros
    dq = make(q.shape, dtype=wanted)
    dk, dv = torch.empty(k.shape, dtype=wanted), torch.empty(v.shape, dtype=wanted)
    call.out_dtype, call.grad_dtype = CODES[out.dtype], CODES[wanted]
    call.out, call.dout = _view(out), _view(dout)
    call.dq, call.dk, call.dv = _view(dq), _view(dk), _view(dv)
    call.lse = lse.data_ptr()
    if dlse is not None:
        dlse = dlse.to(torch.float32).contiguous()
        call.dlse = dlse.data_ptr()
    dbias = None
    if key_bias is not None:
        dbias = torch.empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)
        call.dbias = dbias.data_ptr()
    _run("sf_backward", call, q.dtype)
    return dq, dk, dv, dbias


OVER = {"key": 0, "row": 1, "entry": 2, "diagonal": 3}


def stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: Plan,
    *,
    over: str,
    peak: bool,
    scale: float,
    softcap: float,
    key_bias: Tensor | None,
    width: int,
) -> Tensor:
    """Sums (or maxima) of P = exp(S - lse) over each key, row, list entry or diagonal: fp32 [B,Hq,width]."""
    keep: list[Tensor] = []
    call = _call(q, k, k, plan, scale, softcap, key_bias, keep)
    call.v = View()
    lse = lse.to(torch.float32).contiguous()
    found = torch.empty((q.shape[0], q.shape[1], width), dtype=torch.float32)
    call.lse, call.stat = lse.data_ptr(), found.data_ptr()
    call.over, call.peak, call.stat_width = OVER[over], peak, width
    call.entry_width = width // max(plan.tiles, 1) if over == "entry" else 0
    _run("sf_stats", call, q.dtype)
    return found
