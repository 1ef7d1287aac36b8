"""The commands of ``sparseflash`` and ``python -m sparseflash``: an error of the library is one line here."""

from __future__ import annotations

import codecs
import dataclasses
import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit(
        "sparseflash: the commands need typer and rich; install: pip install 'sparseflash[train]'"
    ) from None

from sparseflash import methods as registry
from sparseflash import nn
from sparseflash.bench.commands import bench, generation, options, prompts
from sparseflash.bench.commands.app import call
from sparseflash.bench.commands.board import board
from sparseflash.common import files
from sparseflash.common.errors import SparseFlashError
from sparseflash.train.attention import FLAGS, cli_options
from sparseflash.train.config import TrainConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Exact sparse flash attention, forward and backward, on CPU and GPU.\n\n"
    "Start with **sparseflash demo**: it trains the same small language model with dense and with sparse "
    "attention on this machine, and writes a report.",
)


def _version(asked: bool) -> None:
    if asked:
        import sparseflash as sf

        typer.echo(sf.__version__)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is."),
    ] = False,
) -> None:
    """Hold the program-wide options; the help text is that of `app` above."""


def main() -> None:
    """Entry point of the ``sparseflash`` script."""
    call(app)


DATA, MODEL, RUN, METHOD = "Data", "Model", "Run", "Attention options (for the method that has them)"


SEED = 2**63 - 1
"""The largest seed that torch's generators take."""


def _option(
    panel: str, said: str | None = None, least: float | None = None, most: float | None = None
) -> Any:
    return typer.Option(help=said, min=least, max=most, rich_help_panel=panel)


TRAINING = {
    "attention": _option(
        MODEL,
        "dense (torch SDPA), a method (hash-sparse, qk-sparse, window, ... See: sparseflash methods) "
        f"or a layer ({', '.join(nn.names())}); or a pattern that the layers of the model take in turn, "
        "such as sink-window*2,dense.",
    ),
    "length": _option(DATA, "Bytes per sequence (T). Sparse attention pays from about 2048 on.", 1),
    "batch": _option(DATA, "Sequences per forward pass and process.", 1),
    "accumulate": _option(DATA, "Forward passes per optimiser step.", 1),
    "steps": _option(RUN, "Optimiser steps of the whole run.", 1),
    "layers": _option(MODEL, least=1),
    "width": _option(MODEL, "Model width; width / heads must be even.", 1),
    "heads": _option(MODEL, least=1),
    "objective": _option(
        MODEL, "next: predict the next byte; masked: fill in masked bytes, seeing both sides (diffusion)."
    ),
    "qk": _option(MODEL, "untied, or tied: k = q / |q| per head, as in the paper."),
    "dtype": _option(RUN, "fp32, or bf16 (autocast; fast where the CPU has AMX or on a GPU)."),
    "lr": _option(RUN, "Peak learning rate (AdamW, warm-up, cosine).", 0),
    "seed": _option(RUN, "Weights, batches and random planes.", 0, SEED),
    "eval_every": _option(RUN, "Steps between validations.", 1),
    "eval_sequences": _option(RUN, "Held-out sequences per validation; the same for all runs.", 1),
    "context_parallel": _option(
        RUN, "Processes that share each sequence, under torchrun; 1 is data parallel alone.", 1
    ),
    "dropout": _option(MODEL, "Share of attention weights left out while training, below 1.", 0, 1),
    "rope_base": _option(MODEL, "Of the frequencies of rotary positions; a larger one reaches further.", 0),
    "eval_length": _option(
        DATA, "Bytes of a validation sequence, 0 for --length; longer ones are read in parts with a state.", 0
    ),
    "save_every": _option(RUN, "Steps between checkpoints (at the latest every two minutes).", 1),
}
"""Fields of `TrainConfig` that become options: each with its help panel, help text and minimum."""


