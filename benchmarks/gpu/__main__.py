"""Runs the stages: `ABOUT` and `stages.py` say what they are."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import ROOT

if "--dry-run" in sys.argv:  # decided before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["SPARSEFLASH_BACKEND"] = "triton"
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))

ABOUT = """Check, tune and measure the Triton kernels on this machine's GPU.

Needs the repository, PyTorch and Triton; no network, no installation. A stage is a list of tasks, and what a
task measured is in benchmarks/results/gpu-STAGE.csv as soon as it is finished: the same command continues a
run that was cut off at the first task that is missing there (on the same card, versions and commit; otherwise
it begins anew). Without names, all stages run in the order below; the minutes are what an H200 is expected to
take, compiling included:

{stages}
Where a call may take no more than ten minutes: --minutes 8, until it says that all is done.
The first time on a card: `first`, one call of at most nine minutes (--minutes), the tasks of all stages that
tell most, each part with its share of the time; its rows are in gpu-first.csv, and what had no time is a row.
Before that, without a card: `prepare` (make gpu-prepare) compiles what `first` launches on a --target, by the
Triton and Python that run it, which have to be those of the machine with the card (GPU_PYTHON=...), into
build/kernels-*.tar.xz, which is to travel with the tree.
After `tune`: --write-table makes the table that the launcher reads of what was measured.
"""


def main() -> None:
    """Run the stages that are asked for."""
    from .runner import Run
    from .stages import STAGES
    from .tuning import write_table

    lines = "".join(f"  {name:10}{stage.minutes:3} min  {stage.about}\n" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=ABOUT.format(stages=lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*STAGES, "first", "prepare"]
    parser.add_argument("stages", nargs="*", choices=[[], *names], metavar="STAGE", help="all by default")
    parser.add_argument("--target", default="sm_90", help="for `prepare`: the kind of card; sm_90 by default")
    parser.add_argument("--parts", nargs="+", default=[], help="for `prepare`: of `first`; all by default")
    parser.add_argument("--minutes", type=float, help="begin no task later than this; none by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--text", type=Path, help="a file or folder that models are trained on")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and stop")
    parser.add_argument("--write-table", action="store_true", help="from gpu-tune.csv; runs nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    options = parser.parse_args()
    if options.text:
        os.environ["SPARSEFLASH_TEXT"] = str(options.text.resolve())
    if options.write_table:
        return print(write_table(options.out / "gpu-tune.csv"))
    if options.dry_run and options.out == parser.get_default("out"):
        raise SystemExit("--dry-run measures nothing: give it an --out of its own, such as --out /tmp/dry")
    if options.stages == ["prepare"]:
        return print(prepare(options.target, options.parts))
    run = Run(options.out, minutes=options.minutes, again=options.again, retry=options.retry)
    if options.stages == ["first"]:
        from .first import Race

        return print(Race(run, options.minutes or 9.0).go())
    if options.list:
        return print("\n".join(run.state(name, STAGES[name]) for name in options.stages or STAGES))
    for name in options.stages or STAGES:
        if not run.stage(name, STAGES[name]):
            return print(f"stopped after {options.minutes:g} minutes: the same command continues")
    print("all is done")


def prepare(target: str, parts: list[str]) -> str:
    """Compile what `first` launches and pack it; a line about it."""
    from sparseflash.bench.machine import git_hash

    from . import ahead, first

    names = parts or [part.name for part in first.PARTS]
    row = ahead.compile_all(target, names, max(1, (os.cpu_count() or 2) - 1), 24 * 3600.0)
    if row.get("error"):
        raise SystemExit(f"error: not everything compiles: {row['error']}")
    path = ahead.pack(target, names, git_hash())
    size = path.stat().st_size / 2**20
    told = "Triton {triton}, Python {python}, {target}".format(**ahead.about(target))
    return f"{path.relative_to(ROOT)}: {row['kernels']} kernels, {size:.1f} MiB, for {told} alone"


if __name__ == "__main__":
    main()
