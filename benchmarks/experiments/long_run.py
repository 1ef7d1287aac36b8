"""The long run: one small language model under every attention, at equal steps and at equal time.

Beside the methods stand two controls: the model that sees no other token, and hash-sparse attention whose
buckets are drawn at random (the same budget, no choice). Attentions are of equal quality only within a
margin by which both controls are worse; otherwise the task asks for no attention, or for no choice.

Every run has a directory of its own and continues from its last checkpoint; a finished one is only read
again. The step times come from one interleaved run of all models, so that the time axis does not depend on
what else the machine did while a model was trained.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseflash.bench.results import Row, cell
from sparseflash.bench.timing import Box, interleave
from sparseflash.selection.orders import random_bits
from sparseflash.train import Corpus, TrainConfig, Trainer, checkpoint, log

TOKENS = 16384
"""Bytes of text in a step."""
BUCKETS = 16


@dataclasses.dataclass(frozen=True)
class Contender:
    """One attention of the comparison; `chance` replaces its hash by random buckets."""

    attention: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    chance: bool = False


HASH, LOCAL = {"nb": BUCKETS}, {"nb": BUCKETS, "window_heads": 1}
CONTENDERS = {
    # causal dense attention through our kernels: the function of torch SDPA, sooner
    "dense": Contender("window", {"window": 2**30}),
    "hash, 1 window head": Contender("hash-sparse", LOCAL),
    "hash": Contender("hash-sparse", HASH),
    "random buckets, 1 window head": Contender("hash-sparse", LOCAL, chance=True),
    "random buckets": Contender("hash-sparse", HASH, chance=True),
    "no attention": Contender("window", {"window": 1}),
    "window": Contender("window", {"window": 512}),
    "30 % dropped": Contender("qk-sparse", {"q_drop": 0.3, "k_drop": 0.3}),
    "50 % dropped": Contender("qk-sparse", {"q_drop": 0.5, "k_drop": 0.5}),
    "70 % dropped": Contender("qk-sparse", {"q_drop": 0.7, "k_drop": 0.7}),
    "reformer": Contender("reformer"),
}
SDPA = "dense, torch SDPA"
"""Timed beside the contenders; its curve is the one of dense."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One model to train."""

    case: str
    config: TrainConfig

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its rows from those of other runs, as they stand in a result file."""
        config = self.config
        return (self.case, *map(cell, (config.lr, config.seed, config.steps, config.length, config.width)))

    @property
    def directory(self) -> str:
        """Name of the directory of the run."""
        words = f"{self.case} lr {self.config.lr:g} seed {self.config.seed} steps {self.config.steps}"
        return re.sub(r"[^a-z0-9.]+", "-", words.lower())

    def trainer(self, corpus: Corpus) -> Trainer:
        """Make the model and its optimiser."""
        trainer = Trainer(self.config, corpus)
        if CONTENDERS[self.case].chance:
            for layer, block in enumerate(trainer.model.blocks):
                seed = self.config.seed * 1009 + layer
                ids = random_bits(1, self.config.heads, self.config.length, seed=seed) % BUCKETS
                context = {"q_bucket": ids, "k_bucket": ids}
                block.attention.attention = dataclasses.replace(block.attention.attention, context=context)
        return trainer


def plan_runs(
    cases: Sequence[str],
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    length: int,
    tokens: int = TOKENS,
    **shape: Any,
) -> list[Run]:
    """Every case at every learning rate and seed; `shape` may change layers, width, heads and dtype."""
    fixed = {"layers": 2, "width": 128, "heads": 4, "dtype": "bf16", "warmup": 0.1} | shape
    fixed |= {"eval_every": max(1, min(100, steps // 5)), "eval_sequences": 32, "save_every": 500}
    return [
        Run(
            case,
            TrainConfig(
                "",
                CONTENDERS[case].attention,
                CONTENDERS[case].options,
                length=length,
                batch=max(1, tokens // length),
                steps=steps,
                lr=rate,
                seed=seed,
                **fixed,
            ),
        )
        for rate, seed, case in itertools.product(rates, seeds, cases)
    ]


def train(
    run: Run, corpus: Corpus, runs: Path, on_row: Callable[[log.Row], None] = lambda row: None
) -> list[log.Row]:
    """Train to the end in a directory of `runs`, from where an earlier call stopped; the whole log."""
    directory = runs / run.directory
    started = (directory / checkpoint.FILE).is_file()
    if started and checkpoint.read_meta(directory)["step"] == run.config.steps:
        return log.read(directory)
    return run.trainer(corpus).run(directory, resume=started, on_row=on_row)


def rows(run: Run, logged: Sequence[log.Row]) -> Iterator[Row]:
    """One row for every validation: bits per byte held out, and in training since the one before."""
    config, since = run.config, list[float]()
    for row in logged:
        since.append(row.loss / 0.6931471805599453)
        if row.val_bpb is not None:
            yield {
                "bench": "long-run",
                "case": run.case,
                "lr": config.lr,
                "seed": config.seed,
                "steps": config.steps,
                "T": config.length,
                "tokens_per_step": config.batch * config.length,
                "layers": config.layers,
                "width": config.width,
                "heads": config.heads,
                "dtype": config.dtype,
                "step": row.step,
                "bpb_train": f"{sum(since) / len(since):.5f}",
                "bpb": f"{row.val_bpb:.5f}",
            }
            since.clear()


def measure(
    runs: Sequence[Run],
    corpus: Corpus,
    directory: Path,
    *,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Train every run and yield its rows; those of a run come when it is done."""
    for number, run in enumerate(runs, 1):
        name = f"{number} of {len(runs)}, {run.case}, lr {run.config.lr:g}, seed {run.config.seed}"

        def on_row(row: log.Row, name: str = name, steps: int = run.config.steps) -> None:
            on_run(f"{name}: step {row.step} of {steps}, loss {row.loss:.3f}")

        yield from rows(run, train(run, corpus, directory, on_row))


