"""Pictures from result files alone: the column `bench` selects the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparseflash.bench import chart, results
from sparseflash.common.errors import SparseFlashError
from sparseflash.common.files import write

Cells = Mapping[str, str]
STYLES = ("dense", "hash-2", "qk-2", "reformer", "hash-3", "qk-3", "naive", "hash-1", "qk-1")


@dataclass(frozen=True)
class Lines:
    """One line of `y` over `x` for every value of `label`; one picture for every value of `split`.

    There is also one picture for every value of `apart`, columns that enter the file name only if they vary.
    `keep` filters rows, `name` is a suffix of the file name.
    """

    x: str
    y: str
    x_label: str
    y_label: str
    label: str = "case"
    split: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    log: bool = True
    keep: Callable[[Cells], bool] = lambda row: True
    name: str = ""

    def draw(self, rows: list[Cells]) -> str:
        """Draw the rows that have both columns."""
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.get(self.x) and row.get(self.y) and self.keep(row):
                series.setdefault(row[self.label], []).append((float(row[self.x]), float(row[self.y])))
        lines = [
            chart.Line(name, sorted(points), STYLES[n % len(STYLES)], dashed=n >= len(STYLES))
            for n, (name, points) in enumerate(series.items())
        ]
        return chart.lines(lines, x_label=self.x_label, y_label=self.y_label, log=self.log)


@dataclass(frozen=True)
class Bars:
    """One bar of `value` per row, labelled by the cells of `labels`."""

    value: str
    x_label: str
    labels: tuple[str, ...] = ("case", "dtype")
    split: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    mark: float | None = 1.0
    name: str = ""

    def draw(self, rows: list[Cells]) -> str:
        """Draw the rows that have the column."""
        values = [
            (", ".join(row[x] for x in self.labels if row.get(x)), float(row[self.value]))
            for row in rows
            if row.get(self.value)
        ]
        return chart.bars(values, x_label=self.x_label, mark=self.mark)


def _late(row: Cells) -> bool:
    """Whether a row is of the first seed, after the steepest part of the curve."""
    return row["seed"] == "0" and 5 * int(row["step"]) >= int(row["steps"])


BITS = "held-out bits per byte"
TIMES = "milliseconds"
OVER_SDPA = "times faster than torch SDPA"
RECIPES: dict[str, Lines | Bars | tuple[Lines | Bars, ...]] = {
    "long-run": (
        Lines("step", "bpb", "step", BITS, log=False, keep=_late),
        Lines("minutes", "bpb", "minutes of training", BITS, log=False, keep=_late, name="time"),
    ),
    "recommend": Lines(
        "attention_gain",
        "kl",
        "times faster than dense attention",
        "KL of the next tokens from dense",
        label="slug",
        split=("tokens",),
        apart=("model", "text"),
        keep=lambda row: float(row["kl"]) > 0,
        name="frontier",
    ),
    "attention": Lines(
        "T",
        "ms",
        "tokens",
        TIMES,
        split=("direction", "dtype"),
        apart=("batch", "heads", "dim", "device", "seed", "inputs", "target"),
    ),
    "curves": Lines("T", "ms", "tokens", f"{TIMES}, forward + backward", split=("dtype",)),
    "attention-table": Bars("ratio", OVER_SDPA),
    "kernel-table": Bars("ratio", OVER_SDPA, labels=("case", "T", "dim"), split=("dtype",)),
    "ops": Bars("ratio", OVER_SDPA),
    "levels": Bars("ratio", OVER_SDPA, labels=("level", "case", "T", "dim")),
    "step": Bars("speedup", "times faster than dense, a training step", labels=("case", "T", "dtype")),
    "documents": Bars(
        "over_sdpa", "token rate over padded SDPA", labels=("mix", "case"), split=("what", "dtype")
    ),
    "masks": Bars("ratio", "times faster than torch SDPA with the mask", labels=("case",), split=("T",)),
    "coverage": Lines(
        "T", "coverage", "tokens", "equal-bucket pairs attended", split=("inputs", "nb"), log=False
    ),
    "mqar": Bars("accuracy", "questions answered right, unseen rows", labels=("case", "lr"), mark=0.99),
    "breakeven": Lines(
        "density",
        "gain",
        "visible share",
        "times faster than torch SDPA",
        split=("direction", "dtype", "dim", "T"),
    ),
    "pixels": Bars("perplexity", "perplexity of a held-out pixel", labels=("case",), mark=None),
    "plan-costs": Bars("share", "making the plan, as a share of using it", labels=("case",), mark=None),
}
"""Recipes of the pictures, by a row's column `bench`."""


def draw(rows: Iterable[Cells], stem: str) -> dict[str, str]:
    """Draw rows as pictures, file name to SVG."""
    rows, groups = list(rows), dict[str, tuple[Lines | Bars, list[Cells]]]()
    for row in rows:
        recipes = RECIPES.get(row.get("bench", ""), ())
        for recipe in recipes if isinstance(recipes, tuple) else (recipes,):
            parts = [row.get(x) for x in recipe.split]
            parts += [
                f"{x} {row[x]}" for x in recipe.apart if row.get(x) and len({one.get(x) for one in rows}) > 1
            ]
            name = "-".join(filter(None, [stem, *parts, recipe.name])).replace(" ", "-") + ".svg"
            groups.setdefault(name, (recipe, []))[1].append(row)
    found = {name: recipe.draw(rows) for name, (recipe, rows) in groups.items()}
    return {name: chart.alone(svg) + "\n" for name, svg in found.items() if svg.startswith("<svg")}


def redraw(
    directory: Path, out: Path | None = None, on_file: Callable[[Path], None] = lambda path: None
) -> list[Path]:
    """Draw a result file, or all of a directory, next to the file or into `out`.

    Raises
    ------
    SparseFlashError
        If there is no result file.
    """
    files = sorted(directory.glob("*.csv")) if directory.is_dir() else [directory]
    if not files or not files[0].is_file():
        raise SparseFlashError(
            f"{directory}: no result file (*.csv) there; write some with: "
            f"sparseflash bench --methods window --baselines sdpa --out {directory}"
        )
    written = []
    for file in files:
        try:
            drawn = draw(results.read(file), file.stem)
        except (KeyError, ValueError) as error:
            if isinstance(error, SparseFlashError):
                raise
            raise SparseFlashError(f"{file}: a row has no number to draw: {error}") from None
        for name, svg in drawn.items():
            path = (out or file.parent) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, svg)
            written.append(path)
            on_file(path)
    return written