@app.command()
@options.taking(
    *options.fields(TrainConfig, TRAINING),
    *options.flags(FLAGS, registry.find, rich_help_panel=METHOD),
)
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
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=RUN)] = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out exactly where its checkpoint is; other options may be left out.",
            rich_help_panel=RUN,
        ),
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the weights of this run; its options are the defaults. A larger --length raises "
            "--rope-base to suit.",
            rich_help_panel=RUN,
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        options.changes(
            "An option of the method or layer, as name=value with a Python literal; of one in a pattern "
            "as NAME.option=value; may be repeated.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    **more: Any,
) -> None:
    """Train a small byte-level GPT on any text, with dense or sparse attention.

    A first run: **sparseflash train --data my.txt --attention hash-sparse --length 4096 --out runs/hash**

    The same with dense attention, to compare log.csv: **... --attention dense --out runs/dense**

    A hybrid, longer than the run it begins with: **... train --init runs/dense --length 4096
    --attention sink-window,dense,sink-window --out runs/hybrid**

    Ctrl-C saves a checkpoint and prints how to resume; after a kill, the last checkpoint is there.

    Data parallel: **torchrun --nproc-per-node 2 -m sparseflash train ...** (the batch is per process).

    Context parallel, two processes per sequence: **... train --context-parallel 2 ...**; on four processes,
    two such pairs run data parallel. A run may resume on another number of processes.
    """
    from sparseflash.train.errors import TrainError
    from sparseflash.train.session import train as run
    from sparseflash.train.trainer import init_config, resume_config

    given = {name: value for name, value in context.params.items() if _explicit(context, name)}
    method = {name: options.literal(given.pop(name)) for name in FLAGS if name in given}
    method |= options.settings(changes)
    given = {name: value for name, value in given.items() if name in ("data", *TRAINING)}
    if method:
        given["options"] = cli_options(method)
    if resume and init:
        raise TrainError(
            "--resume goes on with the run in --out, --init begins another one; give one of them"
        )
    if resume:
        config = resume_config(out, given)
    elif init:
        config = init_config(init, given)
    elif not data:
        raise TrainError("no --data given; name a text file or a directory of text files")
    else:
        config = TrainConfig(**given)
    raise typer.Exit(run(config, out, resume=resume, device=device, init=init))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="The --out directory of a training run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="Bytes to draw.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest byte; 1 samples the model as it is.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Same seed, same text.")] = 0,
    steps: Annotated[
        int, typer.Option(min=0, help="Denoising steps of a masked model; 0: one for every two bytes.")
    ] = 0,
    attention: Annotated[
        str, typer.Option(help="A method for a masked model, such as sparsed; its own attention by default.")
    ] = "",
    changes: Annotated[
        list[str] | None, options.changes("A field of that method, as name=value; may be repeated.")
    ] = None,
) -> None:
    """Continue a prompt with a model trained by **sparseflash train**.

    A run with **--objective masked** writes all bytes at once, over several steps:
    **... sample runs/masked --steps 32 --attention sparsed --set select_share=0.3**
    """
    from sparseflash.train.attention import Sparse, build
    from sparseflash.train.sampling import fill, load_model
    from sparseflash.train.sampling import sample as draw

    model, config = load_model(run)
    text = prompt.encode()
    if model.masked or steps or attention or changes:
        chosen = build(attention or "dense", options.settings(changes), objective="masked")
        method = chosen.method if isinstance(chosen, Sparse) else None
        given = {"length": config.length, "steps": steps, "temperature": temperature, "seed": seed}
        written = fill(model, text, tokens, method=method, **given)
        typer.echo(prompt + written.decode("utf-8", "replace"), nl=False)
        return
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
    minutes: Annotated[float, typer.Option(min=0, help="Time box of everything.")] = 6.0,
    out: Annotated[Path, typer.Option(help="Directory of report.html and its CSV files.")] = Path("demo"),
    length: Annotated[int, typer.Option(min=1, help="Bytes per training sequence.")] = 8192,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 where the CPU has AMX.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Weights, batches and random planes.")] = 0,
    tied: Annotated[
        bool, typer.Option("--tied", help="Also train the paper's dense baseline, k = q / |q|.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        options.changes("A field of the hash-sparse models, as name=value, such as nb=8; may be repeated."),
    ] = None,
) -> None:
    """Watch a language model train with dense and with sparse attention, side by side, and get a report.

    Three parts: runtime curves of attention, the same model trained dense and hash-sparse in turn, and
    **report.html** with plots, tables and the plans that were used. No network is needed.
    """
    from sparseflash.bench import demo as demo_
    from sparseflash.bench.machine import has_amx
    from sparseflash.train.data import named

    if dtype == "auto":
        dtype = "bf16" if has_amx() else "fp32"
    if minutes <= 0:
        raise SparseFlashError(f"--minutes is {minutes:g}; expected a positive number such as 6")
    command = " ".join(["sparseflash", *map(shlex.quote, sys.argv[1:])])
    demo_.run(
        named(data),
        out,
        minutes=minutes,
        length=length,
        dtype=dtype,
        seed=seed,
        tied=tied,
        changes=options.settings(changes),
        command=command,
    )


app.add_typer(bench, name="bench")
for _command in (prompts.prefill, generation.generate, prompts.recommend, prompts.calibrate, board):
    app.command(rich_help_panel="Long prompts of real models")(_command)


@app.command()
def doctor(
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Compile the CPU kernels and say how that went; exit status 1 if it failed."
        ),
    ] = False,
) -> None:
    """Say what is usable on this machine, and why the rest is not."""
    import sparseflash as sf
    from sparseflash.backends import cpu
    from sparseflash.bench.machine import describe

    able, started = True, time.monotonic()
    if build:
        able, detail = cpu.status()
        done = f"ready after {time.monotonic() - started:.0f} s" if able else "failed"
        typer.echo(f"{'CPU kernels':12} {done}: {detail}")
        import torch

        if torch.cuda.is_available():
            from sparseflash.backends.triton import trust

            card = torch.device("cuda", torch.cuda.current_device())
            found = trust.checked(trust.card_of(card), card)
            typer.echo(f"{'Triton':12} kernels {found or 'passed their check on this card'}")
    for name, value in describe().items():
        if value and name != "backend":
            typer.echo(f"{name:12} {value}")
    for status in sf.backend_status().values():
        typer.echo(f"{status.name:12} {'usable' if status.usable else 'not usable'}: {status.detail}")
    raise typer.Exit(0 if able else 1)


