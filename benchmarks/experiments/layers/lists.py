"""ListOps: MAX, MIN, MED (median) and SM (sum modulo 10) over digits, half of the lists with lists inside.

Lines of text with the answer behind them, which alone is learnt and judged. `accuracy` is that of all answers
and `nested` of those with a list in the list; `active` is the share of tokens that attend.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sparseflash.bench.results import Row
from sparseflash.train import Corpus, TrainConfig

from ..claim.rows import Job
from .language import CASES, Case, active, trainer_of
from .recall import counted

LENGTH = 2048
OWN = {"seqboat, few active": Case("seqboat", {"window": 256}, lean=-0.5)}
NAMES = ("dense", "window of 128", "seqboat", "seqboat, all active", *OWN, "look-ups", "convolution")
"""Cases of this task."""


class Answers(Corpus):
    """Text of which only what stands behind an equals sign is learnt."""

    def batch(self, seed: int, step: int, rows: slice, total: int, length: int) -> tuple[Tensor, Tensor]:
        """As of any corpus; other targets are -100, which no loss counts."""
        return self._asked(*super().batch(seed, step, rows, total, length))

    def validation(self, length: int, sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As of any corpus; other targets are -100."""
        for tokens, targets in super().validation(length, sequences):
            yield self._asked(tokens, targets)

    @staticmethod
    def _asked(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return tokens, targets.masked_fill(tokens != ord("="), -100)


def expression(drawn: random.Random, depth: int) -> tuple[str, int]:
    """A ListOps expression, and its value."""
    if depth == 0 or drawn.random() < 0.25:
        value = drawn.randrange(10)
        return str(value), value
    name = drawn.choice(("MAX", "MIN", "MED", "SM"))
    parts = [expression(drawn, depth - 1) for _ in range(drawn.randint(2, 4))]
    values = sorted(value for _, value in parts)
    found = {"MAX": values[-1], "MIN": values[0], "MED": values[len(values) // 2], "SM": sum(values) % 10}
    return f"[{name} {' '.join(text for text, _ in parts)}]", found[name]


def lists(count: int = 100_000, *, seed: int = 0) -> Answers:
    """Lines of ListOps with their answers."""
    drawn, lines = random.Random(seed), []
    while len(lines) < count:
        text, value = expression(drawn, drawn.choice((1, 2)))
        if len(text) > 1:
            lines.append(f"{text}={value}\n")
    return Answers(["".join(lines).encode()], "ListOps")


def jobs(corpus: Answers, *, cases: Sequence[str], seeds: Sequence[int], steps: int = 600) -> list[Job]:
    """A row for each case and seed."""
    keys = [
        {"bench": "layers-lists", "case": case, "seed": seed, "steps": steps, "T": LENGTH}
        for seed in seeds
        for case in cases
    ]
    return [Job(key, partial(_run, key, corpus)) for key in keys]


@torch.no_grad()
def _run(key: Row, corpus: Answers) -> Row:
    base = TrainConfig(
        data="", length=key["T"], batch=2, layers=2, width=128, heads=4, lr=4e-3, steps=key["steps"],
        seed=key["seed"], eval_sequences=16,
    )  # fmt: skip
    trainer = trainer_of((CASES | OWN)[key["case"]], corpus, base)
    with torch.enable_grad():
        for _ in range(base.steps):
            trainer.step()
    model, right, deep = trainer.model.eval(), [], []
    with counted() as found:
        for tokens, targets in corpus.validation(base.length, base.eval_sequences):
            asked = targets[0] != -100
            right.append((model(tokens)[0].argmax(-1) == targets[0])[asked])
            said = bytes(tokens[0].tolist()).decode()
            deep += [
                said[:at].rsplit("\n", 1)[-1].count("[") > 1 for at in asked.nonzero().flatten().tolist()
            ]
            count = tokens.numel()
    hit, nested = torch.cat(right).double(), torch.tensor(deep)
    row: Row = {"accuracy": float(hit.mean()), "answers": len(hit)}
    if nested.any():
        row["nested"] = float(hit[nested].mean())
    if found:
        row["pairs"] = sum(found) / count / base.eval_sequences
    return row | active(trainer)
