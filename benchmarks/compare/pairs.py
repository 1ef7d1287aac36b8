"""Processes that take turns, and what their times say: a ratio, beside how far a tree is from itself."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseflash.bench.timing import Box, Timing
from sparseflash.common.errors import SparseFlashError

SIDES = ("old", "new", "new again")


@dataclass
class Case:
    """What the sets of processes measured of one case: `times[side]` has one `Timing` a set, in ms."""

    name: str
    times: dict[str, list[Timing]] = field(default_factory=lambda: {side: [] for side in SIDES})
    missing: str = ""
    """Why there are no figures."""

    @property
    def ratio(self) -> float:
        """How many times as long the new tree takes: the median over sets of both its processes' ratios."""
        both = zip(*(self.times[side] for side in SIDES), strict=True)
        return statistics.median((new.over(old) * again.over(old)) ** 0.5 for old, new, again in both)

    @property
    def spread(self) -> float:
        """The factor, >= 1, by which the new tree differed from itself in the worst of the sets."""
        own = [again.over(new) for new, again in zip(self.times["new"], self.times["new again"], strict=True)]
        return max(max(x, 1 / x) for x in own)

    def ms(self, side: str) -> float:
        """Median of a side, ms."""
        return statistics.median(x.median for x in self.times[side])

    def slower(self, limit: float) -> bool:
        """Whether the ratio is beyond the limit and beyond what the tree differs from itself."""
        return not self.missing and self.ratio > max(limit, self.spread)


class Worker:
    """A process that measures one tree when it is asked to."""

    def __init__(self, source: Path, *, small: int, threads: int) -> None:
        env = {**os.environ, "PYTHONPATH": str(source)}
        self.said = tempfile.TemporaryFile()
        file = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(file), str(small), str(threads)],
            cwd=source.parent,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        self.source = source

    def ready(self) -> dict[str, Any]:
        """Wait until it has imported and compiled; then what it runs on."""
        hello = self._answer()
        if not Path(hello["path"]).is_relative_to(self.source):
            raise SparseFlashError(f"the process of {self.source} imported {hello['path']} in its place")
        return hello

    def measure(self, name: str, seconds: float) -> dict[str, Any]:
        """One round."""
        assert self.process.stdin is not None
        try:
            print(json.dumps([name, seconds]), file=self.process.stdin, flush=True)
        except OSError:  # it has ended: the answer that is not there says why
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.said.seek(0)
            last = (self.said.read().decode(errors="replace").strip().splitlines() or ["without a word"])[-1]
            raise SparseFlashError(f"the process of {self.source} ended: {last}")
        return json.loads(line)

    def end(self) -> None:
        """End it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.kill()
        self.process.wait()
        self.said.close()


def turns(rounds: int) -> Iterator[Sequence[str]]:
    """Give the order of the sides in each round: all six in turn, so that no place is anyone's."""
    return itertools.islice(itertools.cycle(itertools.permutations(SIDES)), rounds)


def compare(
    sources: Mapping[str, Path],
    names: Sequence[str],
    *,
    sets: int,
    rounds: int,
    seconds: float,
    minutes: float = math.inf,
    small: int = 1,
    threads: int = 0,
    on_set: Callable[[int, dict[str, dict[str, Any]]], None] = lambda n, about: None,
    on_run: Callable[[str, int], None] = lambda name, n: None,
) -> list[Case]:
    """Measure the cases in `sets` of three fresh processes each, of which only one works at any moment.

    Fewer sets where another one would take longer than `minutes` in all; the first is always whole.

    Raises
    ------
    SparseFlashError
        If a process ends, or this tree cannot run a case.
    """
    cases, box, longest = [Case(name) for name in names], Box(minutes * 60), 0.0
    for n in range(sets):
        if box.left < longest:
            break
        start = time.monotonic()
        workers: dict[str, Worker] = {}
        try:
            for side in SIDES:
                workers[side] = Worker(sources[side], small=small, threads=threads)
            on_set(n, {side: worker.ready() for side, worker in workers.items()})
            for case in cases:
                on_run(case.name, n)
                if not case.missing:
                    _measure(case, workers, rounds, seconds)
        finally:
            for worker in workers.values():
                worker.end()
        longest = max(longest, time.monotonic() - start)
    return cases


def _measure(case: Case, workers: Mapping[str, Worker], rounds: int, seconds: float) -> None:
    """One set's rounds of a case; the first only warms up."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for order in turns(1 + rounds):
        for side in order:
            answer = workers[side].measure(case.name, seconds)
            if "ms" in answer:
                found[side].append(answer["ms"])
            elif side != "old":
                raise SparseFlashError(f"{case.name}: this tree cannot run it: {answer['error']}")
            else:  # the other sides are asked all the same: what neither can run is a mistake here
                case.missing = f"the old tree cannot run it ({answer['error']})"
        if case.missing:
            return
    for side, times in found.items():
        case.times[side].append(Timing(times[0], times[1:]))
