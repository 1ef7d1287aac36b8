"""`sparseflash bench`: its commands and their options."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseflash.errors import SparseFlashError

bench = typer.Typer(
    invoke_without_command=True,
    help="Measure on this machine.\n\n"
    "**--methods hash-sparse,window --baselines sdpa,flex --lengths 1024,8192 --out DIR** compares "
    "any methods with any baselines; a command runs one table; neither runs every table, into "
    "**benchmarks/results**.\n\n"
    "All cases of a table run in turn, the figure is the median; machine and versions stand in every row.",
)
RESULTS = Path("benchmarks/results")
Out = Annotated[Path, typer.Option(help="CSV file of the rows; an existing one is replaced.")]
Minutes = Annotated[float, typer.Option(help="Time box; what does not fit is left out, and said.")]
Lengths = Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")]
Dtypes = Annotated[str, typer.Option(help="fp32, bf16 or both, separated by commas.")]
Rounds = Annotated[int, typer.Option(help="Measured rounds, after one that warms up.")]


@bench.callback()
def bench_attention(
    context: typer.Context,
    methods: Annotated[
        str, typer.Option(help="Methods that `sparseflash methods` lists, separated by commas.")
    ] = "",
    baselines: Annotated[
        str,
        typer.Option(
            help="sdpa, sdpa-math, sdpa-flash, sdpa-cudnn, flex, naive (the mask of each method), reformer, "
            "attn-gym, fla."
        ),
    ] = "",
    lengths: Lengths = "1024,4096",
    out: Annotated[Path, typer.Option(help="Directory of attention.csv and its picture.")] = Path("bench"),
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    head_dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    density: Annotated[
        float | None, typer.Option(help="Share of the causal pairs that the methods are set to see.")
    ] = None,
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "both",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    energy: Annotated[bool, typer.Option("--energy", help="Joules of a call, where counters exist.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, no memory: a first look.")] = False,
    rounds: Rounds = 9,
    minutes: Minutes = 5.0,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    capture: Annotated[
        Path | None, typer.Option(help="q, k and v of a model (sparseflash bench capture), not normal ones.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of the capture; by default the middle one.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyper-parameter, as method.field=value; may be repeated."),
    ] = None,
) -> None:
    """Run the comparison that the options name, or all benchmarks where they name none."""
    from sparseflash.bench import harness, session

    if context.invoked_subcommand is not None:
        return
    if not methods and not baselines:
        bench_curves()
        bench_attention_table()
        bench_kernel_table()
        bench_ops()
        bench_step()
        return
    chosen: dict[str, dict[str, Any]] = {}
    for name, value in map(setting, options or ()):
        method, dot, field = name.partition(".")
        if not dot:
            raise SparseFlashError(f"--set {name}: whose? write it as --set method.{name}=value")
        chosen.setdefault(method, {})[field] = value
    real = None
    if capture is not None:
        from sparseflash.bench.capture import inputs
        from sparseflash.bench.cases import DTYPES

        real = inputs(capture, layer=layer, dtype=DTYPES.get(dtype, DTYPES["fp32"]))
        heads, head_dim = real(1)[0].shape[1::2]
    settings = harness.Settings(
        methods=_words(methods),
        baselines=_words(baselines),
        lengths=_integers(lengths),
        batch=batch,
        heads=heads,
        dim=head_dim,
        dtype=dtype,
        direction=direction,
        density=density,
        device=device,
        options=chosen,
        rounds=3 if quick else rounds,
        minutes=minutes,
        energy=energy,
        memory=not quick,
        seed=seed,
        capture=real,
    )
    session.attention(settings, out)


@bench.command("capture")
def bench_capture(
    out: Annotated[Path, typer.Option(help="Safetensors file, 8 MB at most.")],
    model: Annotated[str, typer.Option(help="A causal model of Transformers: name or directory.")] = "",
    run: Annotated[Path | None, typer.Option(help="Or the --out of a dense sparseflash train.")] = None,
    data: Annotated[str, typer.Option(help="Text to run it on; by default Python's own library.")] = "",
    length: Annotated[int, typer.Option(help="Bytes of text.")] = 2048,
    layers: Annotated[str, typer.Option(help="Attention layers, separated by commas; by default all.")] = "",
) -> None:
    """Keep the queries, keys and values of a real model, as input for bench --capture."""
    from sparseflash.bench import session

    session.capture(out, model=model, run=run, data=data, length=length, layers=_integers(layers))


@bench.command("plot")
def bench_plot(
    directory: Annotated[Path, typer.Argument(help="Directory of result files, or one of them.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Directory of the pictures; beside the files.")] = None,
) -> None:
    """Redraw every picture from its CSV file alone."""
    from sparseflash.bench import session

    session.plot(directory, out)


@bench.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="Result file, or a directory of them.")],
    after: Annotated[Path, typer.Argument(help="The same, measured later.")],
) -> None:
    """Name what became more than 5 % slower; exit status 1 if anything did."""
    from sparseflash.bench import session

    raise typer.Exit(0 if session.compare(before, after) else 1)


@bench.command("energy")
def bench_energy() -> None:
    """Test the energy counter: linear in the time of a load, quiet without; or say why there is none."""
    from sparseflash.bench import session

    raise typer.Exit(0 if session.energy() else 1)


@bench.command("curves")
def bench_curves(
    out: Out = RESULTS / "curves.csv",
    minutes: Minutes = 5.0,
    lengths: Lengths = "1024,2048,4096,8192,16384",
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Time attention forward + backward over the length: dense, naive, Reformer, hash- and QK-sparse."""
    from sparseflash.bench import session

    session.curves(out, minutes=minutes, lengths=_integers(lengths), heads=heads, dim=dim, dtype=dtype)


