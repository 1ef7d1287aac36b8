"""The board as a standalone page: sortable tables, and plots of loss over the kept share."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from sparseflash.bench import board, chart
from sparseflash.bench.board import CONTROLS, Line
from sparseflash.bench.report import asset, framed
from sparseflash.common.errors import SparseFlashError
from sparseflash.common.files import replacing
from sparseflash.methods.base import Method

PHASES = {
    "prompt": (
        "Prompts",
        "A method decides what the tokens of a prompt see; what follows reads everything. kept: of the "
        "causal pairs. KL: of the 48 next tokens' probabilities from those of a dense prompt, nats a token. "
        "attention: how much faster than dense the layers' attention was in this run, selection included.",
    ),
    "decode": (
        "Caches and decoding",
        "The prompt is dense (a policy drops keys behind it); 48 tokens of the text follow one at a time. "
        "kept: of the keys of each KV head. bytes: of the cache over those of all keys and values. agree: "
        "how often the likeliest token is dense attention's.",
    ),
}
COLUMNS = {
    "prompt": ("kept", "recall", "recall_worst", "loss", "kl", "attention_gain"),
    "decode": ("kept", "bytes", "kl", "agree", "gain"),
}
NAMES = {
    "recall_worst": "worst head", "kl": "KL", "attention_gain": "attention", "gain": "rate",
}  # fmt: skip
PICTURE = 96
"""Cells along each side of a plan's picture."""


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page for rows of `Board.measure`."""
    if not rows:
        raise SparseFlashError("no rows: measure something first")
    with replacing(path) as temporary:
        temporary.write_text(render(rows), encoding="utf-8")


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render the page: self-contained, and readable without its few lines of script."""
    found = board.lines(rows)
    sections = []
    for model, tokens in dict.fromkeys((x["model"], int(x["tokens"])) for x in rows):
        for phase in PHASES:
            own = [x for x in found if (x.phase, x.model, x.tokens) == (phase, model, tokens)]
            if len(own) > 1:
                sections.append(_section(phase, model, tokens, own, rows))
        sections.append(_tasks(model, tokens, rows))
    last = rows[-1]
    machine = {name: str(last[name]) for name in ("cpu", "threads", "torch", "git") if last.get(name)}
    body = Template(asset("board.html")).substitute(
        sections="\n".join(filter(None, sections)),
        machine="".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in machine.items()),
    )
    return framed("sparseflash: the board", asset("report.css") + asset("board.css"), body)


def _section(
    phase: str, model: str, tokens: int, own: Sequence[Line], rows: Sequence[Mapping[str, Any]]
) -> str:
    title, says = PHASES[phase]
    sure = board.agreement(rows, phase, model, tokens)
    texts = max(x.texts for x in own)
    note = f"Means over {texts} texts." if texts > 1 else "One text."
    if sure is not None:
        note += f" The order by KL on two of them has rank correlation {sure:.2f}."
    name = f"{title}: {html.escape(model)}, {tokens:,} tokens"
    return (
        f"<h2>{name}</h2>\n<p>{says} {note}</p>\n<figure>{pareto(own)}<figcaption>What is lost over what is "
        "kept, both axes logarithmic, a line a method; dashed are the controls, light is what does not beat "
        f"both of them at any budget.</figcaption></figure>\n{_table(phase, own)}"
    )


def pareto(own: Sequence[Line]) -> str:
    """Plot KL over the kept share, one line per method."""
    series = []
    for case in dict.fromkeys(x.case for x in own if x.case != "dense"):
        each = [x for x in own if x.case == case and x.figures["kept"] < 0.999]
        points = sorted((x.figures["kept"], max(x.figures["kl"], 1e-6)) for x in each)
        control = case in CONTROLS[each[0].phase] if each else False
        good = any(x.beats for x in each)
        style = "dense" if control else "hash-2" if good else "naive"
        series.append(chart.Line(case, points, style, dashed=control))
    return chart.lines(
        series,
        x_label="kept",
        y_label="KL, nats a token",
        log=True,
        x_format=lambda x: f"{x:.2g}",
        y_format=lambda y: f"{y:.1g}",
    )


