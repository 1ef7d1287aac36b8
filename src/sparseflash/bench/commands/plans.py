"""Commands about plans: what they cost, when they pay, and masks that become one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .app import (
    RESULTS,
    Dtype,
    Dtypes,
    Length,
    Lengths,
    Minutes,
    Out,
    Rounds,
    bench,
    dtypes_of,
    integers,
    known,
    lengths_of,
    words,
)

PANEL = "Plans"


@bench.command("breakeven", rich_help_panel=PANEL)
def bench_breakeven(
    out: Out = RESULTS / "breakeven.csv",
    lengths: Lengths = "512,1024,2048,4096",
    dims: Annotated[str, typer.Option(help="Dimensions of a head, separated by commas.")] = "32,64,128",
    dtypes: Dtypes = "fp32",
    rounds: Rounds = 25,
    minutes: Minutes = 6.0,
) -> None:
    """Find the densities below which sparse beats dense here, and the costs for sparseflash.explain."""
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
    print(f"{costs.save()}: costs for sparseflash.explain")


@bench.command("plan-costs", rich_help_panel=PANEL)
def bench_plan_costs(
    out: Out = RESULTS / "plan-costs.csv",
    length: Length = 16384,
    rounds: Rounds = 3,
    minutes: Minutes = 3.0,
) -> None:
    """Time making, preparing and using plans: lists against the dense path, spans against units."""
    from sparseflash.bench import plan_costs
    from sparseflash.bench.session import session

    columns = ("case", "ms", "ms_make", "ms_make_and_prepare", "share", "against", "ratio")
    measure = partial(plan_costs.measure, length=length, rounds=rounds, minutes=minutes)
    session("plan costs", out, measure, columns)


@bench.command("masks", rich_help_panel=PANEL)
def bench_masks(
    out: Out = RESULTS / "masks.csv",
    lengths: Lengths = "2048,4096,8192,16384",
    cases: Annotated[str, typer.Option(help="Masks, separated by commas; by default all.")] = "",
    dtype: Dtype = "fp32",
    rounds: Rounds = 3,
    minutes: Minutes = 12.0,
    flex: Annotated[bool, typer.Option(help="Also run compiled FlexAttention.")] = True,
) -> None:
    """Compare attention under boolean masks with torch SDPA and FlexAttention, making the plans included."""
    from sparseflash.bench import masks
    from sparseflash.bench.session import session

    dtypes_of(dtype)
    options = {"lengths": lengths_of(lengths), "cases": known("cases", masks.CASES, words(cases))}
    options |= {"dtype": dtype, "rounds": rounds, "minutes": minutes, "flex": flex}
    columns = ("case", "T", "tiles", "ms_sdpa", "ms", "ratio", "over_dense", "ms_build", "ratio_flex")
    columns += ("build_share", "build_share_eager", "note")
    session("masks", out, partial(masks.measure, **options), columns)


@bench.command("coverage", rich_help_panel=PANEL)
def bench_coverage(
    out: Out = RESULTS / "coverage.csv",
    lengths: Lengths = "512,1024,2048,4096",
    capture: Annotated[Path | None, typer.Option(help="Also on the queries of a capture.")] = None,
) -> None:
    """Measure which share of the equal-bucket pairs hash-sparse attention and Reformer attend."""
    import torch

    from sparseflash.bench import coverage
    from sparseflash.bench.capture import inputs
    from sparseflash.bench.session import session

    real = None if capture is None else inputs(capture, dtype=torch.float32)
    measure = partial(coverage.measure, lengths=lengths_of(lengths), captured=real)
    session("coverage", out, measure, ("case", "inputs", "T", "nb", "coverage"))
