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
from sparseflash.train import Corpus

from ..claim.rows import Job
from .language import CASES, Case, config, looked, trainer_of

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


def _run(key: Row, corpus: Answers) -> Row:
    trainer = trainer_of((CASES | OWN)[key["case"]], corpus, config(key))
    for _ in range(key["steps"]):
        trainer.step()
    right: list[Tensor] = []
    deep: list[bool] = []

    def note(tokens: Tensor, targets: Tensor, logits: Tensor) -> None:
        asked = targets != -100
        right.append((logits.argmax(-1) == targets)[asked])
        said = bytes(tokens.tolist()).decode()
        lines = (said[:at].rsplit("\n", 1)[-1] for at in asked.nonzero().flatten().tolist())
        deep.extend(line.count("[") > 1 for line in lines)

    spent = looked(trainer, note)
    hit, nested = torch.cat(right).double(), torch.tensor(deep)
    row: Row = {"accuracy": float(hit.mean()), "answers": len(hit), "nested": float(hit[nested].mean())}
    return row | spent
