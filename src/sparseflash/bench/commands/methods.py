"""Any method against any baseline: what `sparseflash bench` does without a command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseflash.errors import SparseFlashError

from .app import RESULTS, Lengths, Minutes, Rounds, bench, dtypes_of, known, lengths_of, setting, words


@bench.callback()
def bench_methods(
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
    out: Annotated[
        Path, typer.Option(help="Directory of attention.csv, whose other rows stay, and its pictures.")
    ] = RESULTS,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    head_dim: Annotated[int, typer.Option(min=1, help="Dimension of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    density: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the causal pairs that the methods are set to see."),
    ] = None,
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "both",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    energy: Annotated[bool, typer.Option("--energy", help="Joules of a call, where counters exist.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, no memory: a first look.")] = False,
    rounds: Rounds = 9,
    minutes: Minutes = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs.")] = 0,
    capture: Annotated[
        Path | None, typer.Option(help="q, k and v of a model (sparseflash bench capture), not normal ones.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Of the capture; by default the middle one.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyper-parameter, as method.field=value; may be repeated."),
    ] = None,
) -> None:
    """Run the comparison that the options name."""
    if context.invoked_subcommand is not None:
        return
    if not methods and not baselines:
        raise SparseFlashError(
            "nothing to measure: name --methods, --baselines or both, or a command (--help)"
        )
    from sparseflash.bench import cases, figures, harness, results, session

    dtypes_of(dtype)
    known("direction", cases.DIRECTIONS, [direction])
    chosen: dict[str, dict[str, Any]] = {}
    for name, value in map(setting, options or ()):
        method, dot, field = name.partition(".")
        if not dot:
            raise SparseFlashError(f"--set {name}: whose? write it as --set method.{name}=value")
        chosen.setdefault(method, {})[field] = value
    real = None
    if capture is not None:
        from sparseflash.bench.capture import inputs

        real = inputs(capture, layer=layer, dtype=cases.DTYPES[dtype])
        heads, head_dim = real(1)[0].shape[1::2]
    settings = harness.Settings(
        methods=words(methods),
        baselines=words(baselines),
        lengths=lengths_of(lengths),
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
    file = out / "attention.csv"
    kept = harness.others(settings, results.read(file)) if file.is_file() else []
    rows = session.watch("attention", file, partial(harness.measure, settings), kept)
    over = [x for x in rows[-1] if x.startswith("over ") and not x.startswith("over naive")][:2]
    columns = ("case", "T", "conformance", "ms", "ms_select", *over, "density", "recall", "error", "peak_mb")
    columns += (*(("joules_net",) if energy else ()), "note")
    session.show(rows[len(kept) :], file, columns)
    for picture in figures.redraw(file):
        print(picture)
