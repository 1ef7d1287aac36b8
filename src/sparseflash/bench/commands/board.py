"""`sparseflash board`: every method on one model at equal budgets, and a page of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseflash.common.errors import SparseFlashError

from .app import Minutes, integers, words
from .prompts import Dtype, Model, Text, _read


def board(
    text: Text,
    model: Model = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = "4096",
    methods: Annotated[str, typer.Option(help="Some of them, separated by commas; by default all.")] = "",
    budgets: Annotated[
        str, typer.Option(help="A budget of 8 keeps about 1/8: some of 2,4,8,16.")
    ] = "2,4,8,16",
    tasks: Annotated[
        str, typer.Option(help="Kinds of questions about a long document, separated by commas; all; or none.")
    ] = "none",
    task_budget: Annotated[
        int, typer.Option(min=2, max=16, help="The budget at which questions are asked.")
    ] = 8,
    skip: Annotated[int, typer.Option(min=0, help="Characters of each text that come before.")] = 0,
    dtype: Dtype = "fp32",
    minutes: Minutes = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of board.csv, which is gone on with, and board.html.")
    ] = Path("board"),
) -> None:
    """Measure every method on your model and texts, beside two controls, and write the page.

    **sparseflash board --text book.txt --text code.txt --lengths 4096 --minutes 60**

    Rows are saved as they are measured; a stopped run continues where it was. KL: divergence of the next
    tokens' probabilities from those of dense attention; kept: share of pairs, or of keys.
    """
    import sparseflash as sf
    from sparseflash.bench import board as table
    from sparseflash.bench import page, results, session
    from sparseflash.bench import tasks as questions
    from sparseflash.bench.cases import DTYPES

    if dtype not in DTYPES:
        raise SparseFlashError(f"--dtype {dtype!r}: expected {' or '.join(DTYPES)}")
    texts = {path.stem: _read(path)[skip:] for path in text}
    loaded, tokenizer = sf.transformers.load(model, dtype=DTYPES[dtype])
    made = table.Board(
        model, loaded, tokenizer, texts,
        tokens=integers(lengths), budgets=integers(budgets), wanted=words(methods),
        asked={"all": tuple(questions.KINDS), "none": ()}.get(tasks, words(tasks)), at=task_budget,
        minutes=minutes, skip=skip,
    )  # fmt: skip
    where = out / "board.csv"
    known = results.read(where, "phase", "case", "kl") if where.exists() else []
    rows = session.watch("board", where, lambda on_run: made.measure(known, on_run), known)
    page.write(rows, out / "board.html")
    typer.echo(f"{where}: {len(rows)} rows; {out / 'board.html'}")
