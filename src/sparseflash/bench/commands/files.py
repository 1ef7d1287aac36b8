"""Commands around the figures: inputs to measure on, pictures, comparisons, and the energy counter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseflash.errors import SparseFlashError

from .app import RESULTS, Data, bench, integers

PANEL = "Inputs and results"


@bench.command("capture", rich_help_panel=PANEL)
def bench_capture(
    out: Annotated[Path, typer.Option(help="Safetensors file, 8 MB at most.")],
    model: Annotated[str, typer.Option(help="A causal model of Transformers: name or directory.")] = "",
    run: Annotated[Path | None, typer.Option(help="Or the --out of a sparseflash train.")] = None,
    data: Data = "",
    length: Annotated[int, typer.Option(min=1, help="Bytes of held-out text to run it on.")] = 2048,
    layers: Annotated[str, typer.Option(help="Attention layers, separated by commas; by default all.")] = "",
) -> None:
    """Keep the queries, keys and values of a real model, as input for bench --capture."""
    from sparseflash.bench import capture
    from sparseflash.bench.machine import describe
    from sparseflash.train.data import named

    if bool(model) == (run is not None):
        raise SparseFlashError("name one model: --model of Transformers, or --run of sparseflash train")
    corpus = named(data)
    text = next(iter(corpus.validation(length, 1)))[0]
    found = (
        capture.of_model(model, text, integers(layers))
        if model
        else capture.of_run(run, text, integers(layers))
    )
    said = Path(data).name or corpus.name  # not where it lies on this machine
    about = {"model": model or f"sparseflash train, {run.name}", "text": said, "git": describe()["git"]}
    size = capture.save(found, out, about)
    print(f"{out}: {len(found) // 3} layers of {list(next(iter(found.values())).shape)}, {size:.1f} MB")


@bench.command("plot", rich_help_panel=PANEL)
def bench_plot(
    directory: Annotated[Path, typer.Argument(help="Directory of result files, or one of them.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Directory of the pictures; beside the files.")] = None,
) -> None:
    """Redraw every picture from its CSV file alone."""
    from sparseflash.bench import figures

    figures.redraw(directory, out, on_file=print)


@bench.command("compare", rich_help_panel=PANEL)
def bench_compare(
    before: Annotated[Path, typer.Argument(help="Result file, or a directory of them.")],
    after: Annotated[Path, typer.Argument(help="The same, measured later.")],
) -> None:
    """Name what became more than 5 % slower; exit status 1 if anything did."""
    from rich.console import Console
    from rich.table import Table

    from sparseflash.bench import compare

    changes = list(compare.files(before, after))
    worse = [x for x in changes if x.regression]
    console = Console(soft_wrap=True)
    if worse:
        table = Table("row", "figure", "before", "after", "slower by")
        for x in worse:
            table.add_row(x.row, x.column, f"{x.before:.4g}", f"{x.after:.4g}", f"{x.slower - 1:.0%}")
        console.print(table)
    console.print(f"{len(changes)} figures compared, {len(worse)} slower by more than {compare.LIMIT:.0%}")
    raise typer.Exit(1 if worse else 0)


@bench.command("energy", rich_help_panel=PANEL)
def bench_energy() -> None:
    """Test the energy counter: linear in the time of a load, quiet without; or say why there is none."""
    import torch

    from sparseflash.bench import energy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    meter, why = energy.counter(device)
    if meter is None:
        print(f"energy: null ({why})")
        raise typer.Exit(1)
    x = torch.randn(1024, 1024, device=device)
    wrong = energy.self_test(lambda: x @ x, meter)
    print(f"energy: {meter.name}: " + ("; ".join(wrong) or "linear in time, idle is idle"))
    raise typer.Exit(1 if wrong else 0)
