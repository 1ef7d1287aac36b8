"""The tables of README and docs that take minutes, one after the other."""

from __future__ import annotations

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
