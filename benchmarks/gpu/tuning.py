"""Blocks of the kernels: a bounded list of candidates, timed, and the table that the launcher reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

import sparseflash as sf
from sparseflash import Plan
from sparseflash.backends.triton import blocks as library
from sparseflash.backends.triton.blocks import Blocks, Case
from sparseflash.bench.results import Row, read

from . import rivals
from .device import DEVICE, DRY, generator, tensors, times
from .task import Task

KERNELS = ("rows", "rows, backward", "columns", "decode")
DTYPES = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)
DIMS = (16,) if DRY else (64, 128, 256)
UNITS = (16,) if DRY else (0, 128)
BETTER = 0.97
"""What a candidate has to take of the default's time, to be worth a row."""


def candidates(kernel: str, dim: int) -> list[Blocks]:
    """What is tried: the larger sides only where the head dimension leaves room."""
    if kernel == "decode":  # rows are as many as there are
        sizes = [
            (keys, warps, stages)
            for keys in (32, 64, 128, 256)
            for warps in (2, 4, 8)
            for stages in (1, 2, 3, 4)
        ]
        few = [
            Blocks(64, keys, warps, stages) for keys, warps, stages in sizes if keys * dim * stages <= 2**15
        ]
        return few[:1] if DRY else few
    shapes = [(128, 64), (64, 64), (128, 32), (64, 32), (64, 128), (128, 128), (32, 64), (32, 32)]
    room = 128 * 128 * 128 if kernel == "rows" else 64 * 128 * 128
    able = [(rows, keys) for rows, keys in shapes if max(rows, keys) * dim * min(rows, keys) <= room]
    found = [
        Blocks(rows, keys, warps, stages, registers)
        for rows, keys in able
        for warps, registers in ((4, 255), (8, 255), (8, 128))
        for stages in (1, 2, 3)
        if (warps == 8) == (rows * keys >= 64 * 64) and (registers == 255 or dim <= 64)
    ]
    return found[:1] if DRY else found


def tune() -> list[Task]:
    """A task for each row that the table may have."""
    return [
        Task(
            {"kernel": kernel, "dim": dim, "unit": unit, "dtype": str(dtype)[6:]},
            functools.partial(_tune, kernel, dim, unit, dtype),
        )
        for dtype in DTYPES
        for dim in DIMS
        for unit in UNITS
        for kernel in KERNELS
    ]


def _tune(kernel: str, dim: int, unit: int, dtype: torch.dtype) -> Iterator[Row]:
    """Times with every candidate; of the backward's two kernels the other one stays as it is."""
    few = kernel == "decode"
    T, heads = (32, 1) if DRY else (65536 if few else 8192, 16)
    Tq = 1 if few else T
    q, k, v, dout = tensors(1, heads, T, dim, dtype=dtype, Tq=Tq)
    if unit:
        chance = generator(0)
        keep = torch.rand(1, heads, -(-Tq // unit), T // unit, generator=chance, device=DEVICE) < 0.5
        plan = Plan.from_blocks(keep, Tq=Tq, Tk=T, tile=unit, unit=unit)
    else:
        plan = Plan.dense(Tq, T, causal=not few, device=DEVICE)
    if few:
        q, k, v = q.detach(), k.detach(), v.detach()
    attend = rivals.ours(plan.prepare())
    out = None if few else attend(q, k, v)

    def call() -> Any:
        if few:
            return sf.decode(q, k, v, plan)
        if kernel == "rows":
            with torch.no_grad():
                return attend(q, k, v)
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    def under(one: Blocks) -> Callable[[], Any]:
        def run() -> Any:
            with library.trying(kernel, one):
                return call()

        return run

    case = Case(kernel, max(16, dim), unit, str(dtype)[6:])
    default = library.choose(case, heavy=False)
    tried = list(dict.fromkeys([default, *candidates(kernel, dim)]))
    found = times({str(n): under(one) for n, one in enumerate(tried)}, rounds=7, seconds=20)
    for n, one in enumerate(tried):
        row: Row = {"architecture": library.architecture(), "default": one == default}
        yield row | asdict(one) | {"ms": found[str(n)].ms, "error": found[str(n)].error}


def write_table(path: Path) -> str:
    """Make the committed table of what a card measured; what it says of other cards stays."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: run the stage `tune` first")
    best: dict[tuple[str, Case], tuple[float, Blocks]] = {}
    usual: dict[tuple[str, Case], float] = {}
    for row in read(path):
        if not row.get("ms"):
            continue
        ms = float(row["ms"])
        case = Case(row["kernel"], int(row["dim"]), int(row["unit"]), row["dtype"])
        one = Blocks(*(int(row[f.name]) for f in fields(Blocks)))
        key = (row["architecture"], case)
        if row["default"] == "True":
            usual[key] = ms
        best[key] = min(best.get(key, (ms, one)), (ms, one), key=lambda x: x[0])
    cards = {name for name, _ in best}
    rows = {key: one for key, one in library.tuned().items() if key[0] not in cards}
    rows |= {key: one for key, (ms, one) in best.items() if ms < BETTER * usual.get(key, float("inf"))}
    library.write_tuned(rows)
    return f"{library.TABLE}: {len(rows)} rows, {len(best) - len(rows)} cases keep their default"