@bench.command("attention-table")
def bench_attention_table(
    out: Out = RESULTS / "attention-table.csv",
    length: Annotated[int, typer.Option(help="Sequence length.")] = 8192,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 7,
    minutes: Minutes = 5.0,
) -> None:
    """Compare our dense, hash-sparse and QK-sparse attention with torch SDPA on the same tensors."""
    from sparseflash.bench import session

    session.attention_table(out, length=length, dtypes=_words(dtypes), rounds=rounds, minutes=minutes)


@bench.command("kernel-table")
def bench_kernel_table(
    out: Out = RESULTS / "kernel-table.csv",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare the kernels under given plans (dense, blocks, single keys) with dense torch SDPA."""
    from sparseflash.bench import session

    session.kernel_table(out, dtypes=_words(dtypes), rounds=rounds, minutes=minutes)


@bench.command("ops")
def bench_ops(
    out: Out = RESULTS / "ops.csv",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare linear attention and stick-breaking with dense torch SDPA and with plain torch."""
    from sparseflash.bench import session

    session.ops(out, dtypes=_words(dtypes), rounds=rounds, minutes=minutes)


@bench.command("decode")
def bench_decode(
    out: Out = RESULTS / "decode.csv",
    mib: Annotated[int, typer.Option(help="Keys and values in use, MiB.")] = 64,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Compare how fast decode reads its cache with a plain read, and its time with torch SDPA."""
    from sparseflash.bench import session

    session.decode(out, mib=mib, dtypes=_words(dtypes), rounds=rounds, minutes=minutes)


@bench.command("levels")
def bench_levels(
    out: Out = RESULTS / "levels.csv",
    levels: Annotated[
        str, typer.Option(help="Names with commas between; by default all that run here.")
    ] = "",
    rounds: Rounds = 3,
    minutes: Minutes = 5.0,
) -> None:
    """Compare each instruction-set level of the CPU backend with torch SDPA held to the same instructions."""
    from sparseflash.bench import session

    session.levels(out, names=_words(levels), rounds=rounds, minutes=minutes)


@bench.command("step")
def bench_step(
    out: Out = RESULTS / "step.csv",
    data: Annotated[str, typer.Option(help="Text to train on; by default Python's own library.")] = "",
    lengths: Lengths = "8192,16384",
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 8.0,
) -> None:
    """Time whole training steps of the same model with dense, hash-sparse and QK-sparse attention."""
    from sparseflash.bench import session

    lengths_ = _integers(lengths)
    session.step(out, data=data, lengths=lengths_, dtypes=_words(dtypes), rounds=rounds, minutes=minutes)


@bench.command("documents")
def bench_documents(
    out: Out = RESULTS / "documents.csv",
    data: Annotated[str, typer.Option(help="Text to pack; by default Python's own library.")] = "",
    tokens: Annotated[int, typer.Option(help="Bytes of text in a batch, at most.")] = 8192,
    longest: Annotated[int, typer.Option(help="Longer documents are cut here.")] = 2048,
    dtypes: Dtypes = "fp32,bf16",
    rounds: Rounds = 5,
    minutes: Minutes = 6.0,
) -> None:
    """Time packed documents against the same padded to the longest: attention alone, and the small GPT."""
    from sparseflash.bench import session

    words = _words(dtypes)
    session.documents(
        out, data=data, tokens=tokens, longest=longest, dtypes=words, rounds=rounds, minutes=minutes
    )


@bench.command("masks")
def bench_masks(
    out: Out = RESULTS / "masks.csv",
    lengths: Lengths = "2048,4096,8192,16384",
    cases: Annotated[str, typer.Option(help="Masks, separated by commas; by default all.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    rounds: Rounds = 3,
    minutes: Minutes = 12.0,
    flex: Annotated[bool, typer.Option(help="Also run compiled FlexAttention.")] = True,
) -> None:
    """Compare attention under boolean masks with torch SDPA and FlexAttention, making the plans included."""
    from sparseflash.bench import session

    session.masks(
        out,
        lengths=_integers(lengths),
        names=_words(cases),
        dtype=dtype,
        rounds=rounds,
        minutes=minutes,
        flex=flex,
    )


@bench.command("breakeven")
def bench_breakeven(
    out: Out = RESULTS / "breakeven.csv",
    lengths: Lengths = "512,1024,2048,4096",
    dims: Annotated[str, typer.Option(help="Dimensions of a head, separated by commas.")] = "32,64,128",
    dtypes: Dtypes = "fp32",
    rounds: Rounds = 7,
    minutes: Minutes = 6.0,
) -> None:
    """Find the densities below which sparse beats dense here, and the costs for sparseflash.explain."""
    from sparseflash.bench import session

    session.breakeven(
        out,
        lengths=_integers(lengths),
        dims=_integers(dims),
        dtypes=_words(dtypes),
        rounds=rounds,
        minutes=minutes,
    )


@bench.command("coverage")
def bench_coverage(
    out: Out = RESULTS / "coverage.csv",
    lengths: Lengths = "512,1024,2048,4096",
    capture: Annotated[Path | None, typer.Option(help="Also on the queries of a capture.")] = None,
) -> None:
    """Measure which share of the equal-bucket pairs hash-sparse attention and Reformer attend."""
    from sparseflash.bench import session

    session.coverage(out, lengths=_integers(lengths), capture=capture)


@bench.command("pixels")
def bench_pixels(
    images: Annotated[Path, typer.Option(help="Images in IDX format, such as MNIST's; .gz is read too.")],
    out: Out = RESULTS / "pixels.csv",
    steps: Annotated[int, typer.Option(help="Optimiser steps of every attention.")] = 150,
    seed: Annotated[int, typer.Option(help="Weights, batches and random planes.")] = 0,
) -> None:
    """Train on images pixel after pixel: dense, hash-sparse and Reformer at equal steps."""
    from sparseflash.bench import session

    session.pixels(out, images=images, steps=steps, seed=seed)


@bench.command("mqar")
def bench_mqar(
    out: Out = RESULTS / "mqar.csv",
    cases: Annotated[str, typer.Option(help="Attentions, separated by semicolons; by default all.")] = "",
    steps: Annotated[int, typer.Option(help="Optimiser steps at most, for every learning rate.")] = 400,
    seed: Annotated[int, typer.Option(help="Weights, rows and random planes.")] = 0,
) -> None:
    """Train on associative recall: what can look up, and what cannot. Exit status 1 if the gate fails."""
    from sparseflash.bench import session

    names = [name.strip() for name in cases.split(";") if name.strip()]
    raise typer.Exit(0 if session.mqar(out, names=names, steps=steps, seed=seed) else 1)


@bench.command("long-run")
def bench_long_run(
    out: Out = RESULTS / "long-run.csv",
    data: Annotated[str, typer.Option(help="Text to train on; by default Python's own library.")] = "",
    runs: Annotated[
        Path, typer.Option(help="Directory of checkpoints and logs; a run that stopped goes on from there.")
    ] = Path("runs/long-run"),
    cases: Annotated[str, typer.Option(help="Attentions, separated by semicolons; by default all.")] = "",
    rates: Annotated[str, typer.Option(help="Peak learning rates, separated by commas.")] = "8e-3",
    seeds: Annotated[str, typer.Option(help="Of weights, batches and planes; with commas between.")] = "0",
    steps: Annotated[int, typer.Option(help="Optimiser steps of 16,384 bytes.")] = 1500,
    length: Annotated[int, typer.Option(help="Bytes in a sequence.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Rounds of the step times at the end; 0: none.")] = 5,
    minutes: Annotated[float, typer.Option(help="Time box of the step times.")] = 3.0,
    models: Annotated[Path | None, typer.Option(help="Directory to keep weights in, bf16.")] = None,
) -> None:
    """Train one language model under every attention and two controls: equal steps, equal time. Hours.

    Runs that OUT holds to the end are not trained again: name a few cases at a time.
    """
    from sparseflash.bench import session

    session.long_run(
        out,
        data=data,
        runs=runs,
        cases=[name.strip() for name in cases.split(";") if name.strip()],
        rates=_floats(rates),
        seeds=_integers(seeds),
        steps=steps,
        length=length,
        rounds=rounds,
        minutes=minutes,
        models=models,
    )


@bench.command("indexer")
def bench_indexer(
    out: Out = RESULTS / "indexer.csv",
    lengths: Lengths = "1024,2048,4096,8192",
    dtypes: Dtypes = "fp32,bf16",
    topk: Annotated[int, typer.Option(help="Keys that each query chooses.")] = 512,
    rounds: Rounds = 3,
    minutes: Minutes = 6.0,
) -> None:
    """Time learned sparse attention and its memory: choice, attention, loss, against the plain formulas."""
    from sparseflash.bench import session

    session.indexer(
        out,
        lengths=_integers(lengths),
        dtypes=_words(dtypes),
        topk=topk,
        rounds=rounds,
        minutes=minutes,
    )


@bench.command("transformers")
def bench_transformers(
    out: Out = RESULTS / "transformers.csv",
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
    from sparseflash.bench import session

    session.models(
        out,
        names=[name.strip() for name in models.split(";") if name.strip()],
        what=[name.strip() for name in what.split(";") if name.strip()],
        lengths=_integers(lengths),
        dtypes=_words(dtypes),
        rounds=rounds,
        minutes=minutes,
    )


@bench.command("plan-costs")
def bench_plan_costs(
    out: Out = RESULTS / "plan-costs.csv",
    length: Annotated[int, typer.Option(help="Sequence length.")] = 16384,
    rounds: Rounds = 3,
    minutes: Minutes = 3.0,
) -> None:
    """Time making, preparing and using plans: lists against the dense path, spans against units."""
    from sparseflash.bench import session

    session.plan_costs(out, length=length, rounds=rounds, minutes=minutes)


def setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SparseFlashError(f"--set {text} has no value; write it as --set name=value")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        return name.strip(), value.strip()


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise SparseFlashError(f"{text!r} is no list of lengths; write them as 1024,2048,4096") from None


def _floats(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise SparseFlashError(f"{text!r} is no list of numbers; write them as 4e-3,8e-3") from None
