"""The command of SCFA's own claim, in parts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from sparseflash.bench.commands.app import Lengths, integers, known, lengths_of, words

from .app import RESULTS, Kept, experiments

PARTS = ("smollm",)


@experiments.command("claim", rich_help_panel="Training and quality")
def bench_claim(
    part: Annotated[str, typer.Argument(help=f"One of {', '.join(PARTS)}.")],
    out: Kept = RESULTS / "claim.csv",
    books: Annotated[
        Path | None, typer.Option(help="Directory of novels, plain text; without it source code alone.")
    ] = None,
    cases: Annotated[str, typer.Option(help="Contenders, separated by semicolons; by default all.")] = "",
    lengths: Lengths = "4096",
    seeds: Annotated[str, typer.Option(help="Of planes and random buckets; with commas between.")] = "0,1",
    texts: Annotated[int, typer.Option(min=1, help="Texts of each kind, at most.")] = 4,
) -> None:
    """Test SCFA's claim, speed without losing quality, by tests that can fail. Hours, row by row.

    Rows that OUT has are not measured again: stop it at any time. OUT is claim-PART.csv by default.
    """
    from sparseflash.bench import results
    from sparseflash.bench.session import show, watch

    from ..claim import measure, smollm, unfinished
    from ..claim import texts as texts_

    (part,) = known("part", PARTS, [part])
    out = out.with_stem(f"claim-{part}") if out == RESULTS / "claim.csv" else out
    there = list(results.read(out)) if out.is_file() else []
    kinds = {"code": texts_.code()} | ({"novels": texts_.novels(books)} if books else {})
    documents = {kind: dict(list(named.items())[:texts]) for kind, named in kinds.items()}
    jobs = smollm.untrained(
        functools.cache(smollm.Subject.load),
        documents,
        lengths=lengths_of(lengths),
        cases=known("cases", smollm.CASES, words(cases, ";")),
        seeds=integers(seeds, "0,1"),
    )
    rows = watch("claim", out, functools.partial(measure, unfinished(jobs, there)), there)
    columns = ("text", "T", "steps", "case", "texts", "density", "loss", "loss_far", "kl", "kept", "kept_far")
    show(smollm.kept(rows), out, columns)
    print("\n".join(smollm.verdict(rows)))
