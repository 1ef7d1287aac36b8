"""The command of SCFA's own claim, in parts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from sparseflash.bench.commands.app import Lengths, integers, known, lengths_of, words

from .app import RESULTS, experiments, go_on

PARTS = ("smollm", "tuned", "mqar", "pairing", "steps")


@experiments.command("claim", rich_help_panel="Training and quality")
def bench_claim(
    part: Annotated[str, typer.Argument(help=f"One of {', '.join(PARTS)}.")],
    out: Annotated[
        Path | None, typer.Option(help="CSV file of the rows, which goes on; claim-PART.csv by default.")
    ] = None,
    books: Annotated[
        Path | None, typer.Option(help="Directory of novels, plain text; without it source code alone.")
    ] = None,
    cases: Annotated[str, typer.Option(help="Contenders, separated by semicolons; by default all.")] = "",
    lengths: Lengths = "4096",
    seeds: Annotated[str, typer.Option(help="Of planes and random buckets; with commas between.")] = "0,1",
    texts: Annotated[int, typer.Option(min=1, help="Texts of each kind that are judged, at most.")] = 4,
    steps: Annotated[str, typer.Option(help="After which to judge; pairing takes the last.")] = "25,100",
    runs: Annotated[Path, typer.Option(help="Checkpoints, where a run goes on.")] = Path("runs/claim"),
) -> None:
    """Test SCFA's claim, speed without losing quality, by tests that can fail. Hours, row by row.

    smollm exchanges the attention of SmolLM2 (make models), tuned trains it so for a few steps, mqar asks
    for what was said once, far back, pairing trains the paper's tied models on Wikipedia's XML, steps times
    training steps. Rows that OUT has are not measured again, but for steps, whose cases take turns.
    """
    from sparseflash.bench.session import session, show
    from sparseflash.train.data import named

    from .. import steps as steps_
    from ..claim import pairing, recall, smollm, tuning
    from ..claim import texts as texts_

    (part,) = known("part", PARTS, [part])
    out = out or RESULTS / f"claim-{part}.csv"
    sizes, drawn = lengths_of(lengths), integers(seeds, "0,1")
    if part == "steps":
        timing = functools.partial(steps_.measure, named(""), attentions=steps_.WINDOWED, lengths=sizes)
        session("training steps", out, timing, ("case", "T", "dtype", "ms", "speedup", "rounds"))
        return
    all_cases = {"mqar": recall.CONTENDERS, "pairing": pairing.CASES}.get(part, smollm.CASES)
    names, after = known("cases", all_cases, words(cases, ";")), integers(steps, "25,100", least=1)
    if part == "mqar":
        jobs = recall.jobs(cases=names, seeds=drawn)
    elif part == "pairing":
        options = {"runs": runs, "seeds": drawn, "cases": names, "steps": after[-1]}
        jobs = [x for T in sizes for x in pairing.jobs(pairing.wikipedia(), length=T, **options)]
    else:
        documents = {"code": texts_.code()} | ({"novels": texts_.novels(books)} if books else {})
        held, learnt = tuning.apart(documents, texts)
        if part == "smollm":
            jobs = smollm.untrained(
                functools.cache(smollm.Subject.load), held, lengths=sizes, cases=names, seeds=drawn
            )
        else:
            options = {"runs": runs, "steps": after, "seeds": drawn}
            names = names if cases else list(smollm.TUNED)
            jobs = [x for T in sizes for x in tuning.jobs(learnt, held, T=T, cases=names, **options)]
    rows = go_on("claim", out, jobs)
    if part == "mqar":
        show(rows, out, ("case", "seed", "density", "accuracy", "steps_95", "minutes_95", "steps"))
        print(
            "\n".join(recall.verdict(rows)) or f"as it has to be: {', '.join(recall.MUST_SOLVE)} look it up"
        )
        return
    if part == "pairing":
        show(rows, out, ("text", "T", "heads", "case", "seed", "steps", "bpb", "ms_per_step"))
        print("\n".join(pairing.verdict(rows)))
        return
    columns = ("text", "T", "steps", "case", "texts", "density", "loss", "loss_far", "kl", "kept", "kept_far")
    show(smollm.kept(rows), out, columns)
    print("\n".join(smollm.verdict(rows)))
