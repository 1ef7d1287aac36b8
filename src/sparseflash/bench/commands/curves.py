"""Commands about this machine: time over sequence length, and the density at which sparse breaks even."""

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
    Lengths,
    Minutes,
    Out,
    Rounds,
    bench,
    dtypes_of,
    integers,
    lengths_of,
)

PANEL = "This machine"


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


@bench.command("breakeven", rich_help_panel=PANEL)
def bench_breakeven(
    out: Out = RESULTS / "breakeven.csv",
    lengths: Lengths = "512,1024,2048,4096",
    dims: Annotated[str, typer.Option(help="Dimensions of a head, separated by commas.")] = "32,64,128",
    dtypes: Dtypes = "fp32",
    rounds: Rounds = 25,
    minutes: Minutes = 6.0,
) -> None:
    """Find the densities below which sparse beats dense here, and fit the costs of sparseflash.predict."""
    from sparseflash.bench import breakeven, figures, results
    from sparseflash.bench.session import show, watch

    options = {
        "lengths": lengths_of(lengths),
        "dims": integers(dims, "32,64", least=1),
        "dtypes": dtypes_of(dtypes),
    }
    rows = watch("breakeven", out, partial(breakeven.measure, **options, rounds=rounds, minutes=minutes))
    costs = breakeven.fitted(rows)
    rows = list(breakeven.predicted(rows, costs))
    results.write(out, rows)
    edges = breakeven.edges(rows)
    results.write(out.with_stem(f"{out.stem}-edges"), edges)
    show(edges, out, ("case", "T", "direction", "dtype", "edge", "note"))
    figures.redraw(out)
    off = sorted(abs(row["off"]) for row in rows if row["held_out"])
    middle, close = off[len(off) // 2], sum(x <= 0.25 for x in off) / len(off)
    print(
        f"gain predicted for {len(off)} points left out of the fit: off by {middle:.0%} in the median, "
        f"{close:.0%} of them by at most 25 %, {off[-1]:.0%} at most"
    )
    print(f"{costs.save()}: costs for sparseflash.predict")
