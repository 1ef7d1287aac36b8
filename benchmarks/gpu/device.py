"""The card: what stands beside every figure, how time is taken, and what is measured on."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from sparseflash.bench.machine import describe
from sparseflash.bench.results import Row

DRY = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is a walk through the stages at tiny shapes, in the interpreter on the CPU."""

AHEAD = os.environ.get("SPARSEFLASH_AHEAD", "")
"""The card that kernels are compiled for (`ahead.py`): tensors have no values then, nothing is launched."""

DEVICE = "cpu" if DRY else "meta" if AHEAD else "cuda"
DTYPE = torch.float16 if DRY else torch.bfloat16  # the interpreter gets bf16 wrong
LAST_LEVEL = 256 << 20
"""Bytes that push everything else out of a card's last cache."""

if DRY:  # tiny tensors: waking a second thread costs more than it brings
    torch.set_num_threads(1)


def machine() -> Row:
    """What stands beside every figure."""
    about = describe() | {"triton": triton.__version__}
    if DRY:
        return about | {"gpu": "interpreter", "clocks": ""}
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry-run walks through the stages without one")
    return about | {"gpu": torch.cuda.get_device_name(), "clocks": _clocks()}


def _clocks() -> str:
    """Clocks and power limit, as the driver tells them; nothing where its program is not installed."""
    ask = "clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={ask}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def wait() -> None:
    """Wait for the card."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _spacer() -> Tensor:
    return torch.empty(LAST_LEVEL, dtype=torch.int8, device=DEVICE)


def once(run: Callable[[], Any]) -> float:
    """Milliseconds of one call by the card's own clock, its caches cold."""
    if DRY:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _spacer().zero_()
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


class Times(list[float]):
    """Milliseconds of the calls of one case; empty where it does not run."""

    error = ""

    @property
    def ms(self) -> float | None:
        """Their median."""
        return statistics.median(self) if self else None

    def row(self, name: str = "ms") -> Row:
        """Median, and the second and eighth tenth where there are enough."""
        found: Row = {name: self.ms}
        if len(self) >= 5:
            tenths = statistics.quantiles(self, n=10)
            found |= {f"{name}_20": tenths[1], f"{name}_80": tenths[7]}
        return found | ({"error": self.error} if self.error else {})


def times(runs: dict[str, Callable[[], Any]], *, rounds: int = 20, seconds: float = 12.0) -> dict[str, Times]:
    """Time every case in turn, round by round; cases that fail say why and are left out."""
    found = {name: Times() for name in runs}
    if AHEAD:
        for run in runs.values():
            run()
        return found
    for name, run in runs.items():
        try:
            for _ in range(0 if DRY else 3):
                run()
            wait()
        except Exception as error:
            found[name].error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    able = {name: run for name, run in runs.items() if not found[name].error}
    began = time.monotonic()
    for _ in range(1 if DRY else rounds):
        for name, run in able.items():
            found[name].append(once(run))
        if time.monotonic() - began > seconds:
            break
    return found


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device; what has no values takes any."""
    return torch.Generator("cpu" if AHEAD else DEVICE).manual_seed(seed)


def tensors(
    B: int,
    H: int,
    T: int,
    D: int,
    *,
    dtype: torch.dtype = DTYPE,
    Hkv: int | None = None,
    Tq: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout; the first three want gradients."""
    chance = generator(0)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(B, heads, length, D, generator=chance, device=DEVICE, dtype=dtype)

    q, k, v, dout = normal(H, Tq or T), normal(Hkv or H, T), normal(Hkv or H, T), normal(H, Tq or T)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout
