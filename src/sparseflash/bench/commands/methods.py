"""Compare methods with baselines: `sparseflash bench` without a command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseflash.bench.commands import options
from sparseflash.bench.harness import Settings
from sparseflash.common.errors import SparseFlashError

from .app import RESULTS, Lengths, bench, dtypes_of, known, lengths_of, words

SETTINGS = {
    "heads": typer.Option(min=1, help="Attention heads."),
    "batch": typer.Option(min=1, help="Sequences."),
    "dim": typer.Option("--head-dim", min=1, help="Dimension of a head."),
    "dtype": typer.Option(help="fp32 or bf16."),
    "density": typer.Option(min=0, max=1, help="Share of the causal pairs that the methods are set to see."),
    "direction": typer.Option(help="forward, backward or both."),
    "device": typer.Option(help="cpu or cuda."),
    "energy": typer.Option("--energy", help="Joules of a call, where counters exist."),
    "rounds": typer.Option(min=1, help="Measured rounds, after one that warms up."),
    "minutes": typer.Option(min=0, help="Time box; what does not fit is left out, and said."),
    "seed": typer.Option(min=0, max=2**63 - 1, help="Of the inputs."),
}
"""Fields of `Settings` that become options."""
LENGTHS = ",".join(map(str, Settings.lengths))


@bench.callback()
@options.taking(*options.fields(Settings, SETTINGS))
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
    out: Annotated[
        Path, typer.Option(help="Directory of attention.csv, whose other rows stay, and its pictures.")
    ] = RESULTS,
    lengths: Lengths = LENGTHS,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, no memory: a first look.")] = False,
    capture: Annotated[
        Path | None, typer.Option(help="q, k and v of a model (sparseflash bench capture), not normal ones.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Of the capture; by default the middle one.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        options.changes(
            "A field, as method.field=value, or field=value where --methods names one; may be repeated."
        ),
    ] = None,
    **more: Any,
) -> None:
    """Compare methods with baselines, as the options say."""
    if context.invoked_subcommand is not None:
        return
    if not methods and not baselines:
        raise SparseFlashError(
            "nothing to measure: name --methods, --baselines or both, or a command (--help)"
        )
    from sparseflash.bench import cases, figures, harness, results, session

    dtypes_of(more["dtype"])
    known("direction", cases.DIRECTIONS, [more["direction"]])
    if capture is not None:
        from sparseflash.bench.capture import inputs

        more["capture"] = inputs(capture, layer=layer, dtype=cases.DTYPES[more["dtype"]])
        more["heads"], more["dim"] = more["capture"](1)[0].shape[1::2]
    if quick:
        more |= {"rounds": 3, "memory": False}
    settings = Settings(
        methods=words(methods),
        baselines=words(baselines),
        lengths=lengths_of(lengths),
        options=_of_methods(words(methods), options.settings(changes)),
        **more,
    )
    file = out / "attention.csv"
    kept = harness.others(settings, results.read(file)) if file.is_file() else []
    rows = session.watch("attention", file, partial(harness.measure, settings), kept)
    over = [x for x in rows[-1] if x.startswith("over ") and not x.startswith("over naive")][:2]
    columns = ("case", "T", "conformance", "ms", "ms_select", *over, "density", "recall", "error", "peak_mb")
    columns += (*(("joules_net",) if settings.energy else ()), "note")
    session.show(rows[len(kept) :], file, columns)
    for picture in figures.redraw(file):
        print(picture)


def _of_methods(methods: list[str], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Assign each setting to its method: the name before the dot, or the only method given."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        method, _, field = name.rpartition(".")
        if not method and len(methods) != 1:
            raise SparseFlashError(f"--set {name}: whose? write it as --set method.{name}=value")
        found.setdefault(method or methods[0], {})[field] = value
    return found
