"""Line charts, bar charts and mask drawings as plain SVG strings.

Colours are CSS variables, so that a page chooses light or dark; text and lines scale with the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 190, 14, 48
LETTER = 9
"""Width reserved per letter of a line's end label, enough for any of the reader's fonts."""


@dataclass(frozen=True)
class Line:
    """One line: label, points (x, y), CSS variable of its colour, and whether it is dashed."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str
    dashed: bool = False


def lines(
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    x_format: Callable[[float], str] = "{:g}".format,
    y_format: Callable[[float], str] = "{:g}".format,
) -> str:
    """Draw lines with labels at their ends; `log` makes both axes logarithmic."""
    series = [line for line in series if line.points]
    if not series:
        return "<p>Nothing was measured.</p>"
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    edge = WIDTH - max(RIGHT, 20 + LETTER * max(len(line.label) for line in series))
    x_axis = _Axis(min(xs), max(xs), LEFT, edge, log)
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log, slack=0.06)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)}">'
    ]
    for y in _ticks_log(y_axis) if log else _ticks(y_axis):
        at = y_axis(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{edge}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y_format(y)}</text>')
    named = sorted(set(xs))  # label measured values, if there is space
    few = log and len(named) <= 8
    for x in named if few else _ticks_log(x_axis) if log else _ticks(x_axis):
        at = x_axis(x)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x_format(x)}</text>'
        )
    middle = (LEFT + edge) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    ends = _spread([(y_axis(line.points[-1][1]), line) for line in series])
    for at, line in ends:
        points = [(x_axis(x), y_axis(y)) for x, y in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<g style="--c:var(--{line.style})"><path class="line" d="{path}"{dash}/>')
        if len(points) <= 24:
            for (x, y), (vx, vy) in zip(points, line.points, strict=True):
                text = html.escape(f"{line.label}: {x_format(vx)}, {y_format(vy)}")
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{text}</title></circle>')
        x, y = points[-1]
        parts.append(f'<path class="stem" d="M{x + 4:.1f} {y:.1f}L{edge + 10} {at:.1f}"/>')
        parts.append(f'<text x="{edge + 14}" y="{at + 4:.1f}">{html.escape(line.label)}</text></g>')
    return "".join([*parts, "</svg>"])


def bars(
    values: Sequence[tuple[str, float]],
    *,
    x_label: str,
    mark: float | None = None,
    x_format: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """Draw horizontal bars with their values; `mark` draws a line across all bars."""
    if not values:
        return "<p>Nothing was measured.</p>"
    step, tail = 22, 60
    left = 16 + (LETTER - 1) * max(len(label) for label, _ in values)
    height = step * len(values) + 30
    axis = _Axis(0.0, max(mark or 0.0, *(x for _, x in values)) or 1.0, left, WIDTH - tail, log=False)
    name = html.escape(x_label)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">']
    for row, (label, value) in enumerate(values):
        y = row * step + 4
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{html.escape(label)}</text>')
        parts.append(
            f'<g style="--c:var(--hash-2)"><rect class="bar" x="{left}" y="{y}" '
            f'width="{max(axis(value) - left, 0.5):.1f}" height="{step - 6}"/>'
            f'<text x="{axis(value) + 6:.1f}" y="{y + 12}">{x_format(value)}</text></g>'
        )
    if mark is not None:
        at = f"{axis(mark):.1f}"
        parts.append(f'<line class="grid mark" x1="{at}" x2="{at}" y1="0" y2="{height - 26}"/>')
    middle = (left + WIDTH - tail) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{name}</text>')
    return "".join([*parts, "</svg>"])


def alone(svg: str) -> str:
    """Make a chart a standalone file, with the colours that a page would define."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{_STYLE}</style>", 1
    )


_STYLE = (
    "svg{--soft:#5b6675;--rule:#e3e5e8;--dense:#334155;--naive:#a0aab8;--reformer:#d97706;"
    "--hash-1:#8ab8fb;--hash-2:#3b82f6;--hash-3:#1e40af;--qk-1:#7ad8b0;--qk-2:#10a874;--qk-3:#04694b;"
    "font:14px system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){svg{--soft:#97a3b3;--rule:#2a323d;--dense:#e2e8f0;--naive:#66758a;"
    "--reformer:#f5b546;--hash-1:#2f62c9;--hash-2:#6aa5f8;--hash-3:#bcd7fe;--qk-1:#0d8059;--qk-2:#3fd19b;"
    "--qk-3:#b0f3d6}}"
    "text{fill:var(--soft)}.grid{stroke:var(--rule)}.mark{stroke:var(--soft);stroke-dasharray:3 3}"
    ".line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}"
    ".stem{fill:none;stroke:var(--c);stroke-width:.7;opacity:.6}"
    "circle,.bar{fill:var(--c)}g text{fill:var(--c)}"
)


def mask(keep: Sequence[Sequence[bool]], title: str) -> str:
    """Draw visible pairs as filled cells; queries downwards, keys to the right."""
    size = len(keep)
    runs = []
    for y, row in enumerate(keep):
        x = 0
        while x < len(row):
            if row[x]:
                start = x
                while x < len(row) and row[x]:
                    x += 1
                runs.append(f"M{start} {y}h{x - start}v1h-{x - start}z")
            x += 1
    name = html.escape(title)
    return (
        f'<svg class="mask" viewBox="-1 -1 {len(keep[0]) + 2} {size + 2}" role="img" aria-label="{name}">'
        f'<rect x="-.5" y="-.5" width="{len(keep[0]) + 1}" height="{size + 1}"/>'
        f'<path d="{"".join(runs)}"/></svg>'
    )


class _Axis:
    def __init__(
        self, low: float, high: float, start: float, end: float, log: bool, slack: float = 0.0
    ) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = (math.log(low), math.log(high)) if log else (low, high)
        room = slack * (high - low) or (0.5 if high == low else 0.0)
        self.low, self.high = low - room, high + room

    def __call__(self, value: float) -> float:
        value = math.log(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(axis: _Axis, count: int = 6) -> list[float]:
    raw = (axis.high - axis.low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw)
    return [
        i * step for i in range(math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9) + 1)
    ]


def _ticks_log(axis: _Axis) -> list[float]:
    low, high = math.exp(axis.low), math.exp(axis.high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return ticks if len(ticks) <= 10 else [t for t in ticks if f"{t:e}".startswith("1")]


def _spread(ends: list[tuple[float, Line]], gap: float = 17.0) -> list[tuple[float, Line]]:
    """Move labels apart until none overlap, keeping their order and staying on the page."""
    ends = sorted(ends, key=lambda end: end[0])
    at = [y for y, _ in ends]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    overflow = at[-1] - (HEIGHT - BOTTOM)
    if overflow > 0:
        at[-1] -= overflow
        for i in range(len(at) - 2, -1, -1):
            at[i] = min(at[i], at[i + 1] - gap)
    return [(y, line) for y, (_, line) in zip(at, ends, strict=True)]
