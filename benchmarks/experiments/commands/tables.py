"""The tables of README and docs that take minutes, one after the other."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Annotated

import typer

from sparseflash.bench.commands.app import known, words
from sparseflash.bench.commands.curves import bench_curves

from .app import RESULTS, experiments
from .kernels import bench_attention_table, bench_kernel_table, bench_ops
from .training import bench_step


@experiments.command("tables")
def bench_tables() -> None:
    """Run curves, attention-table, kernel-table, ops and step, into **benchmarks/results**. Half an hour."""
    bench_curves(RESULTS / "curves.csv")
    bench_attention_table()
    bench_kernel_table()
    bench_ops()
    bench_step()


AGAIN = {
    "coverage": ["--capture", "benchmarks/captures/books.safetensors"],
    "selection": ["--rounds", "7"],
    "caches": [],
    "vision": ["--parts", "orion", "--steps", "300"],
    "documents": ["--minutes", "7", "--rounds", "3"],
    "kernel-table": ["--minutes", "3"],
    "curves": ["--minutes", "3"],
}
"""Result files that three minutes measure anew, on two idle cores, and how."""


@experiments.command("again")
def bench_again(
    names: Annotated[str, typer.Argument(help="Which, separated by commas; by default all.")] = "",
) -> None:
    """Measure anew, one after the other, what takes a few minutes a file: wants an idle machine."""
    for name in known("names", AGAIN, words(names)):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "benchmarks.experiments", name, *AGAIN[name]])
        said = "" if done.returncode == 0 else f", and ended with {done.returncode}"
        print(f"{name}: {time.monotonic() - began:.0f} s{said}", flush=True)
