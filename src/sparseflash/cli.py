"""The command line: parses, calls, and turns every `SparseFlashError` into one line."""

from __future__ import annotations

import ast
import codecs
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit(
        "sparseflash: the commands need typer and rich; install: pip install 'sparseflash[train]'"
    ) from None

from sparseflash.errors import SparseFlashError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Exact sparse flash attention, forward and backward, on CPU and GPU.\n\n"
    "Start with **sparseflash demo**: it trains the same small language model with dense and with sparse "
    "attention on this machine, and writes a report.",
)


def main() -> None:
    """Entry point of the ``sparseflash`` script."""
    try:
        app()
    except SparseFlashError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)


DATA, MODEL, RUN, METHOD = "Data", "Model", "Run", "Attention options (for the method that has them)"


@app.command()
def train(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Directory of the run: log.csv, curves.png, checkpoint.", rich_help_panel=RUN)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A text file, or a directory that is searched for text files. "
            "The last 5 % of each file is held out for validation.",
            rich_help_panel=DATA,
        ),
    ] = "",
    attention: Annotated[
        str,
        typer.Option(
            help="dense (torch SDPA) or a method: hash-sparse, qk-sparse, window, reformer, ... "
            "See: sparseflash methods.",
            rich_help_panel=MODEL,
        ),
    ] = "dense",
    length: Annotated[
        int,
        typer.Option(
            help="Bytes per sequence (T). Sparse attention pays from about 2048 on.", rich_help_panel=DATA
        ),
    ] = 1024,
    batch: Annotated[
        int, typer.Option(help="Sequences per forward pass and process.", rich_help_panel=DATA)
    ] = 1,
    accumulate: Annotated[
        int, typer.Option(help="Forward passes per optimiser step.", rich_help_panel=DATA)
    ] = 1,
    steps: Annotated[int, typer.Option(help="Optimiser steps of the whole run.", rich_help_panel=RUN)] = 200,
    layers: Annotated[int, typer.Option(rich_help_panel=MODEL)] = 4,
    width: Annotated[
        int, typer.Option(help="Model width; width / heads must be even.", rich_help_panel=MODEL)
    ] = 256,
    heads: Annotated[int, typer.Option(rich_help_panel=MODEL)] = 4,
    qk: Annotated[
        str,
        typer.Option(help="untied, or tied: k = q / |q| per head, as in the paper.", rich_help_panel=MODEL),
    ] = "untied",
    nb: Annotated[
        int | None,
        typer.Option(
            help="hash-sparse: number of buckets; a query sees about 1/nb of the past.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    local_heads: Annotated[
        int | None,
        typer.Option(help="hash-sparse: heads that are causal windows instead.", rich_help_panel=METHOD),
    ] = None,
    planes: Annotated[
        str | None,
        typer.Option(help="hash-sparse: random planes per-head or shared.", rich_help_panel=METHOD),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(
            help="qk-sparse: fraction of queries and keys dropped at random, 0 to 1.", rich_help_panel=METHOD
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other hyper-parameter of the method, as name=value; may be repeated.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="window (and local heads): how many keys a query sees, its own included.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="fp32, or bf16 (autocast; fast where the CPU has AMX or on a GPU).", rich_help_panel=RUN
        ),
    ] = "fp32",
    lr: Annotated[
        float, typer.Option(help="Peak learning rate (AdamW, warm-up, cosine).", rich_help_panel=RUN)
    ] = 4e-3,
    seed: Annotated[int, typer.Option(help="Weights, batches and random planes.", rich_help_panel=RUN)] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between validations.", rich_help_panel=RUN)] = 50,
    eval_sequences: Annotated[
        int,
        typer.Option(help="Held-out sequences per validation; the same for all runs.", rich_help_panel=RUN),
    ] = 4,
    save_every: Annotated[
        int,
        typer.Option(
            help="Steps between checkpoints (at the latest every two minutes).", rich_help_panel=RUN
        ),
    ] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=RUN)] = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out exactly where its checkpoint is; other options may be left out.",
            rich_help_panel=RUN,
        ),
    ] = False,
) -> None:
    """Train a small byte-level GPT on any text, with dense or sparse attention.

    A first run: **sparseflash train --data my.txt --attention hash-sparse --length 4096 --out runs/hash**

    The same with dense attention, to compare log.csv: **... --attention dense --out runs/dense**

    Ctrl-C saves and says how to go on; so does a kill, up to the last checkpoint.

    Data parallel: **torchrun --nproc-per-node 2 -m sparseflash train ...** (the batch is per process).
    """
    from sparseflash.train.attention import cli_options
    from sparseflash.train.config import TrainConfig
    from sparseflash.train.errors import TrainError
    from sparseflash.train.session import train as run
    from sparseflash.train.trainer import resume_config

    given = {name: value for name, value in context.params.items() if _explicit(context, name)}
    method = {
        name: given.pop(name) for name in ("nb", "local_heads", "planes", "drop", "window") if name in given
    }
    method |= dict(map(_setting, given.pop("options", None) or ()))
    for name in ("out", "device", "resume"):
        given.pop(name, None)
    if method:
        given["options"] = cli_options(method)
    if resume:
        config = resume_config(out, given)
    elif not data:
        raise TrainError("no --data given; name a text file or a directory of text files")
    else:
        config = TrainConfig(**given)
    raise typer.Exit(run(config, out, resume=resume, device=device))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="The --out directory of a training run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(help="Bytes to draw.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest byte; 1 samples the model as it is.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
) -> None:
    """Continue a prompt with a model trained by **sparseflash train**."""
    from sparseflash.train.sample import load_model
    from sparseflash.train.sample import sample as draw

    model, config = load_model(run)
    text = prompt.encode()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    typer.echo(prompt, nl=False)
    for byte in draw(model, text, tokens, length=config.length, temperature=temperature, seed=seed):
        typer.echo(decoder.decode(bytes([byte])), nl=False)
    typer.echo(decoder.decode(b"", final=True))


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="A text file or directory; by default Python's own library.")
    ] = "",
    minutes: Annotated[float, typer.Option(help="Time box of everything.")] = 6.0,
    out: Annotated[Path, typer.Option(help="Directory of report.html and its CSV files.")] = Path("demo"),
    length: Annotated[int, typer.Option(help="Bytes per training sequence.")] = 8192,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 where the CPU has AMX.")] = "auto",
    seed: Annotated[int, typer.Option(help="Weights, batches and random planes.")] = 0,
    tied: Annotated[
        bool, typer.Option("--tied", help="Also train the paper's dense baseline, k = q / |q|.")
    ] = False,
) -> None:
    """Watch a language model train with dense and with sparse attention, side by side, and get a report.

    Three parts: runtime curves of attention, the same model trained dense and hash-sparse in turn, and
    **report.html** with plots, tables and the plans that were used. It needs no network.
    """
    from sparseflash.bench import demo as demo_
    from sparseflash.bench.machine import has_amx
    from sparseflash.train.data import load, stdlib

    if dtype == "auto":
        dtype = "bf16" if has_amx() else "fp32"
    if minutes <= 0:
        raise SparseFlashError(f"--minutes is {minutes:g}; expected a positive number such as 6")
    command = " ".join(["sparseflash", *map(shlex.quote, sys.argv[1:])])
    demo_.run(
        load(data) if data else stdlib(),
        out,
        minutes=minutes,
        length=length,
        dtype=dtype,
        seed=seed,
        tied=tied,
        command=command,
    )


