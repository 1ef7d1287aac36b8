"""What `selection` estimates and picks: `native/selection.h`, `best.h`, `pages.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..numerics import Best, Heaviest, Masses, Pages, Probing, Running
from .call import CODES, SMALL, View, aligned, empty, view, zeros
from .library import run


class MassCall(ctypes.Structure):
    """SfMass."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "B", "Hq", "Hkv", "n", "m", "E", "tile", "unit")]
        + [(n, ctypes.c_int32) for n in ("dtype", "threads", "joint", "peak")]
        + [("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("rows", View), ("columns", View)]
        + [(n, ctypes.c_void_p) for n in ("sees", "keep", "level", "out")]
    )


class ProbeCall(ctypes.Structure):
    """SfProbe."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "B", "Hq", "Hkv", "n", "Tk", "D", "width", "before")]
        + [("dtype", ctypes.c_int32), ("threads", ctypes.c_int32)]
        + [("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("q", View), ("k", View)]
        + [(n, ctypes.c_void_p) for n in ("sees", "at", "keep", "lse", "keys", "distances")]
    )


class BestCall(ctypes.Structure):
    """SfBest."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "rows", "n", "k")]
        + [("threads", ctypes.c_int32)]
        + [(n, ctypes.c_void_p) for n in ("scores", "among", "index")]
    )


class HeaviestCall(ctypes.Structure):
    """SfHeaviest."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "rows", "n")]
        + [("threads", ctypes.c_int32)]
        + [(n, ctypes.c_void_p) for n in ("mass", "among", "share", "keep")]
    )


class PagesCall(ctypes.Structure):
    """SfPages."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "B", "Hq", "Hkv", "Tq", "n", "w", "pages", "parts")]
        + [(n, ctypes.c_int64) for n in ("sinks", "near", "k")]
        + [(n, ctypes.c_int32) for n in ("dtype", "threads", "share")]
        + [("rows", View)]
        + [(n, ctypes.c_void_p) for n in ("q", "last", "rules", "scores", "index")]
    )


class RunningCall(ctypes.Structure):
    """SfRunning."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("size", "rows", "T", "most")]
        + [("threads", ctypes.c_int32)]
        + [(n, ctypes.c_void_p) for n in ("x", "k", "kth", "until")]
    )


def _threads(work: int) -> int:
    return 1 if work < SMALL else max(1, torch.get_num_threads())


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def tile_mass(
    rows: Tensor,
    columns: Tensor,
    sees: Tensor,
    keep: Tensor | None,
    level: Tensor | None,
    options: Masses,
) -> Tensor:
    """Weights of rows on columns, by tile and unit: fp32 [B,Hq,R,C], each row of sum 1."""
    (B, Hq, n, E), (_, Hkv, m, _) = rows.shape, columns.shape
    alive: list[Tensor] = []
    rows, columns = aligned(rows, alive), aligned(columns, alive)
    sees = sees.to(torch.int32).contiguous()
    keep = None if keep is None else keep.to(torch.uint8).contiguous()
    level = None if level is None else aligned(level.to(torch.float32).contiguous(), alive)
    out = zeros((B, Hq, -(-n // options.tile), -(-m // options.unit)), dtype=torch.float32)
    call = MassCall(size=ctypes.sizeof(MassCall), B=B, Hq=Hq, Hkv=Hkv, n=n, m=m, E=E)
    call.tile, call.unit, call.joint, call.peak = options.tile, options.unit, options.joint, options.peak
    call.scale, call.softcap = options.scale, options.softcap
    call.dtype, call.threads = CODES[rows.dtype], _threads(B * Hq * n * m * E)
    call.rows, call.columns = view(rows), view(columns)
    call.sees, call.keep, call.level, call.out = (_address(x) for x in (sees, keep, level, out))
    run("sf_mass", call, rows.dtype)
    return out


def probe(
    q: Tensor, k: Tensor, sees: Tensor, at: Tensor, keep: Tensor | None, options: Probing
) -> tuple[Tensor, Tensor, Tensor]:
    """lse [B,Hq,n], and the sums of P by key [B,Hq,Tk] and by distance [B,Hq,width], in fp32."""
    (B, Hq, n, D), (_, Hkv, Tk, _) = q.shape, k.shape
    alive: list[Tensor] = []
    q, k = aligned(q, alive), aligned(k, alive)
    sees, at = (x.to(torch.int32).contiguous() for x in (sees, at))
    keep = None if keep is None else keep.to(torch.uint8).contiguous()
    make = empty if n and Tk else zeros
    lse, keys, distances = (make((B, Hq, w), dtype=torch.float32) for w in (n, Tk, options.width))
    if not Tk:
        lse.fill_(-torch.inf)
    call = ProbeCall(size=ctypes.sizeof(ProbeCall), B=B, Hq=Hq, Hkv=Hkv, n=n, Tk=Tk, D=D)
    call.width, call.before, call.scale, call.softcap = (
        options.width,
        options.before,
        options.scale,
        options.softcap,
    )
    call.dtype, call.threads = CODES[q.dtype], _threads(B * Hq * n * Tk * D)
    call.q, call.k = view(q), view(k)
    call.sees, call.at, call.keep = (_address(x) for x in (sees, at, keep))
    call.lse, call.keys, call.distances = (_address(x) for x in (lse, keys, distances))
    run("sf_probe", call, q.dtype)
    return lse, keys, distances


def top_indices(scores: Tensor, among: Tensor | None, options: Best) -> Tensor:
    """Indices of the k largest scores [N,n], int32 [N,k], ascending; -1 behind the last."""
    rows, n = scores.shape
    alive: list[Tensor] = []
    scores = aligned(scores.to(torch.float32).contiguous(), alive)
    among = None if among is None else among.to(torch.uint8).contiguous()
    index = empty((rows, options.k), dtype=torch.int32)
    call = BestCall(size=ctypes.sizeof(BestCall), rows=rows, n=n, k=options.k, threads=_threads(rows * n * 8))
    call.scores, call.among, call.index = (_address(x) for x in (scores, among, index))
    run("sf_best", call, torch.float32)
    return index


def heaviest(mass: Tensor, among: Tensor | None, share: Tensor, options: Heaviest) -> Tensor:
    """Which entries of mass [N,n], largest first, hold the shares [N] of their rows' sums: bool [N,n]."""
    rows, n = mass.shape
    alive: list[Tensor] = []
    mass, share = aligned(mass.to(torch.float32).contiguous(), alive), share.to(torch.float64).contiguous()
    among = None if among is None else among.to(torch.uint8).contiguous()
    keep = empty((rows, n), dtype=torch.bool)
    call = HeaviestCall(size=ctypes.sizeof(HeaviestCall), rows=rows, n=n, threads=_threads(rows * n * 8))
    call.mass, call.among, call.share, call.keep = (_address(x) for x in (mass, among, share, keep))
    run("sf_heaviest", call, torch.float32)
    return keep


