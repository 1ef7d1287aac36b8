"""Rows that are measured one by one: what a file has is not measured again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sparseflash.bench.results import Row, cell


@dataclasses.dataclass(frozen=True)
class Job:
    """One row to measure: what it is told from others by, and how to find the rest."""

    key: Row
    run: Callable[[], Row]

    def done(self, known: Iterable[Mapping[str, Any]]) -> bool:
        """Whether one of the rows is this one's."""
        want = {name: cell(x) for name, x in self.key.items()}
        return any(all(cell(row.get(name)) == x for name, x in want.items()) for row in known)


def unfinished(jobs: Iterable[Job], known: Sequence[Mapping[str, Any]]) -> list[Job]:
    """The jobs that have no row yet."""
    return [job for job in jobs if not job.done(known)]


def measure(jobs: Sequence[Job], *, on_run: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """One row a job, with the seconds that it took."""
    for number, job in enumerate(jobs, 1):
        on_run(f"{number} of {len(jobs)}: {', '.join(map(str, job.key.values()))}")
        start = time.perf_counter()
        row = job.key | job.run()
        yield row | {"seconds": time.perf_counter() - start}


def numbers(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """The figures of a column, where there are any."""
    return [float(row[name]) for row in rows if cell(row.get(name)) not in ("", "nan")]


def mean(values: Sequence[float]) -> float:
    """Their mean; NaN of none."""
    return sum(values) / len(values) if values else float("nan")