def _table(phase: str, own: Sequence[Line]) -> str:
    columns = COLUMNS[phase]
    named = ("method", "budget", *(NAMES.get(x, x) for x in columns), "beats both")
    head = "".join(f'<th><button type="button">{x}</button></th>' for x in named)
    lines = [f"<tr>{head}</tr>"]
    order = sorted(own, key=lambda x: (x.budget, x.figures["kl"]))
    for n, line in enumerate(order):
        says = "" if line.beats is None else "yes" if line.beats else "no"
        if line.case in CONTROLS[phase]:
            says = "control"
        name = f"{phase}-{line.model}-{line.tokens}-{n}"
        cells = [_cell(line.figures.get(x), x) for x in columns]
        mark = ' class="best"' if line.beats else ""
        lines.append(
            f'<tr{mark}><td data-sort="{html.escape(line.case)}">{_method(line, name)}</td>'
            f'<td data-sort="{line.budget}">1/{line.budget}</td>{"".join(cells)}'
            f'<td data-sort="{says}">{says}</td></tr>'
        )
    return '<div class="scroll"><table class="sortable">' + "".join(lines) + "</table></div>"


def _cell(value: float | None, column: str) -> str:
    if value is None:
        return "<td></td>"
    text = f"{value:.2f}x" if column in ("gain", "attention_gain") else f"{value:.3f}"
    if column == "kl":
        text = f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
    return f'<td data-sort="{value:.6g}">{text}</td>'


def _method(line: Line, name: str) -> str:
    """A method's name as a button that opens its settings and a picture of its plan."""
    if line.case == "dense" or not line.method:
        return html.escape(line.case)
    seen = picture(line) if line.phase == "prompt" and line.budget == 8 else ""
    name, case, settings = map(html.escape, (name, line.case, line.method))
    return (
        f'<button type="button" popovertarget="{name}">{case}</button>'
        f'<div popover id="{name}" class="card"><code>{settings}</code>{seen}</div>'
    )


def picture(line: Line) -> str:
    """Picture of a method's plan for normal queries and keys, by blocks of tokens."""
    made = board.prompts_of(line.tokens, line.budget).get(line.case)
    if not isinstance(made, Method):
        return ""
    T = min(line.tokens, 64 * PICTURE)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, T, 16, generator=generator)
    try:
        plan = made.select(q, k).plan
    except SparseFlashError:  # needs inputs from a model, such as rotations
        return ""
    keep = torch.zeros(T, T, dtype=torch.bool)
    for one in plan if isinstance(plan, tuple) else (plan,):
        keep |= one.to_dense()[0, 0]
    side = -(-T // PICTURE)
    room = torch.zeros(PICTURE * side, PICTURE * side, dtype=torch.float32)
    room[:T, :T] = keep
    share = room.view(PICTURE, side, PICTURE, side).mean((1, 3))
    return chart.mask((share > 0.25).tolist(), f"{line.case}: blocks of which it sees a quarter or more")


def _tasks(model: str, tokens: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """Table of answers by method and kind, without kinds that random keys answer as well as dense."""
    own = [x for x in rows if (x["phase"], x["model"], int(x["tokens"])) == ("task", model, tokens)]
    if not own:
        return ""
    right = {(x["case"], x["text"]): float(x["right"]) for x in own}
    kinds = list(dict.fromkeys(x["text"] for x in own))
    told = [x for x in kinds if board.tells(right, x)]
    head = "".join(f'<th><button type="button">{x}</button></th>' for x in ("method", *told, "mean"))
    lines = [f"<tr>{head}</tr>"]
    for case in dict.fromkeys(x["case"] for x in own):
        each = [right.get((case, kind)) for kind in told]
        there = [x for x in each if x is not None]
        mean = sum(there) / len(there) if told and len(there) == len(told) else None
        cells = "".join(
            f'<td data-sort="{x}">{x:.0%}</td>' if x is not None else "<td></td>" for x in (*each, mean)
        )
        lines.append(f'<tr><td data-sort="{html.escape(case)}">{html.escape(case)}</td>{cells}</tr>')
    budget = max(int(x["budget"]) for x in own)
    dropped = [x for x in kinds if x not in told]
    note = "Left out, since random keys answer them as well as dense attention: " if dropped else ""
    return (
        f"<h2>Questions: {html.escape(model)}, {tokens:,} tokens</h2>\n<p>Right answers, by likelihood, to "
        f"questions about one document that was read once, at a budget of 1/{budget}. "
        f"{note}{', '.join(dropped)}</p>\n"
        f'<div class="scroll"><table class="sortable">{"".join(lines)}</table></div>'
    )
