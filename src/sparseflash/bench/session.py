"""A benchmark in a terminal: progress while it measures, rows in their file at once, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from sparseflash.bench import figures, results
from sparseflash.bench.machine import describe

WIDE = 160
"""Columns of a table that goes into a file or a pipe, where nothing has to be cut off."""


class Measure(Protocol):
    """What yields rows, and tells `on_run` what it is at."""

    def __call__(self, *, on_run: Callable[[str], None]) -> Iterable[results.Row]:
        """Measure."""
        ...


def everything(row: results.Row) -> bool:
    """Show each row."""
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
    """Measure into `out`, print the `columns` of what is `shown`, and redraw the pictures of the file.

    Parameters
    ----------
    title : str
        What the spinner says.
    out : Path
        CSV file; an existing one is replaced.
    measure : callable
        Yields rows; its `on_run` takes a line of progress.
    columns : sequence of str
        Of the printed table; the file has all.
    kept : iterable of dict
        Rows that come before, such as those of an earlier session.
    shown : callable
        Which rows are printed.

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
    """Measure behind a spinner; each row is in `out`, behind the `kept` ones, as soon as it is there."""
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
    """Print some columns of rows as a table, red where a subject failed conformance; notes stand below."""
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
            notes.setdefault(row["note"], []).append(f"{row.get('case', '')}, T = {row.get('T', '')}")
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    for note, those in notes.items():
        console.print(f"{note}: {'; '.join(those)}")
    console.print(f"{out}: {len(rows)} rows")
