"""Commands that train: time of whole steps, and quality at equal steps and at equal time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseflash.bench.commands.app import (
    Data,
    Dtypes,
    Lengths,
    Minutes,
    Out,
    Rounds,
    dtypes_of,
    floats,
    integers,
    known,
    lengths_of,
    words,
)

from .app import RESULTS, Kept, experiments, go_on

if TYPE_CHECKING:
    from sparseflash.train import Corpus

    from ..long_run import Run

PANEL = "Training and quality"


@experiments.command("step", rich_help_panel=PANEL)
def bench_step(
    out: Out = RESULTS / "step.csv",
    data: Data = "",
    lengths: Lengths = "8192,16384",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 8.0,
) -> None:
    """Time whole training steps of the same model with dense, hash-sparse and QK-sparse attention."""
    from sparseflash.bench.session import session
    from sparseflash.train.data import named

    from .. import steps

    options = {"lengths": lengths_of(lengths), "dtypes": dtypes_of(dtypes)}
    measure = partial(steps.measure, named(data), **options, rounds=rounds, minutes=minutes)
    columns = ("case", "T", "dtype", "ms", "speedup", "tokens_per_s", "rounds")
    session("training steps", out, measure, columns)


@experiments.command("documents", rich_help_panel=PANEL)
def bench_documents(
    out: Out = RESULTS / "documents.csv",
    data: Data = "",
    tokens: Annotated[int, typer.Option(min=1, help="Bytes of text in a batch, at most.")] = 8192,
    longest: Annotated[int, typer.Option(min=1, help="Longer documents are cut here.")] = 2048,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Time packed documents against the same padded to the longest: attention alone, and the small GPT."""
    from sparseflash.bench.session import session
    from sparseflash.train.data import named

    from .. import documents

    documents.require_room(tokens, longest)
    options = {"tokens": tokens, "longest": longest, "dtypes": dtypes_of(dtypes)}
    measure = partial(documents.measure, named(data), **options, rounds=rounds, minutes=minutes)
    columns = ("what", "mix", "dtype", "case", "padding", "tokens_per_s", "over_sdpa", "over_padded")
    session("documents", out, measure, columns)


@experiments.command("pixels", rich_help_panel=PANEL)
def bench_pixels(
    images: Annotated[Path, typer.Option(help="Images in IDX format, such as MNIST's; .gz is read too.")],
    out: Annotated[Path, typer.Option(help="CSV file of the rows, which goes on.")] = RESULTS / "pixels.csv",
    cases: Annotated[str, typer.Option(help="Attentions, separated by semicolons; by default all.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of every attention.")] = 150,
    seed: Annotated[int, typer.Option(min=0, help="Weights, batches and random planes.")] = 0,
) -> None:
    """Train on images pixel after pixel: dense, hash-sparse, Reformer and others at equal steps.

    Rows that OUT has are not measured again.
    """
    from sparseflash.bench.session import show

    from .. import pixels

    names = known("cases", pixels.ATTENTIONS, words(cases, ";"))
    jobs = pixels.jobs(pixels.read_idx(images), cases=names, steps=steps, seed=seed)
    show(go_on("pixels", out, jobs), out, ("case", "perplexity", "bits", "active", "steps", "s_per_step"))


@experiments.command("mqar", rich_help_panel=PANEL)
def bench_mqar(
    out: Out = RESULTS / "mqar.csv",
    cases: Annotated[str, typer.Option(help="Attentions, separated by semicolons; by default all.")] = "",
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps at most, for every learning rate.")
    ] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Weights, rows and random planes.")] = 0,
) -> None:
    """Train on associative recall: what can look up, and what cannot. Exit status 1 if the gate fails."""
    from sparseflash.bench.session import session

    from .. import mqar

    names = known("cases", mqar.ATTENTIONS, words(cases, ";"))
    measure = partial(mqar.measure, attentions=names, steps=steps, seed=seed)
    rows = session("mqar", out, measure, ("case", "lr", "accuracy", "best", "steps", "seconds", "density"))
    wrong = mqar.verdict(rows)
    right = f"as it has to be: {', '.join(mqar.MUST_SOLVE)} solve it, nothing else does"
    print("; ".join(wrong) or right)
    raise typer.Exit(1 if wrong else 0)


@experiments.command("long-run", rich_help_panel=PANEL)
def bench_long_run(
    out: Kept = RESULTS / "long-run.csv",
    data: Data = "",
    runs: Annotated[
        Path, typer.Option(help="Directory of checkpoints and logs; a run that stopped goes on from there.")
    ] = Path("runs/long-run"),
    cases: Annotated[str, typer.Option(help="Attentions, separated by semicolons; by default all.")] = "",
    rates: Annotated[str, typer.Option(help="Peak learning rates, separated by commas.")] = "4e-3",
    seeds: Annotated[str, typer.Option(help="Of weights, batches and planes; with commas between.")] = "0",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of 16,384 bytes.")] = 1500,
    length: Annotated[int, typer.Option(min=1, help="Bytes in a sequence.")] = 4096,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of the step times at the end; 0: none.")] = 5,
    minutes: Annotated[float, typer.Option(min=0, help="Time box of the step times.")] = 3.0,
    models: Annotated[Path | None, typer.Option(help="Directory to keep weights in, bf16.")] = None,
) -> None:
    """Train one language model under every attention and two controls: equal steps, equal time. Hours.

    Runs that OUT holds to the end are not trained again: name a few cases at a time.
    """
    from sparseflash.train.data import named

    from .. import long_run

    wanted = long_run.plan_runs(
        known("cases", long_run.CONTENDERS, words(cases, ";")),
        rates=floats(rates),
        seeds=integers(seeds, "0,1"),
        steps=steps,
        length=length,
    )
    train_and_time(out, named(data), wanted, runs, rounds=rounds, minutes=minutes, models=models)


def train_and_time(
    out: Path,
    corpus: Corpus,
    wanted: Sequence[Run],
    runs: Path,
    *,
    rounds: int,
    minutes: float,
    models: Path | None,
) -> None:
    """Train what `out` does not hold yet, time a step of every case, and keep the weights in `models`."""
    from sparseflash.bench import figures, results
    from sparseflash.bench.session import show, watch

    from .. import long_run

    there = list(results.read(out)) if out.is_file() else []
    todo = long_run.unfinished(wanted, there)
    keys = {run.key for run in todo}
    kept = [row for row in there if long_run.key(row) not in keys]
    rows = watch("long run", out, partial(long_run.measure, todo, corpus, runs), kept)
    if rounds:
        measure = partial(long_run.step_times, wanted, corpus, rounds=rounds, minutes=minutes)
        timed = watch("step times", out.with_stem(f"{out.stem}-step"), measure)
        rows = long_run.with_minutes(rows, timed)
        results.write(out, rows)
    columns = ("case", "lr", "seed", "steps", "bpb", "bpb_train", "minutes")
    show(rows, out, columns, lambda row: str(row["step"]) == str(row["steps"]))
    figures.redraw(out)
    for run in wanted if models else ():
        if (runs / run.directory).is_dir() and not long_run.CONTENDERS[run.case].chance:
            print(long_run.keep_weights(run, runs, models))
