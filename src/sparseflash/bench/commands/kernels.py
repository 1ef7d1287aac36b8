"""Commands that time kernels: attention on the same tensors, against torch."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from .app import (
    RESULTS,
    Dim,
    Dtype,
    Dtypes,
    Heads,
    Length,
    Lengths,
    Minutes,
    Out,
    Rounds,
    bench,
    dtypes_of,
    known,
    lengths_of,
    words,
)

PANEL = "Kernels"


@bench.command("curves", rich_help_panel=PANEL)
def bench_curves(
    out: Out = RESULTS / "curves.csv",
    minutes: Minutes = 5.0,
    lengths: Lengths = "1024,2048,4096,8192,16384",
    heads: Heads = 4,
    dim: Dim = 64,
    dtype: Dtype = "fp32",
) -> None:
    """Time attention forward + backward over the length: dense, naive, Reformer, hash- and QK-sparse."""
    from sparseflash.bench import cases, curves
    from sparseflash.bench.session import session

    dtypes_of(dtype)
    options = {"lengths": lengths_of(lengths), "minutes": minutes, "heads": heads, "dim": dim, "dtype": dtype}
    columns = ("case", "T", "ms", "speedup", "density", "recall", "note")
    session("curves", out, partial(curves.measure, cases.curves(), **options), columns)


@bench.command("attention-table", rich_help_panel=PANEL)
def bench_attention_table(
    out: Out = RESULTS / "attention-table.csv",
    length: Length = 8192,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 7,
    minutes: Minutes = 5.0,
) -> None:
    """Compare our dense, hash-sparse and QK-sparse attention with torch SDPA on the same tensors."""
    from sparseflash.bench import table
    from sparseflash.bench.session import session

    options = {"length": length, "dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "ms_sdpa", "ms", "ratio", "rounds")
    session("attention table", out, partial(table.measure, **options), columns)


@bench.command("kernel-table", rich_help_panel=PANEL)
def bench_kernel_table(
    out: Out = RESULTS / "kernel-table.csv",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare the kernels under given plans (dense, blocks, single keys) with dense torch SDPA."""
    from sparseflash.bench import kernels
    from sparseflash.bench.session import session

    options = {"dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "T", "heads", "dim", "density", "ms_sdpa", "ms", "ratio")
    session("kernel table", out, partial(kernels.measure, **options), columns)


@bench.command("ops", rich_help_panel=PANEL)
def bench_ops(
    out: Out = RESULTS / "ops.csv",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare linear attention and stick-breaking with dense torch SDPA and with plain torch."""
    from sparseflash.bench import ops
    from sparseflash.bench.session import session

    options = {"dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "T", "heads", "ms_sdpa", "ms_torch", "ms", "ratio", "ratio_torch")
    session("ops", out, partial(ops.measure, **options), columns)


@bench.command("decode", rich_help_panel=PANEL)
def bench_decode(
    out: Out = RESULTS / "decode.csv",
    mib: Annotated[int, typer.Option(min=1, help="Keys and values in use, MiB.")] = 64,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare how fast decode reads its cache with a plain read, and its time with torch SDPA."""
    from sparseflash.bench import decode
    from sparseflash.bench.session import session

    options = {"mib": mib, "dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "group", "dim", "gbs_read", "gbs", "share", "ms_sdpa", "ms", "ratio")
    session("decode", out, partial(decode.measure, **options), columns)


@bench.command("levels", rich_help_panel=PANEL)
def bench_levels(
    out: Out = RESULTS / "levels.csv",
    levels: Annotated[
        str, typer.Option(help="Names with commas between; by default all that run here.")
    ] = "",
    rounds: Rounds = 3,
    minutes: Minutes = 5.0,
) -> None:
    """Compare each instruction-set level of the CPU backend with torch SDPA held to the same instructions."""
    from sparseflash.bench import levels as levels_
    from sparseflash.bench.session import session

    names = known("levels", levels_.runnable(), words(levels))
    columns = ("level", "case", "dtype", "T", "dim", "ms_sdpa", "ms", "ratio")
    session("levels", out, partial(levels_.measure_levels, names, rounds=rounds, minutes=minutes), columns)
