"""``log.csv``, one row per step, and loss curves drawn from it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparseflash.common.files import replacing
from sparseflash.train.errors import TrainError

FILE = "log.csv"
COLUMNS = ("step", "loss", "val_bpb", "ms_per_step", "tokens_per_s", "kept", "work")
SOMETIMES = ("val_bpb", "kept", "work")
"""Columns that only rows with a validation have; files of 0.1.0 lack the last two."""


@dataclass
class Row:
    """One optimiser step.

    Attributes
    ----------
    step : int
        Finished optimiser steps.
    loss : float
        Training loss before the step, nats per byte.
    val_bpb : float or None
        Validation bits per byte after the step, where measured.
    ms_per_step, tokens_per_s : float
        Wall time of the step without validation and saving.
    kept, work : float or None
        `Plan.kept` and `Plan.work` in the validation, mean over the layers; None where a layer has no plan.
    """

    step: int
    loss: float
    val_bpb: float | None
    ms_per_step: float
    tokens_per_s: float
    kept: float | None = None
    work: float | None = None

    def cells(self) -> list[str]:
        """Format the columns of the CSV."""
        # repr keeps every bit: a resumed run must write the same digits.
        bpb, kept, work = ("" if x is None else repr(x) for x in (self.val_bpb, self.kept, self.work))
        times = [f"{self.ms_per_step:.3f}", f"{self.tokens_per_s:.1f}"]
        return [str(self.step), repr(self.loss), bpb, *times, kept, work]


class Log:
    """Appends rows to ``directory/log.csv``, after removing rows of steps beyond `keep` (lost by a crash)."""

    def __init__(self, directory: Path, keep: int = 0) -> None:
        self.path = directory / FILE
        self.rows = [row for row in read(directory) if row.step <= keep] if keep else []
        try:
            with replacing(self.path) as temporary, open(temporary, "w", newline="") as stream:
                csv.writer(stream).writerows([COLUMNS, *(row.cells() for row in self.rows)])
        except OSError as error:
            raise TrainError(
                f"cannot write {self.path}: {error.strerror}; make room or use another --out"
            ) from None

    def append(self, row: Row) -> None:
        """Append one row and flush it to the file."""
        self.rows.append(row)
        try:
            with open(self.path, "a", newline="") as stream:
                csv.writer(stream).writerow(row.cells())
        except OSError as error:
            raise TrainError(
                f"cannot write {self.path}: {error.strerror}; make room, then continue with: "
                f"sparseflash train --resume --out {self.path.parent}"
            ) from None


def read(directory: Path) -> list[Row]:
    """Read ``directory/log.csv``; an incomplete last line (after a crash) is ignored."""
    path = Path(directory) / FILE
    if not path.is_file():
        return []
    rows: list[Row] = []
    try:
        with open(path, newline="") as stream:
            lines = stream.read().split("\n")[:-1]
        for r in csv.DictReader(lines):
            numbers = (
                None if name in SOMETIMES and not r.get(name) else float(r[name]) for name in COLUMNS[1:]
            )
            rows.append(Row(int(r["step"]), *numbers))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise TrainError(
            f"{path}: row {len(rows) + 1} is none of a log ({error!r}); expected {','.join(COLUMNS)}: remove "
            "the file, and resume to begin a new one at the checkpoint"
        ) from None
    return rows


def plot(rows: Iterable[Row], path: Path, title: str = "") -> None:
    """Plot training loss and validation bits per byte over steps, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise TrainError(
            "loss curves need matplotlib; install it with: pip install 'sparseflash[train]'"
        ) from None
    rows = list(rows)
    measured = [row for row in rows if row.val_bpb is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    nats = 0.6931471805599453
    axes.plot([r.step for r in rows], [r.loss / nats for r in rows], lw=1, alpha=0.6, label="training")
    axes.plot([r.step for r in measured], [r.val_bpb for r in measured], "o-", ms=3, label="validation")
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