def page_scores(q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages) -> Tensor:
    """Scores of pages for each query, in fp32 [B,heads,Tq,pages]."""
    heads = rows.shape[1] if options.share else q.shape[1]
    scores = empty((q.shape[0], heads, q.shape[2], -(-rows.shape[2] // options.parts)), dtype=torch.float32)
    _pages(q, rows, last, rules, options, scores, None)
    return scores


def top_pages(q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages) -> Tensor:
    """The best pages of each query, int32 [B,heads,Tq,k]."""
    heads = rows.shape[1] if options.share else q.shape[1]
    index = empty((q.shape[0], heads, q.shape[2], options.k), dtype=torch.int32)
    _pages(q, rows, last, rules, options, None, index)
    return index


def _pages(
    q: Tensor,
    rows: Tensor,
    last: Tensor,
    rules: Tensor | None,
    options: Pages,
    scores: Tensor | None,
    index: Tensor | None,
) -> None:
    (B, Hq, Tq, w), (_, Hkv, n, _) = q.shape, rows.shape
    alive: list[Tensor] = []
    q, rows = q.to(torch.float32).contiguous(), aligned(rows, alive)
    last = last.to(torch.int32).contiguous()
    rules = None if rules is None else rules.to(torch.int32).contiguous()
    call = PagesCall(size=ctypes.sizeof(PagesCall), B=B, Hq=Hq, Hkv=Hkv, Tq=Tq, n=n, w=w)
    call.pages, call.parts, call.sinks, call.near = -(-n // options.parts), *options[:3]
    call.share, call.k = ("", "sum", "max").index(options.share), options.k
    call.dtype, call.threads = CODES[rows.dtype], _threads(B * Hq * Tq * n * w)
    call.rows = view(rows)
    call.q, call.last, call.rules, call.scores, call.index = map(_address, (q, last, rules, scores, index))
    run("sf_pages", call, torch.float32)


def running_kth(x: Tensor, k: Tensor, options: Running) -> tuple[Tensor, Tensor]:
    """For x [N,T], k [N]: the k-th largest of each prefix, and where a place drops out of the k largest."""
    rows, T = x.shape
    alive: list[Tensor] = []
    x, k = aligned(x.to(torch.float32).contiguous(), alive), k.to(torch.int32).contiguous()
    kth, until = torch.empty_like(x), empty((rows, T), dtype=torch.int32)
    call = RunningCall(size=ctypes.sizeof(RunningCall), rows=rows, T=T, most=options.most)
    call.threads = _threads(rows * T * 32)
    call.x, call.k, call.kth, call.until = (_address(x) for x in (x, k, kth, until))
    run("sf_running", call, torch.float32)
    return kth, until
