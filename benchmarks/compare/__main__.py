"""Measures, and says what became slower: `ABOUT` says how."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparseflash.bench.machine import cpu_name
from sparseflash.common.errors import SparseFlashError

from .pairs import SIDES, Case, compare
from .trees import commit_of, older, this
from .worker import CASES

ABOUT = """Compare this working tree with an older commit on this machine: what became slower?

The older tree comes out of git into a temporary folder, this one is copied beside it, changes included; each
compiles its own native library (kept in the usual cache). Three processes then take turns, one round of some
calls at a time, of which the fastest counts: the old tree, the new one, and the new one again. So a line has
the ratio new / old (the median of all rounds; above 1: slower), and beside it the A/A spread, the factor by
which the new tree differs from itself in the same rounds. A ratio within the spread says nothing: let it run
longer (--sets 10 --minutes 9), alone on the machine, or with --threads 1 where others work on it.
"""
EXAMPLES = """examples:
  make compare OLD=HEAD                                  what is changed, but not committed
  make compare OLD=v0.1.0 COMPARE_ARGS="--limit 1.03"    exit status 1 if anything takes 3 % longer
  make compare OLD=HEAD~5 COMPARE_ARGS="--only decode --only overhead --sets 10"
"""


def positive(kind: Any) -> Any:
    """Read a number above 0."""

    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    read.__name__ = f"number above 0 ({kind.__name__})"
    return read


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", nargs="?", metavar="OLD", help="the older tree: a commit, branch or tag")
    parser.add_argument(
        "--limit",
        type=positive(float),
        metavar="RATIO",
        help="1.03: exit status 1 if a ratio is above it, and above its A/A spread; by default none is",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORDS",
        help="cases with these words in their name; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="name the cases, and stop")
    parser.add_argument(
        "--sets", type=positive(int), default=4, metavar="N", help="sets of fresh processes; 4 by default"
    )
    parser.add_argument(
        "--minutes",
        type=positive(float),
        default=3.5,
        metavar="M",
        help="begin no set that would end later, after the first; 3.5 by default",
    )
    parser.add_argument(
        "--rounds",
        type=positive(int),
        default=6,
        metavar="N",
        help="turns of each process in a set; 6 by default",
    )
    parser.add_argument(
        "--seconds", type=positive(float), default=0.02, metavar="S", help="length of a turn; 0.02 by default"
    )
    parser.add_argument(
        "--threads",
        type=positive(int),
        default=None,
        metavar="N",
        help="threads of each process; torch's own number by default",
    )
    parser.add_argument(
        "--small", type=positive(int), default=1, metavar="N", help="lengths divided by N, to try it out"
    )
    given = parser.parse_args(arguments)
    if given.old is None and not given.list:
        parser.error("there is no OLD: name the commit to compare with, such as HEAD or HEAD~5")
    given.names = [name for name in CASES if not given.only or any(word in name for word in given.only)]
    if not given.names:
        parser.error(
            f"--only {' --only '.join(given.only)}: no case has that in its name; --list names them all"
        )
    return given


def lines(cases: list[Case], limit: float | None) -> list[str]:
    """Return the table."""
    wide = max(len(x.name) for x in cases)
    made = [f"{'':{wide}} {'old ms':>10} {'new ms':>10} {'ratio':>7} {'A/A':>7}"]
    for x in cases:
        if x.missing:
            made.append(f"{x.name:{wide}} skipped: {x.missing}")
            continue
        said = ""
        if x.slower(limit or 1.0):
            said = "  SLOWER" if limit else "  slower than the spread"
        elif x.ratio < 1 / x.spread:
            said = "  faster"
        made.append(
            f"{x.name:{wide}} {x.ms('old'):10.4f} {x.ms('new'):10.4f} {x.ratio:7.3f} {x.spread:7.3f}{said}"
        )
    return made


class Progress:
    """One line that is written over in a terminal; elsewhere a line for each set of processes."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.live = sys.stderr.isatty()

    def run(self, name: str, number: int) -> None:
        """Say that a case begins."""
        if self.live:
            share = self.done / self.total
            bar = "#" * round(30 * share) + "." * (30 - round(30 * share))
            text = f"[{bar}] {share:4.0%}, {time.monotonic() - self.start:3.0f} s, set {number + 1}: {name}"
            print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
        self.done += 1

    def say(self, text: str) -> None:
        """Say something that stays."""
        print(("\r\033[K" if self.live else "") + text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(given: argparse.Namespace) -> list[Case]:
    """Measure what the options ask for."""
    commit = commit_of(given.old)
    bar = Progress(given.sets * len(given.names))
    with tempfile.TemporaryDirectory(prefix="sparseflash-compare-") as made:
        folder = Path(made)
        old, new = older(commit, folder / "old"), this(folder / "new")
        bar.say(f"old: {commit[:12]}, new: this tree; a native library that is not there yet is compiled now")

        def on_set(n: int, about: dict[str, dict[str, Any]]) -> None:
            one = about["new"]
            bar.say(f"set {n + 1} of {given.sets}: {one['threads']} threads, backend {one['backend']}")
            if one["backend"] != about["old"]["backend"]:
                bar.say(
                    f"warning: the old tree runs on {about['old']['backend']}: the ratios compare backends"
                )

        try:
            return compare(
                dict(zip(SIDES, (old, new, new), strict=True)),
                given.names,
                sets=given.sets,
                rounds=given.rounds,
                seconds=given.seconds,
                minutes=given.minutes,
                small=given.small,
                threads=given.threads or 0,
                on_set=on_set,
                on_run=bar.run,
            )
        finally:
            bar.end()


def main(arguments: list[str] | None = None) -> int:
    """Compare, and return the exit status."""
    given = options(arguments)
    if given.list:
        print("\n".join(given.names))
        return 0
    start = time.monotonic()
    try:
        cases = run(given)
    except SparseFlashError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join(lines(cases, given.limit)))
    slower = [x for x in cases if given.limit and x.slower(given.limit)]
    sets = max(len(x.times["new"]) for x in cases)
    kept = f"{len(cases)} cases, {sets} sets, {time.monotonic() - start:.0f} s, on {cpu_name()}"
    if given.limit:
        kept += f"; {len(slower)} slower than {given.limit:g} and than the A/A spread"
    print(kept)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
