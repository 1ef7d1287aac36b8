"""Commands about models of Transformers, and learned sparse attention."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseflash.bench.commands.app import (
    Dtype,
    Dtypes,
    Lengths,
    Minutes,
    Out,
    Rounds,
    dtypes_of,
    integers,
    known,
    lengths_of,
    words,
)

from .app import RESULTS, Kept, Length, experiments

PANEL = "Models"


@experiments.command("indexer", rich_help_panel=PANEL)
def bench_indexer(
    out: Kept = RESULTS / "indexer.csv",
    lengths: Lengths = "1024,2048,4096,8192",
    dtypes: Dtypes = "fp32,bf16",
    kinds: Annotated[str, typer.Option(help="choice, attention, loss; by default all.")] = "",
    topk: Annotated[int, typer.Option(min=1, help="Keys that each query chooses.")] = 512,
    rounds: Rounds = 3,
    minutes: Minutes = 6.0,
) -> None:
    """Time learned sparse attention and its memory: choice, attention, loss, against the plain formulas.

    Other rows of OUT stay: measure a few at a time.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import indexer

    parts = known("kinds", indexer.KINDS, words(kinds))
    options = {"lengths": lengths_of(lengths), "dtypes": dtypes_of(dtypes), "kinds": parts, "topk": topk}
    keys = set(itertools.product(map(str, options["lengths"]), options["dtypes"], (str(topk),)))
    there = results.read(out, "case", "T", "dtype", "topk") if out.is_file() else []
    kept = [
        row
        for row in there
        if not row["case"].startswith(tuple(parts)) or (row["T"], row["dtype"], row["topk"]) not in keys
    ]
    columns = ("case", "dtype", "T", "topk", "ms_plain", "ms", "ratio", "mb_plain", "mb", "mb_ratio", "note")
    measure = partial(indexer.measure, **options, rounds=rounds, minutes=minutes)
    session("indexer", out, measure, columns, kept=kept)


