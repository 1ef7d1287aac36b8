"""Run a benchmark in a terminal: progress while measuring, rows saved at once, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from sparseflash.bench import figures, results
from sparseflash.bench.machine import describe

WIDE = 160
"""Width of a table that goes into a file or a pipe, enough to cut nothing off."""


class Measure(Protocol):
    """A benchmark: yields rows, and reports progress to `on_run`."""

    def __call__(self, *, on_run: Callable[[str], None]) -> Iterable[results.Row]:
        """Yield measured rows."""
        ...


def everything(row: results.Row) -> bool:
    """Show every row."""
    return True


def session(
    title: str,
    out: Path,
    measure: Measure,
    columns: Sequence[str],
    *,
    kept: Iterable[results.Row] = (),
    shown: Callable[[results.Row], bool] = everything,
) -> list[results.Row]:
    """Measure into `out`, print the `columns` of the `shown` rows, and redraw the file's pictures.

    Parameters
    ----------
    title : str
        Text beside the spinner.
    out : Path
        CSV file; an existing one is replaced.
    measure : callable
        Yields rows; its `on_run` argument takes a line of progress.
    columns : sequence of str
        Columns of the printed table; the file has all.
    kept : iterable of dict
        Rows to put first, such as those of an earlier session.
    shown : callable
        Filter of the printed rows.

    Returns
    -------
    list of dict
        All rows of the file.
    """
    rows = watch(title, out, measure, kept)
    show(rows, out, columns, shown)
    figures.redraw(out)
    return rows


def watch(title: str, out: Path, measure: Measure, kept: Iterable[results.Row] = ()) -> list[results.Row]:
    """Measure behind a spinner; each row is appended to `out`, after the `kept` ones, at once."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    sheet = results.Sheet(out, kept)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        task = bar.add_task(title, total=None)
        for row in measure(on_run=lambda text: bar.update(task, description=f"{title}: {text}")):
            sheet.append(row)
        bar.update(task, description=title, total=1, completed=1)
    return sheet.rows


def show(
    rows: Iterable[results.Row],
    out: Path,
    columns: Sequence[str],
    shown: Callable[[results.Row], bool] = everything,
) -> None:
    """Print columns of rows as a table, red if a subject failed conformance; notes follow below."""
    from rich.console import Console
    from rich.table import Table

    rows, machine = list(rows), describe()
    table = Table(
        title=f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
        title_justify="left",
    )
    told, columns = "note" in columns, [column for column in columns if column != "note"]
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    notes: dict[str, list[str]] = {}
    for row in filter(shown, rows):
        red = "red" if str(row.get("conformance", "")).startswith("FAILED") else None
        table.add_row(*(results.cell(row.get(column)) for column in columns), style=red)
        if told and row.get("note"):
            notes.setdefault(row["note"], []).append(
                f"{row.get('case', '')}, T = {row.get('T', row.get('tokens', ''))}"
            )
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    for note, those in notes.items():
        console.print(f"{note}: {'; '.join(those)}")
    console.print(f"{out}: {len(rows)} rows")