def unfinished(runs: Sequence[Run], known: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The runs whose last step is not among the known rows."""
    done = {key(row) for row in known if row["step"] == row["steps"]}
    return [run for run in runs if run.key not in done]


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which run a row belongs to."""
    return tuple(cell(row[x]) for x in ("case", "lr", "seed", "steps", "T", "width"))


def keep_weights(run: Run, runs: Path, out: Path) -> Path:
    """Copy the weights of a run, in bf16, into a directory of `out`; the directory."""
    directory = out / re.sub(r"[^a-z0-9]+", "-", f"{run.case} {run.config.seed}".lower())
    checkpoint.export(runs / run.directory, directory)
    return directory


def with_minutes(known: Iterable[Mapping[str, Any]], timed: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows with the time axis: their step times the step time of their case, in minutes."""
    ms = {row["case"]: float(row["ms"]) for row in timed}
    sdpa = ms.get(SDPA, math.nan)
    found = []
    for row in known:
        step, time = int(row["step"]), ms.get(row["case"], math.nan)
        as_sdpa = sdpa if row["case"] == "dense" else math.nan
        minutes = {"minutes": step * time / 6e4, "minutes_sdpa": step * as_sdpa / 6e4}
        found.append({**row, **{name: None if math.isnan(x) else x for name, x in minutes.items()}})
    return found


def step_times(
    runs: Sequence[Run],
    corpus: Corpus,
    *,
    rounds: int,
    minutes: float,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Time a training step of every case, and of dense attention by torch SDPA, in turn."""
    first = {run.case: run for run in reversed(runs)}
    sdpa = dataclasses.replace(runs[0].config, attention="dense", options={})
    steps = {SDPA: Trainer(sdpa, corpus).step} | {
        case: run.trainer(corpus).step for case, run in first.items()
    }
    timings = interleave(steps, rounds=rounds, box=Box(minutes * 60), on_run=on_run)
    for case, timing in timings.items():
        yield {
            "bench": "long-run-step",
            "case": case,
            "T": sdpa.length,
            "tokens_per_step": sdpa.batch * sdpa.length,
            "layers": sdpa.layers,
            "width": sdpa.width,
            "heads": sdpa.heads,
            "dtype": sdpa.dtype,
            "ms": timing.median * 1e3,
            "speedup": timings[SDPA].median / timing.median,
            "rounds": len(timing.times),
        }
