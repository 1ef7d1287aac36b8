"""Result rows as CSV, with the machine's description in every row."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparseflash.bench.machine import describe
from sparseflash.common.errors import SparseFlashError
from sparseflash.common.files import no_file, replacing

Row = dict[str, Any]


def write(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows`, adding the machine's columns where they are missing, and replace the file atomically."""
    rows = [{**row, **{name: x for name, x in describe().items() if name not in row}} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    except OSError as error:
        raise SparseFlashError(f"cannot write --out {path}: {error.strerror}; give a writable path") from None


class Sheet:
    """Rows that are written to their file as soon as they are measured: a killed run keeps them.

    `kept` are rows to put first, such as the file's existing ones.
    """

    def __init__(self, path: str | Path, kept: Iterable[Row] = ()) -> None:
        self.path, self.rows = Path(path), list(kept)

    def append(self, row: Row) -> None:
        """Add a row and rewrite the file atomically."""
        self.rows.append(row)
        write(self.path, self.rows)


def read(path: str | Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a file written by `write`, as strings.

    Raises
    ------
    SparseFlashError
        If the file is no result file, a row is incomplete, or one of the `columns` is missing.
    """
    try:
        if kind := no_file(path):
            raise SparseFlashError(f"{path} is {kind}: expected a result file (CSV)")
        with open(path, newline="") as stream:
            rows = list(csv.DictReader(stream, strict=True))
    except OSError as error:
        raise SparseFlashError(f"{path}: {error.strerror}; expected a result file (CSV)") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SparseFlashError(f"{path} is no result file (CSV): {error}") from None
    for n, row in enumerate(rows):
        if None in row or None in row.values():
            raise SparseFlashError(f"{path} is no result file (CSV): row {n + 1} has not one cell a column")
    for name in columns if rows else ():
        if name not in rows[0]:
            raise SparseFlashError(f"{path} has no column {name}: expected a result file of this benchmark")
    return rows


def cell(value: Any) -> str:
    """Format one value: four significant digits; "" if it was not measured."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
