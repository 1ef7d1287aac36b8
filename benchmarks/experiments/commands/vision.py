"""Commands about video, images and tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sparseflash.bench import results
from sparseflash.bench.commands.app import Data, Lengths, Minutes, Out, integers, known, lengths_of, words
from sparseflash.bench.results import Row

from .app import RESULTS, Kept, experiments

PANEL = "Diffusion, vision and tables"
VIDEO = {
    "train": ("case", "loss", "loss_own_frame", "seconds"),
    "stages": (
        "case", "stage", "steps", "references", "kept", "pairs", "distance", "frechet", "drift", "unlike",
        "seconds",
    ),
    "time": (
        "case", "T", "steps", "kept", "ms", "ms_attention", "gain_steps", "gain_attention", "gain_model",
        "gain",
    ),
    "capture": (
        "case", "kept", "recall", "recall_later", "recall_random", "recall_uniform", "recall_window",
    ),
}  # fmt: skip
"""Columns that are printed of each part of `video`."""
Steps = Annotated[int, typer.Option(min=1, help="Training steps of a small model.")]
Parts = Annotated[str, typer.Option(help="Which parts, with commas; all by default.")]


def _others(out: Path, parts: Sequence[str]) -> list[Row]:
    """Rows of parts that are not measured now."""
    there = results.read(out, "case", "what") if out.is_file() else []
    return [row for row in there if row["what"] not in parts]


@experiments.command("diffusion", rich_help_panel=PANEL)
def bench_diffusion(
    out: Kept = RESULTS / "diffusion.csv",
    data: Data = "",
    parts: Parts = "planted,orders,masked,time",
    lengths: Lengths = "4096,8192,16384",
    steps: Steps = 500,
    minutes: Minutes = 5.0,
) -> None:
    """Recall on planted heads, KL on a small masked-diffusion model, time over denoising steps.

    Rows of other parts of OUT stay.
    """
    from sparseflash.bench.session import session
    from sparseflash.train.data import named

    from .. import diffusion

    asked = known("parts", ("planted", "orders", "masked", "time"), words(parts))
    options = {"parts": asked, "lengths": lengths_of(lengths), "steps": steps, "minutes": minutes}
    columns = (
        "what", "case", "head", "T", "share", "density", "recall", "recall_random", "recall_window", "kl",
        "empty_raster", "empty_found", "int8_raster", "int8_found",
        "overlap_next", "overlap_last", "overlap_heads", "ms_dense", "ms_search", "ms_step", "gain",
    )  # fmt: skip
    measure = partial(diffusion.measure, named(data), **options)
    session("diffusion", out, measure, columns, kept=_others(out, asked))


@experiments.command("modalities", rich_help_panel=PANEL)
def bench_modalities(
    out: Out = RESULTS / "modalities.csv",
    frames: Annotated[int, typer.Option(min=4, help="Frames of each of the two videos.")] = 32,
    side: Annotated[int, typer.Option(min=4, help="Rows, and columns, of a frame.")] = 8,
    budgets: Annotated[str, typer.Option(help="Columns, and slashes, of a boundary head.")] = "32,64,128",
) -> None:
    """Needles in prompts of text and two videos: patterns of each modality beside lines, at equal pairs."""
    from sparseflash.bench.session import session

    from .. import modalities

    columns = ("kind", "pattern", "case", "T", "budget", "kept", "needles", "needles_worst")
    given = {"frames": frames, "side": side, "budgets": integers(budgets, "32,64", 1)}
    session("modalities", out, partial(modalities.measure, **given), columns)


@experiments.command("vision", rich_help_panel=PANEL)
def bench_vision(
    out: Kept = RESULTS / "vision.csv",
    parts: Parts = "orion,features,hrsam,plan",
    images: Annotated[
        Path | None, typer.Option(help="For links and tokens: images in IDX format, such as MNIST's.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Their labels, in IDX format.")] = None,
    steps: Steps = 600,
    features: Annotated[
        str, typer.Option(help="Numbers of features to time.")
    ] = "128,256,512,1024,2048,4096",
    pixels: Annotated[str, typer.Option(help="Sides of square images.")] = "512,1024,2048",
    minutes: Minutes = 3.0,
) -> None:
    """Neighbours in a table, time over features; patches, time over pixels; links and tokens of images.

    Rows of other parts of OUT stay.
    """
    from sparseflash.bench.session import session

    from .. import pixels as pixels_
    from .. import vision

    asked = known("parts", ("orion", "features", "hrsam", "plan", "links", "tokens"), words(parts))
    options = {"features": integers(features, least=1), "pixels": integers(pixels, "512,1024", 16)}
    columns = (
        "what", "case", "T", "density", "accuracy", "base_rate", "ms", "ms_dense", "gain", "us_per_token",
        "difference", "ms_choose", "ms_mask", "ms_lists", "recall", "mflops", "fewer", "points",
    )  # fmt: skip
    given = None
    if images is not None and labels is not None:
        given = pixels_.read_idx(images), pixels_.read_idx(labels)[:, 0].long()
    measure = partial(vision.measure, parts=asked, images=given, steps=steps, minutes=minutes, **options)
    session("vision", out, measure, columns, kept=_others(out, asked))


@experiments.command("video", rich_help_panel=PANEL)
def bench_video(
    images: Annotated[Path, typer.Option(help="Digits in IDX format, such as MNIST's; .gz is read too.")],
    out: Kept = RESULTS / "video.csv",
    parts: Parts = "train,stages,time,capture",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the teacher.")] = 3000,
    distil: Annotated[int, typer.Option(min=1, help="Of stage 1, from 32 steps of the sampler to 8.")] = 400,
    tune: Annotated[int, typer.Option(min=1, help="Of stage 3, each sparse student's.")] = 200,
    bound: Annotated[float, typer.Option(min=0, help="Error of a layer that a search lets pass.")] = 0.25,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a video.")] = 8,
    videos: Annotated[int, typer.Option(min=2, help="Videos that are judged.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Weights, videos and noise.")] = 0,
    runs: Annotated[
        Path, typer.Option(help="Directory of trained models, which are not trained again.")
    ] = Path("runs/video"),
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of times.")] = 5,
    minutes: Minutes = 4.0,
) -> None:
    """Train a video DiT on moving digits; fewer steps and fewer frames, as Efficient-vDiT does. 25 minutes.

    train is the dense teacher (10 minutes), stages are consistency distillation, the search of reference
    frames and distillation, beside controls (10), time is of generations and of attention (4), capture what
    methods find in the teacher's queries and keys (1). Row by row: rows that OUT has are not measured again,
    but for those of time, whose cases take turns.
    """
    from sparseflash.bench.session import show, watch

    from .. import pixels as pixels_
    from .. import video

    asked = known("parts", VIDEO, words(parts))
    settings = video.Settings(
        steps=steps, distil=distil, tune=tune, bound=bound, frames=frames, videos=videos, seed=seed
    )
    there = list(results.read(out)) if out.is_file() else []
    measure = partial(
        video.measure, pixels_.read_idx(images), settings, parts=asked, folder=runs, known=there,
        rounds=rounds, minutes=minutes,
    )  # fmt: skip
    rows = watch("video", out, measure, video.kept(there, settings, asked))
    for part in asked:
        show(rows, out, VIDEO[part], lambda row: (row["part"], row["study"]) == (part, repr(settings)))
