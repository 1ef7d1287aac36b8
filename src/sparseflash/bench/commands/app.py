"""Shared parts of all commands: the application, common options, and parsers of lists."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from sparseflash.common.errors import SparseFlashError

N = TypeVar("N", int, float)

EXPERIMENTS = (
    "again",
    "arguments",
    "attention-table",
    "budgets",
    "caches",
    "claim",
    "coverage",
    "decode",
    "diffusion",
    "documents",
    "fusion",
    "gates",
    "generation",
    "indexer",
    "kernel-table",
    "layers",
    "levels",
    "long-positions",
    "long-run",
    "masks",
    "modalities",
    "mqar",
    "offload",
    "ops",
    "pixels",
    "plan-costs",
    "prefill",
    "prompt-losses",
    "ranks",
    "records",
    "samples",
    "seer-tuning",
    "selection",
    "short",
    "step",
    "transformers",
    "video",
    "vision",
    "vllm",
)
"""Commands of `benchmarks/experiments`, which are not part of an install."""


class Bench(typer.core.TyperGroup):
    """Command group that points to the checkout for experiments."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command; raise a hint if it is an experiment."""
        if cmd_name in EXPERIMENTS:
            raise SparseFlashError(
                f"{cmd_name} is an experiment, which only a checkout has; run there: "
                f"python -m benchmarks.experiments {cmd_name}"
            )
        return super().get_command(ctx, cmd_name)


bench = typer.Typer(
    cls=Bench,
    invoke_without_command=True,
    no_args_is_help=True,
    help="Measure on this machine.\n\n"
    "**--methods hash-sparse,window --baselines sdpa,flex --lengths 1024,8192 --out DIR** compares "
    "any methods with any baselines; a command runs one table. Results go into **bench** of the current "
    "directory.\n\n"
    "All cases of a table run in turn, the figure is the median; machine and versions stand in every row. "
    "The experiments behind the pages of the docs are in a checkout: **python -m benchmarks.experiments**.",
)
RESULTS = Path("bench")
Out = Annotated[Path, typer.Option(help="CSV file of the rows; an existing one is replaced.")]
Data = Annotated[str, typer.Option(help="Text, a file or a directory; by default Python's own library.")]
Minutes = Annotated[float, typer.Option(min=0, help="Time box; what does not fit is left out, and said.")]
Lengths = Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")]
Heads = Annotated[int, typer.Option(min=1, help="Attention heads.")]
Dim = Annotated[int, typer.Option(min=1, help="Dimension of a head.")]
Dtype = Annotated[str, typer.Option(help="fp32 or bf16.")]
Dtypes = Annotated[str, typer.Option(help="fp32, bf16 or both, separated by commas.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measured rounds, after one that warms up.")]


def call(app: typer.Typer) -> None:
    """Run an application; library errors print one line and exit with status 1."""
    try:
        app()
    except SparseFlashError as error:
        said = str(error)
    except (RuntimeError, MemoryError) as error:  # torch: out of main memory
        asked = re.search(r"tried to allocate (\d+) bytes", str(error))
        if not (isinstance(error, MemoryError) or asked or "out of memory" in str(error).lower()):
            raise
        much = f": {int(asked[1]) / 2**30:,.0f} GiB at once" if asked else ""
        said = f"this needs more memory than there is{much}; ask for less: a smaller --length or --batch"
    except OSError as error:  # full disk, unwritable path
        if error.errno is None or isinstance(error, BrokenPipeError):
            raise
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    else:
        return
    typer.secho(f"error: {said}", fg="red", err=True)
    sys.exit(1)


def words(text: str, separator: str = ",") -> list[str]:
    """Split a list of names; use a semicolon as separator for names with commas."""
    return [word.strip() for word in text.split(separator) if word.strip()]


def integers(text: str, example: str = "1024,2048,4096", least: int = 0) -> list[int]:
    """Parse a list of integers >= `least`."""
    return _numbers(text, int, example, least)


def floats(text: str) -> list[float]:
    """Parse a list of numbers >= 0."""
    return _numbers(text, float, "4e-3,8e-3", 0)


def lengths_of(text: str) -> list[int]:
    """Parse ``--lengths``: at least one, all positive; returned in ascending order."""
    found = integers(text, least=1)
    if not found:
        raise SparseFlashError("--lengths names none; write them as 1024,2048,4096")
    return sorted(found)


def dtypes_of(text: str) -> list[str]:
    """Parse ``--dtypes``."""
    from sparseflash.bench.cases import DTYPES

    return known("dtypes", DTYPES, words(text))


def known(option: str, names: Iterable[str], given: list[str]) -> list[str]:
    """Check that all of `given` are among `names`; return them, or all names if none are given."""
    names = list(names)
    for name in given:
        if name not in names:
            raise SparseFlashError(f"--{option} has {name!r}; choose from: {'; '.join(names)}")
    return given or names


def _numbers(text: str, kind: Callable[[str], N], example: str, least: int) -> list[N]:
    try:
        found = [kind(word) for word in words(text)]
    except ValueError:
        raise SparseFlashError(f"{text!r} is no list of numbers; write them as {example}") from None
    for x in found:
        if not x >= least:  # NaN too
            raise SparseFlashError(f"{text!r} has {x}; expected numbers >= {least} such as {example}")
    return found