@experiments.command("transformers", rich_help_panel=PANEL)
def bench_transformers(
    out: Kept = RESULTS / "transformers.csv",
    models: Annotated[str, typer.Option(help="Layers, separated by semicolons; by default all.")] = "",
    what: Annotated[str, typer.Option(help="prefill; training step; by default both.")] = "",
    lengths: Lengths = "1024,2048,4096,8192",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 3,
    minutes: Minutes = 6.0,
) -> None:
    """Time layers of Transformers models at their real size, and their memory: stock against "sparse".

    Other rows of OUT stay: measure a few at a time.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import models as models_

    names = known("models", models_.SUBJECTS, words(models, ";"))
    parts = known("what", models_.WHAT, words(what, ";"))
    wanted = list(itertools.product(names, dtypes_of(dtypes), parts, lengths_of(lengths)))
    keys = {tuple(map(str, key)) for key in wanted}
    there = results.read(out, "model", "dtype", "what", "T") if out.is_file() else []
    kept = [row for row in there if (row["model"], row["dtype"], row["what"], row["T"]) not in keys]
    measure = partial(models_.measure, wanted, rounds=rounds, minutes=minutes)
    columns = ("model", "what", "method", "dtype", "T", "ms_stock", "ms", "ratio", "mb_stock", "mb", "note")
    session("transformers", out, measure, columns, kept=kept)


@experiments.command("generation", rich_help_panel=PANEL)
def bench_generation(
    out: Out = RESULTS / "generation.csv",
    model: Annotated[str, typer.Option(help="What sf.transformers.load takes.")] = "smollm2",
    length: Length = 8192,
    dtype: Dtype = "bf16",
    rounds: Rounds = 4,
    threads: Annotated[int, typer.Option(help="Threads; 0 is all.", min=0, max=1024)] = 0,
) -> None:
    """Tokens per second of a model behind a long prompt, by what its cache keeps and reads."""
    from sparseflash.bench.session import session

    from .. import generation

    (dtype,) = dtypes_of(dtype)
    columns = ("case", "dtype", "T", "rate", "gain", "bytes", "agree")
    given = {"model": model, "length": length, "rounds": rounds, "threads": threads, "dtype": dtype}
    session("generation", out, partial(generation.measure, **given), columns)


@experiments.command("vllm", rich_help_panel=PANEL)
def bench_vllm(
    out: Out = RESULTS / "vllm.csv",
    model: Annotated[str, typer.Option(help="What sf.transformers.load takes.")] = "smollm2",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 4096,
    requests: Annotated[int, typer.Option(min=1, help="That come together.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="To generate for each.")] = 32,
    cases: Annotated[str, typer.Option(help="Separated by semicolons; by default all.")] = "",
    dtype: Dtype = "bf16",
    rounds: Rounds = 2,
    threads: Annotated[int, typer.Option(help="Threads.", min=1, max=1024)] = 1,
) -> None:
    """Tokens per second of vLLM with its own attention and with ours, in its own environment (make vllm)."""
    from sparseflash.bench.session import session

    from .. import serving

    kinds = dtypes_of(dtype)
    wanted = list(known("cases", serving.cases(length), words(cases, ";")))
    given: dict[str, Any] = {"model": model, "length": length, "requests": requests, "tokens": tokens}
    given |= {"rounds": rounds, "threads": threads, "dtypes": kinds, "wanted": wanted}
    columns = ("case", "dtype", "T", "requests", "prompts", "prompts_gain", "rate", "gain", "agree")
    session("vllm", out, partial(serving.measure, **given), columns)


@experiments.command("offload", rich_help_panel=PANEL)
def bench_offload(
    folder: Annotated[Path, typer.Option(help="On the disk that is measured.")] = Path("/var/tmp"),
    out: Out = RESULTS / "offload.csv",
    length: Length = 32768,
    share: Annotated[int, typer.Option(help="Methods read one key of so many.", min=1)] = 16,
    rounds: Rounds = 3,
) -> None:
    """Tokens per second over keys and values in files that are not in memory."""
    from sparseflash.bench.session import session

    from .. import offload

    columns = ("case", "ahead", "budget", "rate", "gain", "mib", "disk", "there")
    given = {"length": length, "share": share, "rounds": rounds}
    session("offload", out, partial(offload.measure, folder, **given), columns)


@experiments.command("samples", rich_help_panel=PANEL)
def bench_samples(
    out: Out = RESULTS / "samples.csv",
    model: Annotated[str, typer.Option(help="What sf.transformers.load takes.")] = "smollm2",
    length: Length = 8192,
    samples: Annotated[str, typer.Option(help="How many of one prompt, separated by commas.")] = "4,16,32",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    rounds: Rounds = 3,
    threads: Annotated[int, typer.Option(help="0: as many as PyTorch takes.", min=0)] = 0,
) -> None:
    """Tokens per second and bytes of samples of one prompt, which is held and read once, or by each."""
    from sparseflash.bench.session import session

    from .. import samples as experiment

    columns = ("case", "samples", "rate", "gain", "bytes", "saved", "agree")
    given = {
        "model": model,
        "length": length,
        "samples": tuple(integers(samples, "4,16,32", 1)),
        "dtype": dtype,
    }
    given |= {"rounds": rounds, "threads": threads}
    session("samples", out, partial(experiment.measure, **given), columns)


@experiments.command("budgets", rich_help_panel=PANEL)
def bench_budgets(
    text: Annotated[Path, typer.Option("--text", help="A text file.")],
    out: Kept = RESULTS / "budgets.csv",
    model: Annotated[
        str, typer.Option(help="What sf.transformers.load takes, and a capture is of.")
    ] = "smollm2",
    length: Length = 2048,
    tokens: Annotated[int, typer.Option(help="Behind the prompt.", min=1)] = 32,
    cases: Annotated[str, typer.Option(help="Separated by semicolons; by default all.")] = "",
) -> None:
    """What every policy, compression and method for decoding costs and loses, at four budgets.

    What OUT has already is not measured again.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import budgets

    wanted = known("cases", budgets.cases(length), words(cases, ";"))
    there = results.read(out, "model", "T", "case", "share") if out.is_file() else []
    given: dict[str, Any] = {"model": model, "length": length, "tokens": tokens}
    given |= {"wanted": wanted, "known": there}
    columns = (
        "case",
        "share",
        "few",
        "bytes",
        "rate",
        "gain",
        "agree",
        "kl",
        "asked",
        "before",
        "anew",
        "beats",
    )
    session("budgets", out, partial(budgets.measure, text, **given), columns, kept=there)


