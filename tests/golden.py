"""What every method selects at the edges, and which settings it takes: a change of either shows in a table.

    python tests/golden.py        # make golden

A selection of vectors whose scores no rounding decides is integers, the same on every machine.
"""

from __future__ import annotations

import csv
import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sparseflash as sf
from cases import CASES, Case, directions, mask_of
from sparseflash.methods import heads
from sparseflash.methods.session import Session
from sparseflash.plan.figures import partial_area, visited_area

SELECTED = Path(__file__).with_name("golden_selected.csv")
"""Of each call of a case: visible pairs, pairs that tiles visit, those among them that they test; CRC-32."""
TAKEN = Path(__file__).with_name("golden_taken.csv")
"""Of each numeric setting of a method: which of `COUNTS` or `SHARES` are taken."""
COUNTS = (-2, -1, 0, 1, 2, 3, 7, 8, 64)
SHARES = (-0.5, 0.0, 0.25, 1.0, 1.5)

CONTEXTS: dict[str, list[dict[str, Any]]] = {
    "documents": [{"cu_seqlens": torch.tensor([0, 1, 33, 95, 96], dtype=torch.int32)}],
    "tree": [{"parents": torch.tensor([-1, 0, 0, 1, 1, 2, *range(5, 95)])}],
    "mminference": [{"grid": (4, 4, 6)}, {"modality": (torch.arange(96) // 20 % 2)[None]}],
    "grid-window": [{"grid": (6, 16)}],
    "prefix-lm": [{"prefix": torch.tensor([7], dtype=torch.int32)}],
}
"""What a caller may tell of 96 tokens, where a method reads it."""


def calls(case: Case) -> Iterator[tuple[str, Any, tuple[int, ...], dict[str, Any]]]:
    """A name, a method, the sizes B, Hq, Hkv, Tq, Tk, and a context, of each call of a case."""
    method = case.method()
    behind = "q_offset" in method.reads and case.slug != "tree"
    for T in (1, 2, 63, 65, 129):
        yield f"{T} tokens", method, (1 + (T == 63), 4, 2, T, T), {}
    if behind:
        for Tq, Tk in ((1, 130), (40, 150), (66, 130)):
            yield f"{Tq} behind {Tk - Tq}", method, (2, 4, 2, Tq, Tk), {"q_offset": Tk - Tq}
        apart = torch.tensor([60, 40], dtype=torch.int32)
        yield "rows apart", method, (2, 4, 2, 20, 80), {"q_offset": apart}
    for n, change in enumerate(case.budgets):
        yield f"budget {n}", case.method(**change), (1, 4, 4, 96, 96), {}
    for name, told in (("scale", 2.0), ("softcap", 0.5)):
        if name in method.reads:
            yield name, method, (1, 4, 2, 96, 96), {name: told}
    for n, told in enumerate(CONTEXTS.get(case.slug, [])):
        if set(told) <= set(method.reads):
            yield f"told {n}", method, (1, 4, 4, 96, 96), told
    if "text" in method.reads:
        for text in ((1, 0), (0, 1), (18, 5)):
            yield f"text {text}", method, (1, 4, 4, 96, 96), {"text": text}
    if "step" in method.reads or "state" in method.reads:
        for turn in range(3):
            yield f"turn {turn}", method, (1, 4, 4, 96, 96), {"turns": turn}
    if "state" in method.reads and behind:
        yield "a token later", method, (1, 4, 4, 96, 96), {"turns": 0, "later": True}


def selected(case: Case) -> dict[str, dict[str, Any]]:
    """The row of each call of a case; what it says instead, where it refuses."""
    found = {}
    for name, method, (B, Hq, Hkv, Tq, Tk), ctx in calls(case):
        q, k = directions(B, Hq, Tq), directions(B, Hkv, Tk, shift=7)
        row: dict[str, Any] = {"case": str(case), "call": name}
        try:
            found[name] = row | figures(method, q, k, ctx)
        except sf.SparseFlashError as said:
            found[name] = row | {"seen": "", "visited": "", "tested": "", "crc": "", "beside": str(said)[:60]}
    return found


def figures(method: Any, q: torch.Tensor, k: torch.Tensor, ctx: dict[str, Any]) -> dict[str, Any]:
    """Integers of what a method selects, and what it gives beside a plan."""
    ctx = dict(ctx)
    own = (heads.apart(method) or [method])[0]
    if "v" in own.reads:
        ctx["v"] = k
    session, later = Session(method), ctx.pop("later", False)
    whole = q, k
    if later:  # all but the last token first
        q, k = q[:, :, :-1], k[:, :, :-1]
    for turn in range(ctx.pop("turns", 0) + 1 if "turns" in ctx else 0):
        where: dict[str, Any] = {} if own.across_layers else {"layer": 0}
        where |= {"step": turn} if "step" in own.reads else {}
        ctx = session.context({**ctx, **where})
        selection = method.select(q, k, ctx)
        with torch.no_grad():
            session(q, k, k, ctx=where)
    if later:
        q, k = whole[0][:, :, -1:], whole[1]
        ctx = session.context(
            {"layer": 99 if own.across_layers else 0, "q_offset": 95} | ({"v": k} if "v" in own.reads else {})
        )
    selection = method.select(q, k, ctx)
    parts = selection.plan if isinstance(selection.plan, (tuple, list)) else (selection.plan,)
    mask = mask_of(tuple(parts))
    batch, H = max(x.extent()[0] for x in parts), max(x.extent()[1] for x in parts)

    def area(of: Any) -> int:
        return sum(of(x) * batch * H // (x.extent()[0] * x.extent()[1]) for x in parts)

    beside = []
    if selection.skip_below is not None:
        beside.append(f"skip_below {selection.skip_below:.4f}")
    for name in ("gate", "key_bias"):
        if (x := getattr(selection, name)) is not None:
            beside.append(f"{name} {list(x.shape)} {x.double().mean():.4f}")
    if selection.inputs is not None:
        ramp = [torch.linspace(-1, 1, x.shape[2], dtype=torch.float64)[:, None] for x in selection.inputs]
        beside += [f"{float((x.detach() * r).sum()):.1f}" for x, r in zip(selection.inputs, ramp)]
    return {
        "seen": int(mask.sum()),
        "visited": area(visited_area),
        "tested": area(partial_area),
        "crc": zlib.crc32(mask.numpy().tobytes()),
        "beside": "; ".join(beside),
    }


def taken(slug: str) -> list[dict[str, str]]:
    """Which small numbers each setting of a method takes."""
    case = next(c for c in CASES if c.slug == slug)
    rows = []
    for field in dataclasses.fields(sf.methods.find(slug)):
        kinds = str(field.type)
        if field.name == "seed" or not ("int" in kinds or "float" in kinds) or "tuple" in kinds:
            continue
        good = []
        for value in SHARES if "float" in kinds else COUNTS:
            try:
                case.method(**{field.name: value})
            except sf.SparseFlashError:
                continue
            good.append(f"{value:g}")
        rows.append({"method": slug, "setting": field.name, "taken": " ".join(good)})
    return rows


def main() -> None:
    """Write both tables anew."""
    for path, rows in (
        (SELECTED, [row for case in CASES for row in selected(case).values()]),
        (TAKEN, [row for name in sf.methods.names() for row in taken(name)]),
    ):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
