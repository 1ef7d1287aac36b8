"""Peak extra memory of one call; on a CPU measured in a fresh process, where no freed memory hides it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak(call: Callable[[], Any]) -> int:
    """Peak bytes of `call` beyond what the process holds before.

    Raises
    ------
    OSError
        If the system does not report it.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(AttributeError, OSError):  # not in every C library
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def of_subject(**what: Any) -> tuple[int | None, str]:
    """Peak of a subject in a fresh process, or why it is unknown. `what`: the arguments of `_measure`."""
    run = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(what)], capture_output=True, text=True, timeout=600
    )
    if run.returncode:
        return None, "peak memory: " + (run.stderr.strip().splitlines() or ["the process failed"])[-1]
    return int(run.stdout.split()[-1]), ""


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _measure(
    name: str,
    methods: list[str],
    baselines: list[str],
    *,
    direction: str,
    length: int,
    density: float | None,
    options: dict[str, Any],
    **shape: Any,
) -> int:
    from sparseflash.bench.cases import DIRECTIONS, inputs
    from sparseflash.bench.subjects import subjects

    made = {"density": density, "options": options, "device": shape["device"]}
    for size in (64, length):  # the first size loads and compiles
        subject = next(x for x in subjects(methods, baselines, length=length, **made) if x.name == name)
        call = DIRECTIONS[direction](subject, *inputs(size, **shape))
        found = peak(call)
    return found


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
