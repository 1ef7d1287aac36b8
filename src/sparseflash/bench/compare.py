"""Compare two result files row by row: which figures became slower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparseflash.bench import results
from sparseflash.common.errors import SparseFlashError

KEY = ("bench", "what", "mix", "level", "case", "direction", "T", "batch", "heads", "dim", "dtype", "device")
"""Columns that identify a row."""
RATIOS = ("ratio", "speedup", "over sdpa", "over_sdpa")
"""Ratio columns, compared if both rows have one: a ratio inside one run cancels machine noise."""
LIMIT = 0.05


@dataclass(frozen=True)
class Change:
    """One figure in both files; `slower` is the slowdown factor of the second."""

    row: str
    column: str
    before: float
    after: float
    slower: float

    @property
    def regression(self) -> bool:
        """Whether it is more than 5 % slower."""
        return self.slower > 1 + LIMIT


def compare(before: Iterable[Mapping[str, str]], after: Iterable[Mapping[str, str]]) -> list[Change]:
    """Match rows by what they measured; the largest slowdown first.

    Raises
    ------
    SparseFlashError
        If the files have no row in common.
    """
    old = {_key(row): row for row in before}
    changes = []
    for row in after:
        twin = old.get(_key(row), {})
        column = next((x for x in RATIOS if row.get(x) and twin.get(x)), "ms")
        if row.get(column) and twin.get(column):
            try:
                was, now = float(twin[column]), float(row[column])
            except ValueError as error:
                raise SparseFlashError(
                    f"row {', '.join(filter(None, _key(row)))}: {column}: {error}"
                ) from None
            if not (was > 0 and now > 0):
                continue  # a ratio needs positive figures
            slower = now / was if column == "ms" else was / now
            changes.append(Change(", ".join(filter(None, _key(row))), column, was, now, slower))
    if not changes:
        raise SparseFlashError(f"the files have no row in common (rows are matched by {', '.join(KEY)})")
    return sorted(changes, key=lambda x: -x.slower)


def files(before: Path, after: Path) -> list[Change]:
    """Compare two result files, or files of equal name in two directories.

    Raises
    ------
    SparseFlashError
        If a file does not exist, or no row is in common.
    """
    pairs = [(before, after)]
    if before.is_dir() and after.is_dir():
        pairs = [(x, after / x.name) for x in sorted(before.glob("*.csv")) if (after / x.name).is_file()]
    for path in (x for pair in pairs or [(before, after)] for x in pair):
        if not path.is_file():
            raise SparseFlashError(f"{path}: no result file; name two CSV files, or two directories of them")
    return [x for old, new in pairs for x in compare(results.read(old), results.read(new))]


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row.get(x) or "" for x in KEY)
