"""Draw a program as SVG: a box per loop nest, a line per operator, and tags for its memory traffic.

Blue tags are inputs read, green ones outputs written; red ones are intermediate values that go through global
memory, which fusion removes.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .program import Body, Loop, Program

LINE, STEP, PAD, LETTER = 20, 14, 8, 7.3
STYLE = (
    "text{font:12px ui-monospace,monospace;fill:#24292f}.title{font:600 13px system-ui,sans-serif}"
    ".loop{font-style:italic;fill:#6e7781}.box{fill:#8c959f;fill-opacity:.1;stroke:#8c959f;stroke-opacity:.6}"
    ".tag text{fill:#fff}.input rect{fill:#0969da}.output rect{fill:#1a7f37}.between rect{fill:#cf222e}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.loop{fill:#9198a1}}"
)


def svg(program: Program, title: str) -> str:
    """Draw a program under a title; returns the SVG text."""
    tags = iter(_tags(program))
    boxes: list[tuple[float, float, float]] = []
    lines: list[str] = []
    edge = len(title) * 8.2 + PAD

    def put(body: Body, x: float, y: float) -> float:
        """Draw a body starting at y; returns the y below it."""
        nonlocal edge
        for stmt in body:
            if isinstance(stmt, Loop):
                loops, inner = [stmt], stmt.body
                while len(inner) == 1 and isinstance(inner[0], Loop):
                    loops, inner = [*loops, inner[0]], inner[0].body
                lines.append(
                    f'<text class="loop" x="{x + PAD}" y="{y + 15}">{", ".join(map(str, loops))}</text>'
                )
                end = put(inner, x + STEP, y + LINE)
                boxes.append((x, y, end - y))
                y = end + 4
                continue
            text = str(stmt)
            lines.append(f'<text x="{x + PAD}" y="{y + 15}">{escape(text)}</text>')
            right = x + PAD + LETTER * len(text) + 14
            for name, kind in next(tags):
                wide = LETTER * len(name) + 10
                shape = f'<rect x="{right}" y="{y + 2}" width="{wide:.1f}" height="16" rx="8"/>'
                lines.append(
                    f'<g class="tag {kind}">{shape}<text x="{right + 5:.1f}" y="{y + 14}">{name}</text></g>'
                )
                right = round(right + wide + 4, 1)
            edge, y = max(edge, right + 4 * STEP), y + LINE
        return y + 2

    bottom = put(program.body, PAD, LINE + PAD)
    wide = round(edge + PAD)
    drawn = "".join(
        f'<rect class="box" x="{x}" y="{y}" width="{wide - 2 * x}" height="{high}" rx="5"/>'
        for x, y, high in boxes
    )
    head = f'<text class="title" x="{PAD}" y="17">{escape(title)}</text>'
    size = f'viewBox="0 0 {wide} {bottom + PAD:.0f}" width="{wide}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">'
        f"<style>{STYLE}</style>{head}{drawn}{''.join(lines)}</svg>\n"
    )


def _tags(program: Program) -> Iterator[list[tuple[str, str]]]:
    """For each operator in order, tags of the values read for it and written by it."""
    inputs, reads = {name for name, _ in program.inputs}, list[tuple[str, str]]()
    for access in program.accesses:
        if access.kind == "read":
            reads.append((access.name, "input" if access.name in inputs else "between"))
        elif access.kind == "compute":
            written = access.name in program.travelling
            out = "output" if access.name in program.outputs else "between"
            yield [*reads, *([(f"\u2192 {access.name}", out)] if written else [])]
            reads = []
