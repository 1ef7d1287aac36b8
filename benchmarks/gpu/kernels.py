"""Kernels alone: dense, block-sparse and decoding, each over the best that is installed here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import sparseflash as sf
from sparseflash import Plan
from sparseflash.bench.results import Row

from . import rivals
from .device import AHEAD, DEVICE, DRY, DTYPE, generator, tensors, times, wait
from .task import Task

DIMS = (16,) if DRY else (64, 128)


def _rows(
    cases: dict[str, rivals.Attention], given: Any, flops: dict[str, float], rounds: int = 20
) -> Iterator[Row]:
    """Times of forward and backward, and TFLOP/s over the pairs that each case has to visit."""
    for name, (forward, backward) in rivals.both_ways(cases, given, rounds=rounds).items():
        row: Row = {"case": name, **forward.row("ms_forward"), **backward.row("ms_backward")}
        for n, found, share in (("forward", forward, 1.0), ("backward", backward, 2.5)):
            row[f"tflops_{n}"] = share * flops[name] / found.ms / 1e9 if found.ms else None
        yield row


def dense() -> list[Task]:
    """Dense causal attention, 8k to 64k."""
    return [dense_task(D, T) for D in DIMS for T in ((32,) if DRY else (8192, 16384, 32768, 65536))]


def dense_task(D: int, T: int, rounds: int = 20) -> Task:
    """Our kernels, torch's and FlexAttention, all pairs of the causal half."""
    run = functools.partial(_dense, D, T, 2 if DRY else 32, rounds if T < 32768 else 6)
    return Task({"D": D, "T": T}, run)


def _dense(D: int, T: int, heads: int, rounds: int) -> Iterator[Row]:
    given = tensors(1, heads, T, D)
    plan = Plan.dense(T, T, causal=True, device=DEVICE).prepare()
    cases = {"sparseflash": rivals.ours(plan)} | rivals.dense() | rivals.flex(plan)
    flops = dict.fromkeys(cases, 4 * heads * D * T * T / 2)
    for row in _rows(cases, given, flops, rounds=rounds):
        yield {"heads": heads} | row


def blocks() -> list[Task]:
    """Random 128 x 128 blocks of the causal half, from all of them to a tenth."""
    return [
        blocks_task(D, T, share)
        for D in DIMS
        for T in ((64,) if DRY else (16384, 32768))
        for share in ((0.5,) if DRY else (1.0, 0.5, 0.25, 0.1))
    ]


def blocks_task(D: int, T: int, share: float, rounds: int = 20, *, flex: bool = True) -> Task:
    """Our kernels over a share of the blocks, and dense ones; `flex`: FlexAttention over the same blocks."""
    run = functools.partial(_blocks, D, T, share, 1 if DRY else 32, rounds if T < 32768 else 8, flex)
    return Task({"D": D, "T": T, "share": share}, run)


def _blocks(D: int, T: int, share: float, heads: int, rounds: int, flex: bool) -> Iterator[Row]:
    given, size = tensors(1, heads, T, D), 32 if DRY else 128
    chance = generator(1)
    n = T // size
    keep = torch.rand(1, heads, n, n, generator=chance, device=DEVICE) < share
    keep |= torch.eye(n, dtype=torch.bool, device=DEVICE)

    def make() -> Plan:
        return Plan.from_blocks(keep, Tq=T, Tk=T, tile=size, unit=size, causal=True)

    plan = make()
    whole = Plan.dense(T, T, causal=True, device=DEVICE).prepare()
    density, area = 1.0 if AHEAD else plan.density, 4 * heads * D * T * T / 2
    cases = {"sparseflash": rivals.ours(plan.prepare()), "sparseflash, dense": rivals.ours(whole)}
    cases |= {f"{name}, dense": case for name, case in rivals.dense().items()}
    cases |= rivals.flex(plan) if flex else {}
    flops = {name: area if name.endswith("dense") else area * density for name in cases}
    building = times({"lists": make, "transposed": lambda: make().prepare()}, seconds=3)
    about = {"heads": heads, "density": density, "ms_lists": building["lists"].ms}
    about |= {"ms_prepared": building["transposed"].ms}
    for row in _rows(cases, given, flops, rounds=rounds):
        yield about | row


# ---------------------------------------------------------------- decoding


def decode() -> list[Task]:
    """One query a sequence over caches of 4 MB to 4 GB, and a quarter of their blocks."""
    sizes = (1,) if DRY else (4, 16, 64, 256, 1024, 4096)
    return [
        decode_task(mib, batch, group, D, layout)
        for D in (DIMS if DRY else (128, 64))
        for layout in ("contiguous", "ragged", "pages of 64", "a quarter of the blocks")
        for batch, group in (((2, 1),) if DRY else ((1, 4), (8, 4), (32, 8)))
        for mib in (sizes if layout == "contiguous" else sizes[-2:])
    ]


def decode_task(mib: int, batch: int, group: int, D: int, layout: str) -> Task:
    """One query a sequence over `mib` MiB of keys and values."""
    key: Row = {"mib": mib, "batch": batch, "group": group, "D": D, "layout": layout}
    return Task(key, functools.partial(_decode, mib, batch, group, D, layout))


def _decode(mib: int, batch: int, group: int, D: int, layout: str) -> Iterator[Row]:
    Hkv, size = (1, 16) if DRY else (8, 64)
    T = 32 if DRY else mib * 2**20 // (2 * batch * Hkv * D * DTYPE.itemsize) // size * size
    q, k, v, _ = (x.detach() for x in tensors(batch, Hkv * group, T, D, Hkv=Hkv, Tq=1))
    lengths, share = torch.full((batch,), T, device=DEVICE), 1.0
    plan, table = None, None
    if layout == "ragged":
        lengths = (T * (1 + torch.arange(batch, device=DEVICE)) / batch).int()
        share = (batch + 1) / 2 / batch
    elif layout.startswith("pages"):
        chance = generator(0)
        table = torch.randperm(batch * T // size, generator=chance, device=DEVICE).view(batch, -1)
        k, v = (x.transpose(0, 1).reshape(1, Hkv, batch * T, D) for x in (k, v))
        plan = Plan.from_pages(table, lengths, page_size=size, Tk=batch * T)
    elif layout.startswith("a quarter"):
        chance, share = generator(0), 0.25
        score = torch.rand(batch, Hkv, 1, T // size, generator=chance, device=DEVICE)
        index = score.topk(max(1, T // size // 4)).indices.sort(-1).values
        plan = Plan.from_keys(index, Tq=1, Tk=T, tile=1, unit=size, unique=True)
    visited = share * 2 * batch * Hkv * T * D * DTYPE.itemsize
    source = torch.empty(int(visited) // 2, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)  # a copy reads one half and writes the other: as many bytes in all

    def ours() -> torch.Tensor:
        return sf.decode(q, k, v, lengths if plan is None else plan)

    runs: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "sparseflash": ours}
    if DEVICE == "cuda":
        runs["sparseflash, graph"] = _graph(ours)
    if layout == "contiguous" and not AHEAD:
        runs["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    found = times(runs, rounds=30, seconds=5)
    copied = found["copy"].ms
    for name, one in found.items():
        rates: Row = {"gbs": visited / one.ms / 1e6 if one.ms else None}
        if one.ms and copied:
            rates["of_copy"] = copied / one.ms
        yield {"T": T, "case": name, "mib_visited": visited / 2**20} | one.row() | rates


def _graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """A call from a CUDA graph, captured at the first one."""
    made: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not made:
            run()
            wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            made.append(graph)
        made[0].replay()

    return replay
