"""What a stage is: tasks, each with rows of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sparseflash.bench.results import Row


@dataclass(frozen=True)
class Task:
    """A piece of a stage: `key` tells it from the others and stands in each of its rows."""

    key: Row
    run: Callable[[], Iterable[Row]]

    def each(self) -> Iterator[Row]:
        """What is measured, row by row; where that fails, a row that says why."""
        try:
            for row in self.run():
                yield self.key | row
        except Exception as error:
            yield self.failed(error)

    def rows(self) -> list[Row]:
        """What was measured; where that failed one row that says why."""
        try:
            return [self.key | row for row in self.run()]
        except Exception as error:
            return [self.failed(error)]

    def failed(self, error: Exception | str) -> Row:
        """The row that says why there is no other."""
        said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return self.key | {"error": " ".join(said.split())[:600]}


@dataclass(frozen=True)
class Stage:
    """Tasks in their order. `parallel`: nothing is timed, so they may run (mostly: compile) side by side."""

    tasks: Callable[[], list[Task]]
    minutes: int
    about: str
    parallel: bool = False