@app.command()
def methods(
    name: Annotated[str, typer.Argument(help="One of them: its fields, with defaults and meaning.")] = "",
) -> None:
    """List the methods: name, what a query attends to, parameters; or describe the named method."""
    if name:
        cls = registry.find(name)
        said, of = options.described(cls), dataclasses.fields(cls)
        typer.secho(name, bold=True)
        typer.echo(f"  {_first_line(cls)}\n")
        for field in of:
            typer.echo(f"  {field.name} = {field.default!r}")
            typer.echo(textwrap.indent(textwrap.fill(said.get(field.name, ""), 90), " " * 6))
        example = shlex.quote(f"{of[0].name}={of[0].default}")
        typer.echo(f"\nWith sparseflash bench, show and train: --set {example}")
        return
    for slug in registry.names():
        method = registry.get(slug)
        typer.secho(slug, bold=True)
        typer.echo(f"  {_first_line(type(method))}")
        typer.echo(f"  {method!r}")


@app.command()
def show(
    method: Annotated[str, typer.Argument(help="A name that `sparseflash methods` lists.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Heads; the first one is drawn.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Of the random queries and keys.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write here: a picture if it ends in .png, .svg or .pdf, text in .txt."),
    ] = None,
    changes: Annotated[list[str] | None, options.changes()] = None,
) -> None:
    """Draw the plan a method makes for random queries and keys."""
    import torch

    from sparseflash import Plan, Plans
    from sparseflash.train.attention import build

    if method != "dense":
        registry.find(method)
    known = (".png", ".svg", ".pdf", ".txt")
    if out is not None and not out.is_char_device() and out.suffix.lower() not in known:
        raise SparseFlashError(f"--out {out}: expected a name that ends in {', '.join(known)}")
    chosen = build(method, options.settings(changes))
    if not hasattr(chosen, "select"):
        raise SparseFlashError(f"{method} has no plan to draw; choose one that `sparseflash methods` lists")
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, length, 64, generator=generator) for _ in range(2))
    plan = chosen.shown(q, k, chosen.select(q, k))
    several = plan if isinstance(plan, (Plan, Plans)) else Plans(plan)
    text = f"{several}\n{several.explain()}"
    if out is None:
        typer.echo(text)
        return
    try:
        if out.suffix.lower() not in known[:3]:
            files.write(out, text + "\n")
            return
        several.plot(out)
        typer.echo(several.explain())
    except OSError as error:
        raise SparseFlashError(f"cannot write --out {out}: {error.strerror}; give a writable path") from None


@app.command()
def fuse(
    program: Annotated[str, typer.Argument(help="attention, layernorm-matmul or rmsnorm-swiglu.")],
    local: Annotated[int, typer.Option(min=1, help="Local memory, KiB.")] = 16384,
    bandwidth: Annotated[float, typer.Option(min=1e-3, help="Between global and local memory, GB/s.")] = 10.0,
    gflops: Annotated[
        float, typer.Option(min=1e-3, help="Speed of arithmetic, Gflop/s; by default only bytes count.")
    ] = float("inf"),
    draw: Annotated[
        Path | None,
        typer.Option(help="Write a picture of the start and of each step (SVG) into this directory."),
    ] = None,
    emit: Annotated[bool, typer.Option("--emit", help="Print the fused program as a Triton kernel.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Of the inputs of the check.")] = 0,
    changes: Annotated[
        list[str] | None,
        options.changes("Elements of a dimension, as name=value, such as n=8192; may be repeated."),
    ] = None,
) -> None:
    """Watch loops being fused: nine rules, none specific to attention, derive flash attention.

    Shows the derivation with the bytes that each step saves, the cost before and after, and the largest
    difference between both programs on random inputs.
    """
    from sparseflash import fusion

    if program not in fusion.GOLDEN:
        raise SparseFlashError(f"no program {program}; expected {', '.join(fusion.GOLDEN)}")
    sizes = fusion.SIZES[program] | options.settings(changes)
    tiers = fusion.Tiers(local << 10, bandwidth * 1e9, gflops * 1e9, call=0.0)
    found = fusion.fuse(fusion.GOLDEN[program](), sizes, tiers=tiers)
    typer.echo(found.explain())
    typer.echo(f"largest difference to one by one, of fp64 inputs: {found.check(seed):.1e}")
    if emit:
        name = program.replace("-", "_")
        blocks = {dim: min(n, 64) for dim, n in found.sizes.items()}
        typer.echo(f"\n{fusion.Kernel(found.program, found.sizes, blocks, name).source}")
    if draw is None:
        return
    try:
        draw.mkdir(parents=True, exist_ok=True)
        for name, picture in found.pictures().items():
            (draw / f"{program}-{name}.svg").write_text(picture, encoding="utf-8")
    except OSError as error:
        raise SparseFlashError(
            f"cannot write --draw {draw}: {error.strerror}; give a writable path"
        ) from None


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _explicit(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


if __name__ == "__main__":
    main()
