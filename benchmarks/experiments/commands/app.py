"""The application: what `sparseflash bench` has, and the experiments, with results where the pages look."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseflash.bench.commands import bench

if TYPE_CHECKING:
    from sparseflash.bench.results import Row

    from ..claim.rows import Job

RESULTS = Path("benchmarks/results")
Kept = Annotated[Path, typer.Option(help="CSV file of the rows; what else an existing one holds stays.")]
Length = Annotated[int, typer.Option(min=1, help="Sequence length.")]
# of the commands of `sparseflash bench`, which write below the current directory on their own
DEFAULTS = {
    "curves": {"out": str(RESULTS / "curves.csv")},
    "breakeven": {"out": str(RESULTS / "breakeven.csv")},
    "plot": {"directory": str(RESULTS)},
}

experiments = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"default_map": DEFAULTS},
    help="Measure what README and docs show, from a checkout. One table a command, each into a file of "
    "**benchmarks/results**; **tables** runs the short ones, as **make bench** does.\n\n"
    "A first look: **python -m benchmarks.experiments mqar --steps 50 --out /tmp/mqar.csv**. What the pages "
    "show follows the files: **make figures**.\n\n"
    "All cases of a table run in turn, the figure is the median; machine and versions stand in every row.",
)
experiments.registered_commands += bench.registered_commands


def go_on(name: str, out: Path, jobs: Sequence[Job]) -> list[Row]:
    """Measure the jobs that OUT has no row of, each saved as it is measured; all rows of OUT."""
    from sparseflash.bench import results
    from sparseflash.bench.session import watch

    from ..claim.rows import measure, unfinished

    there = list(results.read(out)) if out.is_file() else []
    return watch(name, out, partial(measure, unfinished(jobs, there)), there)
