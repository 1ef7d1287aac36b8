"""The demo's report: one self-contained HTML file."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template

from sparseflash.bench import chart
from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError
from sparseflash.common.files import replacing
from sparseflash.train import Row as Step

STYLES = {
    "dense (torch SDPA)": "dense",
    "naive masked, 16 buckets": "naive",
    "reformer": "reformer",
    "hash-sparse, 4 buckets": "hash-1",
    "hash-sparse, 16 buckets": "hash-2",
    "hash-sparse, 64 buckets": "hash-3",
    "qk-sparse, 30% dropped": "qk-1",
    "qk-sparse, 50% dropped": "qk-2",
    "qk-sparse, 70% dropped": "qk-3",
}

CURVES_SHARE = 0.25
"""Share of the time box for the curves; the report takes a few seconds, training the rest."""
ENOUGH = 100
"""Steps after which a demo model has learned to use some context."""
LEARNED = 0.9
"""Share of the order-0 bits per byte: a model above it does not use context yet."""


@dataclass
class Run:
    """One model of the demo: its description and log rows."""

    label: str
    what: str
    style: str
    rows: list[Step] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """Median milliseconds per step."""
        times = sorted(row.ms_per_step for row in self.rows)
        return times[len(times) // 2]

    @property
    def bpb(self) -> float:
        """Last measured validation loss, bits per byte."""
        return next(row.val_bpb for row in reversed(self.rows) if row.val_bpb is not None)

    def tokens_per_s(self, length: int) -> float:
        """Tokens per second at the median step."""
        return length / self.ms * 1e3


@dataclass
class Drawing:
    """A plan to show: title, visible pairs, and text form."""

    title: str
    keep: list[list[bool]]
    text: str


@dataclass
class Result:
    """All measurements of the demo, from which the report is rendered. ``runs[0]`` is the dense baseline."""

    machine: Mapping[str, str]
    data: str
    length: int
    dtype: str
    parameters: int
    runs: list[Run]
    curves: list[Row]
    drawings: list[Drawing]
    command: str
    letters: float
    """Bits per byte of an order-0 model (letter frequencies without context)."""
    notes: list[str] = field(default_factory=list)


def comparison(result: Result) -> list[dict[str, object]]:
    """Table rows: time, throughput, speed-up and quality of every run against the first."""
    base = result.runs[0]
    return [
        {
            "label": run.label,
            "what": run.what,
            "ms": run.ms,
            "tokens_per_s": run.tokens_per_s(result.length),
            "speedup": base.ms / run.ms,
            "bpb": run.bpb,
            "worse": run.bpb / base.bpb - 1,
        }
        for run in result.runs
    ]


def verdict(result: Result) -> str:
    """Describe the outcome; if the run was too short to learn, say so first, with a longer command."""
    base, run = comparison(result)[:2]
    pace = f"{run['speedup']:.2f} times as fast as" if run["speedup"] >= 1 else "slower than"
    gap = run["worse"]
    quality = f"{abs(gap):.1%} {'worse' if gap > 0 else 'better'}"
    if abs(gap) < 0.005:
        quality = "the same within half a percent"
    said = (
        f"At T = {result.length:,} a training step with {run['label']} is {pace} one with dense attention, "
        f"and after {len(result.runs[0].rows)} equal steps its validation is {quality}: {run['bpb']:.3f} "
        f"against {base['bpb']:.3f} bits per byte."
    )
    if min(run["bpb"], base["bpb"]) > LEARNED * result.letters:
        said = (
            f"Too short to learn: the frequency of letters alone gives {result.letters:.3f} bits a byte, so "
            f"this says nothing of quality yet; `{longer(result)}` should be long enough. {said}"
        )
    return said


def longer(result: Result) -> str:
    """Command that gives every model `ENOUGH` steps of this length, at the measured pace."""
    seconds = ENOUGH * sum(run.ms for run in result.runs) / 1e3
    minutes = math.ceil(seconds / 60 / (1 - CURVES_SHARE)) + 1  # the probes and the report
    bare = re.sub(r" --(minutes|length)[ =]\S+", "", result.command)
    return f"{bare} --length {result.length} --minutes {minutes}"


def write(result: Result, path: Path) -> None:
    """Write the report to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(render(result), encoding="utf-8")
    except OSError as error:
        raise SparseFlashError(
            f"cannot write the report {path}: {error.strerror}; give another --out"
        ) from None


def render(result: Result) -> str:
    """Render the page: self-contained, without scripts or fonts."""
    rows = comparison(result)
    steps = len(result.runs[0].rows)
    body = Template(asset("report.html")).substitute(
        verdict=html.escape(verdict(result)),
        figures=_figures(rows, steps, result),
        parameters=f"{result.parameters / 1e6:.1f}",
        data=html.escape(result.data),
        dtype=result.dtype,
        length=f"{result.length:,}",
        steps=steps,
        training_table=_training_table(rows),
        models="".join(f"<li><b>{html.escape(r['label'])}</b>: {html.escape(r['what'])}</li>" for r in rows),
        by_step=_training(result, by_time=False),
        by_time=_training(result, by_time=True),
        curves=_curves(result.curves),
        curve_table=_curve_table(result.curves),
        drawings=_drawings(result.drawings),
        machine="".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in result.machine.items() if v
        ),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in result.notes),
        command=html.escape(result.command),
    )
    return framed("sparseflash: demo report", asset("report.css"), body)


