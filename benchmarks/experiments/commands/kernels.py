"""Commands that time kernels: attention on the same tensors, against torch."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from sparseflash.bench.commands.app import (
    Dtypes,
    Minutes,
    Out,
    Rounds,
    dtypes_of,
    known,
    words,
)

from .app import RESULTS, Length, experiments

PANEL = "Kernels"


@experiments.command("attention-table", rich_help_panel=PANEL)
def bench_attention_table(
    out: Out = RESULTS / "attention-table.csv",
    length: Length = 8192,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 7,
    minutes: Minutes = 5.0,
) -> None:
    """Compare our dense, hash-sparse and QK-sparse attention with torch SDPA on the same tensors."""
    from sparseflash.bench.session import session

    from .. import table

    options = {"length": length, "dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "ms_sdpa", "ms", "ratio", "rounds")
    session("attention table", out, partial(table.measure, **options), columns)


@experiments.command("kernel-table", rich_help_panel=PANEL)
def bench_kernel_table(
    out: Out = RESULTS / "kernel-table.csv",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare the kernels under given plans (dense, blocks, single keys) with dense torch SDPA."""
    from sparseflash.bench.session import session

    from .. import kernels

    options = {"dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "T", "heads", "dim", "density", "ms_sdpa", "ms", "ratio")
    session("kernel table", out, partial(kernels.measure, **options), columns)


@experiments.command("ops", rich_help_panel=PANEL)
def bench_ops(
    out: Out = RESULTS / "ops.csv",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare linear attention and stick-breaking with dense torch SDPA and with plain torch."""
    from sparseflash.bench.session import session

    from .. import ops

    options = {"dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "T", "heads", "ms_sdpa", "ms_torch", "ms", "ratio", "ratio_torch")
    session("ops", out, partial(ops.measure, **options), columns)


@experiments.command("arguments", rich_help_panel=PANEL)
def bench_arguments(
    out: Out = RESULTS / "arguments.csv",
    dtypes: Dtypes = "fp32,bf16",
    length: Length = 2048,
    threads: Annotated[int, typer.Option(min=0, help="Of all cases; 0: as torch has.")] = 1,
    rounds: Rounds = 7,
    minutes: Minutes = 8.0,
) -> None:
    """Compare calls with block maxima, skipping, dropout and biases with those without; and wide heads."""
    from sparseflash.bench.session import session

    from .. import arguments

    options = {"dtypes": dtypes_of(dtypes), "length": length, "threads": threads, "rounds": rounds}
    columns = ("case", "dtype", "T", "dim", "direction", "ms_twin", "ms", "ratio")
    session("arguments", out, partial(arguments.measure, **options, minutes=minutes), columns)


@experiments.command("short", rich_help_panel=PANEL)
def bench_short(
    out: Out = RESULTS / "short.csv",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 7,
    minutes: Minutes = 2.0,
) -> None:
    """Compare calls on 16, 128 and 512 tokens with dense torch SDPA, in microseconds."""
    from sparseflash.bench.session import session

    from .. import short

    options = {"dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("dtype", "T", "heads", "dim", "us_sdpa", "us", "ratio")
    session("short", out, partial(short.measure, **options), columns)


@experiments.command("decode", rich_help_panel=PANEL)
def bench_decode(
    out: Out = RESULTS / "decode.csv",
    mib: Annotated[int, typer.Option(min=1, help="Keys and values in use, MiB.")] = 64,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare how fast decode reads its cache with a plain read, and its time with torch SDPA."""
    from sparseflash.bench.session import session

    from .. import decode

    options = {"mib": mib, "dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "group", "dim", "gbs_read", "gbs", "share", "ms_sdpa", "ms", "ratio")
    session("decode", out, partial(decode.measure, **options), columns)


@experiments.command("records", rich_help_panel=PANEL)
def bench_records(
    out: Out = RESULTS / "records.csv",
    mib: Annotated[int, typer.Option(min=1, help="Keys and values, MiB.")] = 64,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 9,
    minutes: Minutes = 4.0,
) -> None:
    """Compare decode over records of keys and values with decode over these themselves."""
    from sparseflash.bench.session import session

    from .. import records

    options = {"mib": mib, "dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "dim", "bytes", "roof", "ms_dense", "ms", "ratio")
    session("records", out, partial(records.measure, **options), columns)


@experiments.command("fusion", rich_help_panel=PANEL)
def bench_fusion(
    out: Out = RESULTS / "fusion.csv",
    length: Length = 4096,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 7,
    minutes: Minutes = 4.0,
) -> None:
    """Compare a gated layer as row tiles of one fused program with eager torch and torch.compile."""
    from sparseflash.bench.session import session

    from .. import fusion

    options = {"length": length, "dtypes": dtypes_of(dtypes), "rounds": rounds, "minutes": minutes}
    columns = ("case", "dtype", "T", "ms_eager", "ms", "ratio", "mib", "rounds")
    session("fusion", out, partial(fusion.measure, **options), columns)


@experiments.command("levels", rich_help_panel=PANEL)
def bench_levels(
    out: Out = RESULTS / "levels.csv",
    levels: Annotated[
        str, typer.Option(help="Names with commas between; by default all that run here.")
    ] = "",
    rounds: Rounds = 3,
    minutes: Minutes = 5.0,
) -> None:
    """Compare each instruction-set level of the CPU backend with torch SDPA held to the same instructions."""
    from sparseflash.bench.session import session

    from .. import levels as levels_

    names = known("levels", levels_.runnable(), words(levels))
    columns = ("level", "case", "dtype", "T", "dim", "ms_sdpa", "ms", "ratio")
    session("levels", out, partial(levels_.measure_levels, names, rounds=rounds, minutes=minutes), columns)
