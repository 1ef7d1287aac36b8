"""Commands about plans: what they cost, when they pay, and masks that become one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sparseflash.bench.commands.app import (
    Dtype,
    Lengths,
    Minutes,
    Out,
    Rounds,
    dtypes_of,
    known,
    lengths_of,
    words,
)

from .app import RESULTS, Kept, Length, experiments

PANEL = "Plans"


@experiments.command("plan-costs", rich_help_panel=PANEL)
def bench_plan_costs(
    out: Out = RESULTS / "plan-costs.csv",
    length: Length = 16384,
    rounds: Rounds = 3,
    minutes: Minutes = 3.0,
) -> None:
    """Time making, preparing and using plans: lists against the dense path, spans against units."""
    from sparseflash.bench.session import session

    from .. import plan_costs

    columns = ("case", "ms", "ms_make", "ms_make_and_prepare", "share", "against", "ratio")
    measure = partial(plan_costs.measure, length=length, rounds=rounds, minutes=minutes)
    session("plan costs", out, measure, columns)


@experiments.command("selection", rich_help_panel=PANEL)
def bench_selection(
    out: Out = RESULTS / "selection.csv",
    length: Length = 8192,
    rounds: Rounds = 5,
    plain: Annotated[bool, typer.Option(help="Also time what PyTorch alone takes.")] = True,
) -> None:
    """Time what methods select with on one thread: estimators, budgets, statistics."""
    from sparseflash.bench.session import session

    from .. import selection

    columns = ("case", "dtype", "ms", "share", "ms_plain", "ratio", "kept", "differ")
    measure = partial(selection.measure, length=length, rounds=rounds, plain=plain)
    session("selection", out, measure, columns)


@experiments.command("masks", rich_help_panel=PANEL)
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
    from sparseflash.bench.session import session

    from .. import masks

    dtypes_of(dtype)
    options = {"lengths": lengths_of(lengths), "cases": known("cases", masks.CASES, words(cases))}
    options |= {"dtype": dtype, "rounds": rounds, "minutes": minutes, "flex": flex}
    columns = ("case", "T", "tiles", "ms_sdpa", "ms", "ratio", "over_dense", "ms_build", "ratio_flex")
    columns += ("build_share", "build_share_eager", "note")
    session("masks", out, partial(masks.measure, **options), columns)


@experiments.command("coverage", rich_help_panel=PANEL)
def bench_coverage(
    out: Out = RESULTS / "coverage.csv",
    lengths: Lengths = "512,1024,2048,4096",
    capture: Annotated[Path | None, typer.Option(help="Also on the queries of a capture.")] = None,
) -> None:
    """Measure which share of the equal-bucket pairs hash-sparse attention and Reformer attend."""
    import torch

    from sparseflash.bench.capture import inputs
    from sparseflash.bench.session import session

    from .. import coverage

    real = None if capture is None else inputs(capture, dtype=torch.float32)
    measure = partial(coverage.measure, lengths=lengths_of(lengths), captured=real)
    session("coverage", out, measure, ("case", "inputs", "T", "nb", "coverage"))


@experiments.command("prefill", rich_help_panel=PANEL)
def bench_prefill(
    out: Kept = RESULTS / "prefill.csv",
    cases: Annotated[str, typer.Option(help="Which methods, separated by semicolons; by default all.")] = "",
    capture: Annotated[str, typer.Option(help="A capture: its name or its file.")] = "smollm2",
    length: Length = 4096,
    rounds: Rounds = 5,
    threads: Annotated[int, typer.Option(help="Threads; 0 is all.", min=0, max=1024)] = 0,
    text: Annotated[
        Path | None, typer.Option(help="A text for the model of that name, in the place of a capture.")
    ] = None,
    skip: Annotated[int, typer.Option(help="Characters of the text to leave out.", min=0)] = 0,
) -> None:
    """Prefill methods on SmolLM2's queries and keys: time, density, recall, error, beside two controls.

    Rows of other cases of OUT stay.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import prefill

    names = known("cases", prefill.methods_of(length), words(cases, ";"))
    there = results.read(out, "case") if out.is_file() else []
    kept = [row for row in there if row["case"] not in names]
    columns = ("case", "density", "recall", "window_recall", "random_recall", "ms_select", "share", "gain")
    given = {"name": capture, "length": length, "rounds": rounds, "threads": threads}
    given |= {"text": text, "skip": skip, "cases": names}
    session("prefill", out, partial(prefill.measure, **given), columns, kept=kept)


@experiments.command("ranks", rich_help_panel=PANEL)
def bench_ranks(
    out: Kept = RESULTS / "ranks.csv",
    parts: Annotated[str, typer.Option(help="balance, step, forecast; by default all.")] = "",
    length: Length = 16384,
    lengths: Lengths = "131072,524288",
    rounds: Rounds = 3,
) -> None:
    """Compare layouts and transports of attention over ranks: balance, bytes, a step of two, forecasts.

    Rows of other parts of OUT stay. The step wants two idle cores.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import ranks

    names = known("parts", ranks.PARTS, words(parts))
    there = results.read(out, "case", "part") if out.is_file() else []
    kept = [row for row in there if row["part"] not in names]
    columns = (
        "part", "case", "T", "ranks", "layout", "chosen", "transport", "balance", "critical", "over_one",
        "keys_sent", "ms", "ms_forecast", "forecast_ratio", "overhead", "mb_sent",
    )  # fmt: skip
    options = {"parts": names, "length": length, "lengths": lengths_of(lengths), "rounds": rounds}
    session("ranks", out, partial(ranks.measure, **options), columns, kept=kept)


@experiments.command("caches", rich_help_panel=PANEL)
def bench_caches(
    out: Out = RESULTS / "caches.csv",
    capture: Annotated[str, typer.Option(help="A capture: its name or its file.")] = "smollm2",
    length: Length = 4096,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that come one at a time, behind the prompt.")
    ] = 96,
) -> None:
    """Caches that keep or read few keys, on SmolLM2's queries and keys, beside two controls."""
    from sparseflash.bench.session import session

    from .. import caches

    columns = ("case", "share", "recall", "window_recall", "random_recall", "error", "bytes", "beats")
    session("caches", out, partial(caches.measure, name=capture, length=length, tokens=tokens), columns)
