"""Runs stages, and goes on where a run was cut off."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sparseflash.bench.results import Row, cell, read, write

from .device import DRY, machine
from .task import Stage, Task

SAME = ("gpu", "torch", "triton", "git")
"""Columns in which a row has to agree with this run to count as done."""


def _worker(name: str, number: int) -> list[Row]:
    from .stages import STAGES

    return STAGES[name].tasks()[number].rows()


class Run:
    """One call of the program: where results go, and when to stop."""

    def __init__(
        self, out: Path, *, minutes: float | None = None, again: bool = False, retry: bool = False
    ) -> None:
        self.out, self.again, self.retry = out, again, retry
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.about = machine()

    def path(self, name: str) -> Path:
        """Where a stage's rows are."""
        return self.out / f"gpu-{name}.csv"

    def kept(self, name: str) -> list[Row]:
        """Rows of an earlier call that still hold."""
        if self.again or not self.path(name).exists():
            return []
        rows: list[Row] = list(read(self.path(name)))
        rows = [row for row in rows if all(row.get(n) == self.about[n] for n in SAME)]
        return [row for row in rows if not (self.retry and row.get("error"))]

    def missing(self, name: str, tasks: list[Task], rows: list[Row] | None = None) -> list[int]:
        """Numbers of the tasks that have no row, of those that are kept or of others."""
        rows = self.kept(name) if rows is None else rows

        def done(key: Row) -> bool:
            return any(all(row.get(n) == cell(x) for n, x in key.items()) for row in rows)

        return [n for n, task in enumerate(tasks) if not done(task.key)]

    def state(self, name: str, stage: Stage) -> str:
        """A line about a stage."""
        tasks = stage.tasks()
        left = self.missing(name, tasks)
        following = f", next: {said(tasks[left[0]].key)}" if left else ""
        return f"{name}: {len(tasks) - len(left)} of {len(tasks)} tasks done{following}"

    def stage(self, name: str, stage: Stage) -> bool:
        """Run what is missing of a stage; whether it is complete now."""
        print(self.state(name, stage), flush=True)
        tasks = stage.tasks()
        left = self.missing(name, tasks)
        rows, done = self.kept(name), 0
        for found in self._results(name, stage, tasks, left):
            rows += [row | self.about for row in found]
            write(self.path(name), rows)
            done += 1
            for row in found:
                print(f"  {name}: {said(row)}", flush=True)
        return done == len(left)

    def _results(self, name: str, stage: Stage, tasks: list[Task], left: list[int]) -> Iterator[list[Row]]:
        if not stage.parallel or DRY:
            for n in left:
                if time.monotonic() > self.end:
                    return
                yield tasks[n].rows()
            return
        workers = min(8, os.cpu_count() or 1)
        # a process that uses a GPU must not be forked
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for at in range(0, len(left), workers):
                if time.monotonic() > self.end:
                    return
                yield from pool.map(_worker, [name] * workers, left[at : at + workers])


def said(row: Row) -> str:
    """A row as a line."""
    return ", ".join(f"{name} {cell(x)}" for name, x in row.items())