def framed(title: str, css: str, body: str) -> str:
    """Wrap a body to a standalone page."""
    return Template(asset("frame.html")).substitute(title=title, css=css, body=body)


def asset(name: str) -> str:
    """Text of a file in this package."""
    return files("sparseflash.bench").joinpath(name).read_text(encoding="utf-8")


def _training_table(rows: Sequence[Mapping]) -> str:
    head = ("model", "ms / step", "tokens / s", "speed-up", "validation bits / byte", "against dense")
    body = [
        (
            r["label"],
            f"{r['ms']:,.0f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['speedup']:.2f}x",
            f"{r['bpb']:.4f}",
            "" if r is rows[0] else f"{r['worse']:+.1%}",
        )
        for r in rows
    ]
    return _table(head, body, best=1)


def _drawings(drawings: Sequence[Drawing]) -> str:
    if not drawings:
        return ""
    cells = (
        f"<figure>{chart.mask(d.keep, d.title)}<figcaption>{html.escape(d.title)}</figcaption></figure>"
        for d in drawings
    )
    texts = dict.fromkeys(f"<pre>{html.escape(d.text)}</pre>" for d in drawings)
    return (
        "<h2>What the heads see</h2>\n<p>Plans of the trained models over a stretch of held-out text, "
        "queries downwards, keys to the right. A plan is all that a kernel knows about a method.</p>\n"
        f'<div class="masks">{"".join(cells)}</div>\n'
        f"<details><summary>The same plans as text</summary>{''.join(texts)}</details>"
    )


def _figures(rows: Sequence[Mapping], steps: int, result: Result) -> str:
    run = rows[1]
    cells = [
        (f"{run['speedup']:.2f}x", f"speed of a training step, {run['label']} over dense"),
        (f"{run['ms']:,.0f} ms", f"per step; dense {rows[0]['ms']:,.0f} ms"),
        (f"{run['bpb']:.3f}", f"validation bits per byte; dense {rows[0]['bpb']:.3f}"),
        (f"{steps}", f"equal steps at T = {result.length:,}"),
    ]
    return (
        '<div class="figures">'
        + "".join(f"<div><b>{a}</b><span>{html.escape(b)}</span></div>" for a, b in cells)
        + "</div>"
    )


def _training(result: Result, by_time: bool) -> str:
    series = []
    for run in result.runs:
        points, spent = [], 0.0
        for row in run.rows:
            spent += row.ms_per_step / 1e3
            if row.val_bpb is not None:
                points.append((spent if by_time else float(row.step), row.val_bpb))
        series.append(chart.Line(run.label, points, run.style))
    return chart.lines(
        series,
        x_label="seconds of training" if by_time else "step",
        y_label="validation bits per byte",
        y_format="{:.3g}".format,
    )


def _curves(rows: Sequence[Row]) -> str:
    labels = list(dict.fromkeys(row["case"] for row in rows))
    series = [
        chart.Line(
            label,
            [(float(r["T"]), r["ms"]) for r in rows if r["case"] == label and "ms" in r],
            STYLES.get(label, "naive"),
            dashed=label.startswith("naive"),
        )
        for label in labels
    ]
    return chart.lines(
        series,
        x_label="sequence length T",
        y_label="ms, forward + backward",
        log=True,
        x_format=lambda t: f"{t / 1024:g}k" if t >= 1024 else f"{t:g}",
        y_format=lambda ms: f"{ms:,.0f}" if ms >= 10 else f"{ms:.2g}",
    )


def _curve_table(rows: Sequence[Row]) -> str:
    lengths = sorted({row["T"] for row in rows})
    body = []
    for label in dict.fromkeys(row["case"] for row in rows):
        own = {row["T"]: row for row in rows if row["case"] == label}
        known = next((row for row in reversed(list(own.values())) if row.get("density") is not None), {})
        share = [
            f"{known[name]:.3f}" if known.get(name) is not None else "" for name in ("density", "recall")
        ]
        cells = []
        for length in lengths:
            row = own.get(length, {})
            if "ms" not in row:
                cells.append("-")
            else:
                times = f" ({row['speedup']:.1f}x)" if row.get("speedup") and label != rows[0]["case"] else ""
                cells.append(f"{row['ms']:,.0f}{times}" if row["ms"] >= 10 else f"{row['ms']:.1f}{times}")
        body.append((label, *cells, *share))
    notes = dict.fromkeys(f"{r['case']}, T = {r['T']:,}: {r['note']}" for r in rows if r.get("note"))
    table = _table(("ms (speed-up over dense)", *(f"{t:,}" for t in lengths), "kept", "recall"), body)
    return table + "".join(f"<p>{html.escape(note)}</p>" for note in notes)


def _table(head: Sequence[str], body: Sequence[Sequence[str]], best: int | None = None) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(body):
        mark = ' class="best"' if number == best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>")
    return '<div class="scroll"><table>' + "".join(lines) + "</table></div>"
