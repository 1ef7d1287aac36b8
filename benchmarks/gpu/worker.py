"""A process that runs tasks, and is ended where one takes too long or has broken the card's context.

After a kernel has read where it must not, every later call of that process fails: the next task gets another.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from sparseflash.bench.results import Row

from .task import Task

DONE, BROKEN = "done", "broken"


def tasks_of(source: str) -> list[Task]:
    """The tasks of a function, named as "module:function"."""
    module, _, function = source.partition(":")
    found: list[Task] = getattr(importlib.import_module(module), function)()
    return found


class Worker:
    """Runs tasks of a source by their numbers, in a process that is begun when the first one is asked for."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._process: Any = None
        self._pipe: Any = None

    def run(self, number: int, task: Task, end: float) -> Iterator[Row]:
        """The rows of a task as they are measured; a last one says so if it is ended, or ends its process."""
        if self._process is None:
            self._begin()
        self._pipe.send(number)
        while True:
            left = end - time.monotonic()
            try:
                if left <= 0 or not self._pipe.poll(left):
                    self.close()
                    yield task.failed("stopped: it took longer than was left")
                    return
                got = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join(5)
                code = self._process.exitcode
                self.close()
                yield task.failed(f"its process ended with {code}")
                return
            if got == BROKEN:
                self.close()
            if got in (DONE, BROKEN):
                return
            yield got

    def _begin(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a process that uses a GPU must not be forked
        self._pipe, there = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(there, self.source), daemon=True)
        self._process.start()
        there.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, source: str) -> None:
    tasks, compiled = tasks_of(source), _compiled()
    while True:
        before = len(compiled)
        for row in tasks[pipe.recv()].each():
            pipe.send(row | {"compiled": len(compiled) - before})
        pipe.send(DONE if _sound() else BROKEN)


def _compiled() -> list[str]:
    """Grows with every kernel that Triton compiles in this process, and does not find in its cache."""
    import triton

    found: list[str] = []

    def note(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            found.append(src.name)

    if hasattr(triton, "knobs"):
        triton.knobs.compilation.listener = note
    return found


def _sound() -> bool:
    """Whether the card answers this process; after an illegal access it does not."""
    from .device import wait

    try:
        wait()
    except Exception:
        return False
    return True
