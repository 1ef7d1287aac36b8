"""The first ten minutes on a card: of every stage what tells most, against the clock.

Each part may take its share of the minutes; what it leaves over is for those behind it, and what has no time
left is a row that says so. A task that hangs is ended, one that breaks its process costs no other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparseflash.backends.triton import blocks
from sparseflash.bench.results import Row, write

from . import ahead, conformance, kernels, scfa, training, tuning
from .device import DEVICE, DRY
from .runner import Run, said
from .task import Task
from .worker import Worker

SKIPPED = "skipped: no time left"
GRACE = 20.0
"""Seconds by which the last task of a part may take longer than its share."""


@dataclass(frozen=True)
class Part:
    """Tasks with the share of the minutes that is theirs."""

    name: str
    share: float
    tasks: Callable[[], list[Task]]


def _dense() -> list[Task]:
    return [kernels.dense_task(D, 32 if DRY else 16384, 10) for D in reversed(kernels.DIMS)]


def _blocks() -> list[Task]:
    T, shares = (64, (0.5,)) if DRY else (16384, (0.25, 0.1))
    return [kernels.blocks_task(kernels.DIMS[-1], T, share, 10, flex=False) for share in shares]


def _decode() -> list[Task]:
    mib, (batch, group) = (1, (2, 1)) if DRY else (64, (8, 4))
    layouts = ("contiguous", "pages of 64")
    return [kernels.decode_task(mib, batch, group, kernels.DIMS[-1], layout) for layout in layouts]


def _tune() -> list[Task]:
    found = [task for task in tuning.tune() if task.key["dtype"] != "float16" or DRY]
    found = [task for task in found if task.key["dim"] in kernels.DIMS]
    return found[:1] if DRY else found


PARTS = (
    Part("check", 0.15, conformance.few),
    Part("dense", 0.18, _dense),
    Part("blocks", 0.09, _blocks),
    Part("curves", 0.11, lambda: scfa.few(4, 48, 32768, 3)),
    Part("step", 0.11, lambda: training.few(6)),
    Part("decode", 0.04, _decode),
    Part("tune", 0.15, _tune),
)
COMPILING = 0.17
"""The share of what compiles, side by side, what no pack has brought; the other shares begin behind it."""


def of_parts(parts: Sequence[Part]) -> list[Task]:
    """The tasks of parts, in order."""
    return [Task({"part": part.name} | task.key, task.run) for part in parts for task in part.tasks()]


def tasks() -> list[Task]:
    """All of them."""
    return of_parts(PARTS)


class Race:
    """One call against the clock; `source` is where the worker finds the tasks of `parts`."""

    def __init__(
        self,
        run: Run,
        minutes: float,
        parts: Sequence[Part] = PARTS,
        source: str = f"{__name__}:tasks",
        grace: float = GRACE,
    ) -> None:
        self.run, self.parts, self.grace = run, parts, grace
        self.worker = Worker(source)
        self.seconds, self.began = 60 * minutes, time.monotonic()
        self.end = self.began + self.seconds
        self.rows = [row for row in run.kept("first") if row.get("error") != SKIPPED]

    def go(self) -> str:
        """Run what is missing; a line about what came of it."""
        every = of_parts(self.parts)
        missing = set(self.run.missing("first", every, self.rows))
        at, ready, count = 0, self._unpacked(), dict.fromkeys(("measured", "failed", "skipped"), 0)
        last = self.parts[-1].name
        early = {part.name for part in self.parts if part.name not in ready} - {last}
        self._compile(sorted(early), self.began + COMPILING * self.seconds)
        until = COMPILING
        for part in self.parts:
            until += part.share
            end = min(self.end, self.began + until * self.seconds)
            if part.name == last and last not in ready:
                self._compile([last], time.monotonic() + max(0.0, self.end - time.monotonic()) / 2)
            for number in range(at, at := at + len(part.tasks())):
                if number not in missing:
                    continue
                task = every[number]
                if time.monotonic() >= end:
                    self._add(task.failed(SKIPPED))
                    count["skipped"] += 1
                    continue
                good = True
                for row in self.worker.run(number, task, min(self.end, end + self.grace)):
                    self._add(row)
                    good &= not row.get("error")
                count["measured" if good else "failed"] += 1
        self.worker.close()
        took = time.monotonic() - self.began
        return ", ".join(f"{n} {name}" for name, n in count.items()) + f", in {took:.0f} s"

    def _add(self, row: Row) -> None:
        """A row, at once in its file."""
        self.rows.append(row | self.run.about)
        write(self.run.path("first"), self.rows)
        print(f"  {said(row)}", flush=True)

    def _unpacked(self) -> list[str]:
        """Parts whose kernels are there already, as far as a pack says so."""
        if DEVICE != "cuda":
            return [part.name for part in self.parts]
        told, line = ahead.unpack(blocks.architecture())
        print(line, flush=True)
        fresh = told.get("sources") == ahead.sources()
        if fresh and not self.run.about["git"]:  # a tree that has travelled has no history: the pack names it
            self.run.about["git"] = told["git"]
        return told["parts"].split() if fresh else []

    def _compile(self, names: Sequence[str], end: float) -> None:
        """Compile what parts launch, as far as it is not there, on all processors but one."""
        if names:
            workers = max(1, (os.cpu_count() or 2) - 1)
            row = ahead.compile_all(blocks.architecture(), names, workers, end - time.monotonic())
            self._add({"part": "compile", "kind": " ".join(names)} | row)
