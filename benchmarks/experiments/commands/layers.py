"""The command of what layers promise, in parts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseflash.bench.commands.app import floats, integers, known, words
from sparseflash.common.errors import SparseFlashError

from .app import RESULTS, experiments, go_on

COLUMNS = {
    "recall": ("case", "lr", "seed", "accuracy", "pairs", "active", "steps", "seconds"),
    "weights": ("case", "seed", "accuracy", "share_sparse", "share", "seconds"),
    "extrapolation": ("case", "seed", "bpb_512", "bpb_1024", "bpb_2048", "bpb_4096", "bpb_8192", "apart"),
    "language": ("case", "seed", "bpb", "far", "pairs", "active", "ms_step"),
    "lists": ("case", "seed", "accuracy", "nested", "pairs", "active", "seconds"),
    "long": ("case", "T", "steps", "loss", "ms_step", "ms_attention"),
    "longer": ("case", "seed", "bpb", "far", "bpb_short", "cache", "ms_step"),
    "clusters": ("model", "layer", "T", "case", "clusters", "error", "error_mean", "ratio", "ms"),
    "routing": ("case", "seed", "recall", "recall_chance", "ratio", "kept"),
    "pooling": ("case", "fill", "ms_jagged", "speedup", "memory", "seed", "accuracy", "auc"),
    "accelerator": ("case", "pattern", "interleaved", "cycles_dense", "cycles", "speedup", "multiplications"),
    "products": ("case", "tokens", "inputs", "outputs", "ms", "speedup", "ms_step", "speedup_step"),
    "times": ("case", "T", "ms", "slope", "over_dense", "rounds"),
}
"""Columns that are printed, by part."""


@experiments.command("layers", rich_help_panel="Training and quality")
def bench_layers(
    part: Annotated[str, typer.Argument(help=f"One of {', '.join(COLUMNS)}.")],
    out: Annotated[
        Path | None, typer.Option(help="CSV file of the rows, which goes on; layers-PART.csv by default.")
    ] = None,
    cases: Annotated[str, typer.Option(help="Of the part, separated by semicolons; by default all.")] = "",
    data: Annotated[
        str,
        typer.Option(
            help="Text, file or directory; by default Transformers' modelling files (language, longer) or "
            "Python's own library."
        ),
    ] = "",
    images: Annotated[Path | None, typer.Option(help="Of weights: images in IDX format, .gz too.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Of weights: their labels, in IDX format.")] = None,
    rates: Annotated[str, typer.Option(help="Learning rates of recall, with commas between.")] = "1e-2",
    seeds: Annotated[str, typer.Option(help="Of weights and data; with commas between.")] = "0,1",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of training, of recall at most; by default those of the part.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of times.")] = 3,
) -> None:
    """Test what the layers of sf.nn promise. Minutes, row by row: rows that OUT has are not measured again.

    recall asks for what was said once, of each layer beside a window and chance of as many pairs (40
    minutes); weights trains N:M layers on images (5); extrapolation judges short training on long text (20);
    language is bits per byte of every layer, near and far (60), lists the same on ListOps (20), and long
    trains MuSe and dense attention on 16k tokens (40); longer goes on from 512 bytes to 4,096 with LongGen's
    hybrid of sparse and dense layers (15);
    clusters is MuSe's error and time (10), routing the mass inside clusters (5), times the slopes (10), and
    pooling is about jagged histories, times and a click model (3). accelerator counts cycles of a model,
    products times N:M products beside dense ones (1).
    """
    from sparseflash.bench.session import session, show
    from sparseflash.train.data import named

    from ..claim.rows import Job
    from ..layers import (
        accelerator,
        clusters,
        extrapolation,
        language,
        lists,
        long,
        longer,
        pooling,
        products,
        recall,
        routing,
        times,
        weights,
    )
    from ..pixels import read_idx

    (part,) = known("part", COLUMNS, [part])
    out = out or RESULTS / f"layers-{part}.csv"
    all_cases: Mapping[str, Any] = {
        "recall": recall.CASES,
        "weights": weights.CASES,
        "extrapolation": extrapolation.CASES,
        "language": language.CASES,
        "lists": dict.fromkeys(lists.NAMES),
        "long": long.CASES,
        "longer": longer.CASES,
        "clusters": dict.fromkeys(clusters.FORMS),
        "routing": dict.fromkeys(("planted", "bytes")),
        "pooling": dict.fromkeys(("times", "clicks")),
        "accelerator": accelerator.NETS,
        "products": dict.fromkeys(("dense",)),
        "times": times.CASES,
    }[part]
    names, drawn = known("cases", all_cases, words(cases, ";")), integers(seeds, "0,1")
    if part == "times":
        session("layers", out, partial(times.measure, cases=names, rounds=rounds), COLUMNS[part])
        return
    if part == "products":
        session("layers", out, partial(products.measure, rounds=rounds), COLUMNS[part])
        return
    if part == "pooling":
        session("layers", out, partial(pooling.times, rounds=rounds), COLUMNS[part])
    if part == "accelerator":
        session("layers", out, accelerator.rows, COLUMNS[part])
        return
    jobs: list[Job]
    given = {} if steps is None else {"steps": steps}
    text = language.repetitive() if not data and part in ("language", "longer") else named(data)
    if part == "recall":
        jobs = recall.jobs(cases=names, rates=floats(rates), seeds=drawn, **given)
    elif part == "extrapolation":
        jobs = extrapolation.jobs(text, cases=names, seeds=drawn, **given)
    elif part == "language":
        jobs = language.jobs(text, cases=names, seeds=drawn, **given)
    elif part == "lists":
        jobs = lists.jobs(lists.lists(), cases=names, seeds=drawn, **given)
    elif part == "long":
        jobs = long.jobs(text, cases=names, **given)
    elif part == "longer":
        jobs = longer.jobs(text, cases=names, seeds=drawn, **given)
    elif part == "clusters":
        jobs = clusters.jobs(forms=names, rounds=rounds)
    elif part == "routing":
        jobs = routing.jobs(text, cases=names, seeds=drawn)
    elif part == "pooling":
        jobs = pooling.clicks(seeds=drawn)
    elif images is None or labels is None:
        raise SparseFlashError("weights learn from --images and --labels, in IDX format; give both")
    else:
        jobs = weights.jobs(read_idx(images), read_idx(labels), cases=names, seeds=drawn)
    rows = go_on("layers", out, jobs)
    show(rows, out, COLUMNS[part])
    if part == "language":
        print("\n".join(language.closed(rows)))
    judge = {"recall": recall.verdict, "extrapolation": extrapolation.verdict}.get(part)
    if judge:
        print("\n".join(judge(rows)) or "every promise is kept")