@experiments.command("prompt-losses", rich_help_panel=PANEL)
def bench_prompt_losses(
    text: Annotated[list[Path], typer.Option("--text", help="A text file; may be repeated.")],
    out: Kept = RESULTS / "prompt-losses.csv",
    model: Annotated[str, typer.Option(help="What sf.transformers.load takes.")] = "smollm2",
    lengths: Lengths = "4096,8144",
    skip: Annotated[int, typer.Option(help="Characters of each text to leave out.", min=0)] = 20000,
    cases: Annotated[str, typer.Option(help="Methods, separated by semicolons; by default all.")] = "",
    planted: Annotated[bool, typer.Option(help="Also plant needles, for another prefill a text.")] = True,
) -> None:
    """What methods lose on long prompts of a model: kl of the next tokens, recall, needles. No times.

    What OUT has already is not measured again.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import prompts

    sizes = lengths_of(lengths)
    wanted = known("cases", prompts.cases(max(sizes)), words(cases, ";"))
    there = results.read(out, "model", "text", "tokens", "case") if out.is_file() else []
    given: dict[str, Any] = {"model": model, "lengths": sizes, "skip": skip, "wanted": wanted}
    given |= {"planted": planted, "known": there}
    columns = ("text", "tokens", "case", "kl", "loss", "kept", "recall", "question", "mid", "lone")
    session("prompt losses", out, partial(prompts.measure, text, **given), columns, kept=there)


@experiments.command("gates", rich_help_panel=PANEL)
def bench_gates(
    text: Annotated[Path, typer.Option(help="A text, whose first pieces teach and whose next one judges.")],
    out: Out = RESULTS / "gates.csv",
    model: Annotated[str, typer.Option(help="What sf.transformers.load takes.")] = "smollm2",
    length: Length = 2048,
    pieces: Annotated[int, typer.Option(min=1, help="That the gates learn from.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Of the training of a layer.")] = 500,
    skip: Annotated[int, typer.Option(help="Characters of the text to leave out.", min=0)] = 20000,
) -> None:
    """Recall of SeerAttention's gates on text they did not see, beside means, chance and their targets."""
    from sparseflash.bench.session import session

    from .. import gates

    given: dict[str, Any] = {"model": model, "length": length, "pieces": pieces, "steps": steps, "skip": skip}
    session("gates", out, partial(gates.measure, text, **given), ("case", "blocks", "kept", "recall"))


@experiments.command("seer-tuning", rich_help_panel=PANEL)
def bench_seer_tuning(
    text: Annotated[Path, typer.Option(help="A text; its end judges.")],
    out: Kept = RESULTS / "seer-tuning.csv",
    folder: Annotated[Path, typer.Option(help="The first model and its gates.")] = Path("bench/seer-tuning"),
    short: Annotated[int, typer.Option(min=128, help="Length that the model knows.")] = 1024,
    length: Length = 4096,
    first: Annotated[int, typer.Option(min=1, help="Steps of the first model.")] = 600,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each copy at the longer length.")] = 100,
) -> None:
    """Fine-tune to longer texts through SeerAttention's blocks at 50, 75, 90 % left out, beside dense.

    What OUT has already is not measured again.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import seer_tuning

    there = results.read(out, "case") if out.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"lengths": (short, length), "steps": (first, steps), "known": there}
    columns = ("case", "T", "kept", "loss", "loss_last", "loss_dense", "loss_dense_last")
    session("seer tuning", out, partial(seer_tuning.measure, text, folder, **given), columns, kept=there)


@experiments.command("long-positions", rich_help_panel=PANEL)
def bench_long_positions(
    text: Annotated[Path, typer.Option(help="A text that is long enough.")],
    out: Kept = RESULTS / "long-positions.csv",
    model: Annotated[str, typer.Option(help="What sf.transformers.load takes.")] = "smollm2",
    lengths: Lengths = "8192,16384,32768",
    cases: Annotated[str, typer.Option(help="plain, yarn, dual-chunk-attention; by default all.")] = "",
    skip: Annotated[int, typer.Option(help="Characters of the text to leave out.", min=0)] = 20000,
) -> None:
    """Loss by position beyond the trained length: plain rotary positions, YaRN, dual-chunk-attention.

    What OUT has already is not measured again.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import session

    from .. import long_positions

    there = results.read(out, "case", "T", "part") if out.is_file() else []
    chosen = known("cases", long_positions.CASES, words(cases))
    given: dict[str, Any] = {"model": model, "lengths": lengths_of(lengths), "cases": chosen, "skip": skip}
    measure = partial(long_positions.measure, text, **given, known=there)
    session("long positions", out, measure, ("case", "T", "part", "loss", "seconds"), kept=there)