bench = typer.Typer(
    invoke_without_command=True,
    help="Measure on this machine; without a command, everything, into **benchmarks/results**.\n\n"
    "All cases of a table run in turn, the figure is the median; machine and versions stand in every row.",
)
app.add_typer(bench, name="bench")
RESULTS = Path("benchmarks/results")
Out = Annotated[Path, typer.Option(help="CSV file of the rows; an existing one is replaced.")]
Minutes = Annotated[float, typer.Option(help="Time box; what does not fit is left out, and said.")]
Lengths = Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")]
Dtypes = Annotated[str, typer.Option(help="fp32, bf16 or both, separated by commas.")]
Rounds = Annotated[int, typer.Option(help="Measured rounds, after one that warms up.")]


@bench.callback()
def bench_everything(context: typer.Context) -> None:
    """Run all benchmarks where none is named."""
    if context.invoked_subcommand is None:
        bench_curves()
        bench_attention_table()
        bench_kernel_table()
        bench_ops()
        bench_step()


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


@app.command()
def doctor() -> None:
    """Say what is usable on this machine, and why the rest is not."""
    import sparseflash as sf
    from sparseflash.bench.machine import describe

    for name, value in describe().items():
        if value and name != "backend":
            typer.echo(f"{name:12} {value}")
    for status in sf.backends().values():
        typer.echo(f"{status.name:12} {'usable' if status.usable else 'not usable'}: {status.detail}")


@app.command()
def methods() -> None:
    """List the methods: name, what a query sees, parameters."""
    from sparseflash import methods as registry

    for name in registry.names():
        method = registry.get(name)
        typer.secho(name, bold=True)
        typer.echo(f"  {(type(method).__doc__ or '').strip().splitlines()[0]}")
        typer.echo(f"  {method!r}")


@app.command()
def show(
    method: Annotated[str, typer.Argument(help="A name that `sparseflash methods` lists.")],
    length: Annotated[int, typer.Option(help="Tokens.")] = 256,
    heads: Annotated[int, typer.Option(help="Heads; the first one is drawn.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the random queries and keys.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write here: a picture if it ends in .png, .svg or .pdf, else text.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyper-parameter of the method, as name=value; may be repeated."),
    ] = None,
) -> None:
    """Draw the plan a method makes for random queries and keys."""
    import torch

    from sparseflash.train.attention import build

    chosen = build(method, dict(map(_setting, options or ())))
    if not hasattr(chosen, "select"):
        raise SparseFlashError(f"{method} has no plan to draw; choose one that `sparseflash methods` lists")
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, length, 64, generator=generator) for _ in range(2))
    plan = chosen.select(q, k).plan
    plans = plan if isinstance(plan, tuple) else (plan,)
    text = "\n\n".join(f"{one}\n{one.explain()}" for one in plans)
    if out is None:
        typer.echo(text)
        return
    try:
        if out.suffix.lower() not in (".png", ".svg", ".pdf"):
            out.write_text(text + "\n", encoding="utf-8")
            return
        for n, one in enumerate(plans):  # the plans of a tuple: name.svg, name-2.svg, ...
            one.plot(out.with_stem(f"{out.stem}-{n + 1}") if n else out)
        typer.echo("\n\n".join(one.explain() for one in plans))
    except OSError as error:
        raise SparseFlashError(f"cannot write --out {out}: {error.strerror}; give a writable path") from None


def _setting(text: str) -> tuple[str, Any]:
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


def _explicit(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


if __name__ == "__main__":
    main()
