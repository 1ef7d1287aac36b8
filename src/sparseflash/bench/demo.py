"""The demo: runtime curves, one model trained dense and sparse in turns, and a report of both.

Everything fits into a time box. After one timed round, the remaining time gives the number of training steps,
which is equal for all models.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparseflash import methods
from sparseflash.bench import cases, curves, results
from sparseflash.bench.machine import describe
from sparseflash.bench.report import CURVES_SHARE, Drawing, Result, Run, comparison, verdict, write
from sparseflash.bench.timing import predict, seconds
from sparseflash.common.errors import SparseFlashError
from sparseflash.train import Corpus, TrainConfig, Trainer

LEARNING_RATE = 8e-3  # the better of 4e-3 and 8e-3 for the dense baseline in such short runs
REPORT_SECONDS = 12
VALIDATIONS = 6
FEWEST, MOST = 8, 400  # steps


@dataclass(frozen=True)
class Contender:
    """A model of the demo, before training."""

    label: str
    what: str
    style: str
    changes: dict[str, Any]


DENSE = Contender(
    "dense", "torch scaled_dot_product_attention, causal: every query sees all earlier keys", "dense", {}
)
TIED = Contender("dense, tied q/k", "the paper's own baseline: k = q / |q| per head", "naive", {"qk": "tied"})


def sparse(changes: Mapping[str, Any]) -> list[Contender]:
    """The hash-sparse models, with and without a window head.

    Raises
    ------
    SparseFlashError
        If the method lacks a field or refuses its value, or the field is `window_heads`, in which the models
        differ.
    """
    if "window_heads" in changes:
        raise SparseFlashError("--set window_heads is what the hash-sparse models differ in; leave it out")
    method = methods.get("hash-sparse", **changes)
    buckets = f"see the earlier keys of their own hash bucket ({method.nb} buckets)"
    kinds = (
        ("hash-sparse + 1 window head", f"three heads {buckets}, one head sees a causal window", "hash-2", 1),
        ("hash-sparse, pure", f"all heads {buckets}", "hash-1", 0),
    )
    return [
        Contender(
            label,
            what,
            style,
            {"attention": "hash-sparse", "options": {"nb": method.nb, **changes, "window_heads": heads}},
        )
        for label, what, style, heads in kinds
    ]


def run(
    corpus: Corpus,
    out: Path,
    *,
    minutes: float = 6.0,
    length: int = 8192,
    dtype: str = "fp32",
    seed: int = 0,
    tied: bool = False,
    changes: Mapping[str, Any] | None = None,
    command: str = "sparseflash demo",
    shape: dict[str, int] | None = None,
) -> Result:
    """Run the demo within `minutes`; write ``report.html``, ``curves.csv`` and ``training.csv`` into `out`.

    Parameters
    ----------
    corpus : Corpus
        Training data of the models.
    out : Path
        Directory of the report.
    minutes : float
        Time box of the whole demo.
    length, dtype, seed
        Of the training part.
    tied : bool
        Also train the paper's dense baseline with tied q/k.
    changes : mapping, optional
        Fields of the hash-sparse models, such as ``nb``.
    command : str
        Command line that the report quotes.
    shape : dict, optional
        Changes to the model's layers, width, heads and batch.
    """
    from rich.console import Console

    plans = [DENSE, *sparse(changes or {}), *([TIED] if tied else [])]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparseFlashError(
            f"cannot create --out {out}: {error.strerror}; give a writable directory"
        ) from None
    console = Console(highlight=False, soft_wrap=True)
    start = time.monotonic()
    machine = describe()
    console.print(
        f"[bold]sparseflash demo[/]: {machine['cpu']}, {machine['threads']} threads, {machine['backend']}"
    )
    console.print(f"{minutes:g} minutes; data: {corpus.name}, {len(corpus.train) / 1e6:.1f} MB\n")
    rows = _curves(console, minutes * CURVES_SHARE, length, dtype)
    results.write(out / "curves.csv", rows)
    fixed = {
        "length": length,
        "dtype": dtype,
        "seed": seed,
        "lr": LEARNING_RATE,
        "warmup": 0.15,
        "eval_sequences": 2,
    }
    base = TrainConfig("", **{**fixed, **(shape or {})})
    left = minutes * 60 - (time.monotonic() - start) - REPORT_SECONDS
    trainers, runs, notes = _train(console, corpus, base, plans, left)
    result = Result(
        machine=machine,
        data=corpus.name,
        length=trainers[0].config.length,
        dtype=dtype,
        parameters=sum(p.numel() for p in trainers[0].model.parameters()),
        runs=runs,
        curves=rows,
        drawings=_drawings(corpus, plans, trainers),
        command=command,
        letters=corpus.letters(),
        notes=notes,
    )
    results.write(out / "training.csv", _training_rows(result))
    write(result, out / "report.html")
    console.print()
    console.print(_table(result))
    console.print(f"\n{verdict(result)}")
    console.print(f"Report: [bold]{out / 'report.html'}[/] ({(time.monotonic() - start) / 60:.1f} minutes)")
    return result


def _curves(console: Any, minutes: float, longest: int, dtype: str) -> list[results.Row]:
    lengths = [t for t in curves.LENGTHS if t <= max(2 * longest, curves.LENGTHS[0])]
    with _progress(console) as bar:
        task = bar.add_task("runtime curves", total=None)
        rows = list(
            curves.measure(
                cases.curves(),
                lengths=lengths,
                minutes=minutes,
                rounds=3,
                dtype=dtype,
                on_run=lambda text: bar.update(task, description=f"runtime curves: {text}"),
            )
        )
        bar.update(task, description="runtime curves", total=1, completed=1)
    return rows


def _train(
    console: Any, corpus: Corpus, base: TrainConfig, plans: list[Contender], left: float
) -> tuple[list[Trainer], list[Run], list[str]]:
    """Train all `plans` in turns, step by step, with as many equal steps as fit into `left` seconds."""
    started = time.monotonic()
    base, notes = _fit(corpus, base, plans, left)
    for note in notes:
        console.print(note)
    left -= time.monotonic() - started
    while True:
        started = time.monotonic()
        trial = [Trainer(replace(base, steps=MOST, **plan.changes), corpus) for plan in plans]
        step = sum(seconds(trainer.step) for trainer in trial)  # the first step of all also compiles
        step = min(step, sum(seconds(trainer.step) for trainer in trial))
        check = sum(seconds(trainer.validate) for trainer in trial)
        left -= time.monotonic() - started
        steps = int((0.95 * left - (VALIDATIONS + 1) * check) / step)
        if steps >= FEWEST or base.length <= 512:
            break
        notes.append(_shorter(base.length, base.length // 2))
        console.print(notes[-1])
        base = replace(base, length=base.length // 2)
    steps = min(max(steps, FEWEST), MOST)
    every = max(1, steps // VALIDATIONS)
    trainers = [Trainer(replace(base, steps=steps, **plan.changes), corpus) for plan in plans]
    runs = [Run(plan.label, plan.what, plan.style) for plan in plans]
    deadline = time.monotonic() + left
    with _progress(console) as bar:
        task = bar.add_task(f"training, T = {base.length}", total=steps)
        for number in range(1, steps + 1):
            for trainer, one in zip(trainers, runs, strict=True):
                one.rows.append(trainer.step())
            late = time.monotonic() > deadline and number < steps
            if number % every == 0 or number == steps or late:
                for trainer, one in zip(trainers, runs, strict=True):
                    one.rows[-1].val_bpb = trainer.validate()
            text = ", ".join(f"{r.label} {r.rows[-1].loss:.2f}" for r in runs)
            bar.update(
                task,
                completed=number,
                description=f"step {number} of {steps}, T = {base.length}: loss {text}",
            )
            if late:
                notes.append(f"Stopped after {number} of {steps} steps: the machine became slower meanwhile.")
                break
    return trainers, runs, notes


def _fit(
    corpus: Corpus, base: TrainConfig, plans: list[Contender], left: float
) -> tuple[TrainConfig, list[str]]:
    """Shorten the sequences if short probes predict that even a few steps would not fit."""
    history: list[tuple[int, float]] = []
    for probe in sorted({max(256, base.length // 16), max(256, base.length // 4)}):
        if probe < base.length and 6 * predict(history, probe) < left:
            trainers = [Trainer(replace(base, length=probe, **plan.changes), corpus) for plan in plans]
            for trainer in trainers:
                trainer.step()  # compiles
            history.append((probe, sum(seconds(trainer.step) for trainer in trainers)))
    length = base.length
    while length > 512 and left < FEWEST * predict(history, length):
        length //= 2
    if length == base.length:
        return base, []
    return replace(base, length=length), [_shorter(base.length, length)]


def _shorter(wanted: int, length: int) -> str:
    note = (
        f"T = {wanted:,} would take too long on this machine in this time: the models are trained at "
        f"T = {length:,}. More --minutes change that."
    )
    if describe()["backend"].startswith("reference"):
        note += " So does a C++ compiler: without one the slow reference runs (sparseflash doctor)."
    return note


@torch.no_grad()
def _drawings(
    corpus: Corpus, plans: list[Contender], trainers: list[Trainer], size: int = 96
) -> list[Drawing]:
    """Draw what the first and last head of each trained model's second layer attend to, on held-out text."""
    drawings = []
    tokens, _ = next(iter(corpus.validation(size, 1)))
    for plan, trainer in zip(plans, trainers, strict=True):
        layer = trainer.model.blocks[min(1, len(trainer.model.blocks) - 1)].attention
        method = layer.attention
        if not hasattr(method, "select"):
            continue
        seen: list[torch.Tensor] = []

        def spy(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: list = seen, method: Any = method
        ) -> torch.Tensor:
            seen[:] = q, k
            return method(q, k, v)

        layer.attention = spy
        trainer.model(tokens)
        layer.attention = method
        selected = method.select(*seen).plan
        parts = selected if isinstance(selected, tuple) else (selected,)
        heads = seen[0].shape[1]
        keep = sum(part.to_dense().expand(1, heads, size, size).int() for part in parts).bool()[0]
        text = "\n\n".join(str(part) for part in parts)
        for head in dict.fromkeys((0, heads - 1)):
            drawings.append(Drawing(f"{plan.label}: layer 2, head {head + 1}", keep[head].tolist(), text))
    return drawings


def _training_rows(result: Result) -> list[results.Row]:
    return [
        {
            "bench": "demo",
            "case": run.label,
            "T": result.length,
            "dtype": result.dtype,
            "step": row.step,
            "loss": row.loss,
            "val_bpb": row.val_bpb,
            "ms": row.ms_per_step,
        }
        for run in result.runs
        for row in run.rows
    ]


def _table(result: Result) -> Any:
    from rich.table import Table

    steps = len(result.runs[0].rows)
    table = Table(title=f"{steps} equal steps at T = {result.length:,}, {result.dtype}", title_justify="left")
    for number, name in enumerate(("model", "ms / step", "tokens / s", "speed-up", "bits / byte")):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in comparison(result):
        cells = (
            f"{row['ms']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['bpb']:.4f}",
        )
        table.add_row(str(row["label"]), *cells)
    return table


def _progress(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console)
