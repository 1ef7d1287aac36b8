"""Recall that has to be far: associative recall (`mqar`) over 4,096 tokens, no question near its answer.

A row lists its pairs, then comes filling that no pair consists of, and then questions among more filling: the
nearest is so many tokens behind the last pair that no window of the test reaches back. A key is asked for
several times; nothing after a question gives its answer away.

The model has no positions, and learns on short rows first (`STAGES`), which a window solves too: at once,
4,096 tokens teach no attention anything for hundreds of steps. What is judged is the last stage alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.bench.quality import density
from sparseflash.bench.results import Row
from sparseflash.methods import HashSparse, Window
from sparseflash.methods.base import Method
from sparseflash.train.attention import Sparse
from sparseflash.train.model import norm

from .. import mqar
from .controls import Chance
from .rows import Job

ENOUGH, SOLVED = 0.95, 0.99
EVERY = 10
"""Steps between two judgements."""
CONTENDERS: dict[str, Method] = {
    "dense": Window(window=2**30),
    "window 512": Window(window=512),
    "window 128 + random buckets": Chance(nb=16, window=128),
    "window 128 + hash": HashSparse(nb=16, window=128),
    "window 128 + k-means": HashSparse(nb=16, window=128, buckets="kmeans"),
}
MUST_SOLVE = ("dense", "window 128 + hash", "window 128 + k-means")


@dataclass(frozen=True)
class FarTask(mqar.Task):
    """The rows.

    Parameters
    ----------
    vocabulary : int
        Of keys, values and filling together.
    length, pairs : int
        As for `mqar.Task`.
    filling : int
        Tokens that are neither keys nor values, the last ones of the vocabulary.
    gap : int
        Tokens between the last pair and the first question, at least.
    questions : int
        Of a row.
    """

    vocabulary: int = 320
    length: int = 4096
    pairs: int = 64
    filling: int = 64
    gap: int = 1024
    questions: int = 512

    def __post_init__(self) -> None:
        room = (self.length - 2 * self.pairs - self.gap) // 2
        if not 0 < self.questions <= room or self.pairs >= self.words // 2:
            raise ValueError(
                f"pairs={self.pairs}, questions={self.questions}: expected fewer pairs than keys and at most "
                f"{room} questions behind them"
            )

    @property
    def words(self) -> int:
        """Keys and values."""
        return self.vocabulary - self.filling

    def _lay_out(self, pairs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, begin = len(pairs), 2 * self.pairs
        tokens = torch.randint(self.words, self.vocabulary, (count, self.length), generator=generator)
        tokens[:, :begin] = pairs.mT.flatten(1)
        slots = (self.length - begin - self.gap) // 2
        at = torch.rand(count, slots, generator=generator).topk(self.questions).indices * 2 + begin + self.gap
        which = torch.randint(self.pairs, (count, self.questions), generator=generator)
        asked, answers = (pairs[:, n].gather(1, which) for n in (0, 1))
        tokens.scatter_(1, at, asked)
        return tokens, torch.full_like(tokens, mqar.IGNORED).scatter_(1, at, answers)


STAGES = (
    (FarTask(vocabulary=272, filling=16, length=128, pairs=8, gap=0, questions=32), 64),
    (FarTask(vocabulary=272, filling=16, length=256, pairs=16, gap=0, questions=64), 32),
    (FarTask(vocabulary=272, filling=16, length=512, pairs=64, gap=0, questions=128), 16),
    (FarTask(vocabulary=272, filling=16, length=1024, pairs=64, gap=256, questions=256), 8),
    (FarTask(vocabulary=272, filling=16), 4),
)
"""Tasks and rows a step; each of the first until 95 % of a few steps' questions are answered."""


def learn(
    method: Method,
    *,
    stages: Sequence[tuple[FarTask, int]] = STAGES,
    most: int = 400,
    last: int = 150,
    rate: float = 1e-2,
    width: int = 64,
    heads: int = 8,
    held: int = 16,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda text: None,
) -> Row:
    """Train through the stages, at most so many steps each, with a rate that falls in the last one.

    Returns
    -------
    dict
        `steps` of all stages, `steps_last` of the last; there `accuracy` on unseen rows, `steps_95` and
        `minutes_95` until 95 % of these are answered, if they are, and `density`.
    """
    torch.manual_seed(seed)
    context = {"step": 0}
    model = mqar.Model(stages[-1][0], Sparse(method, context), width=width, heads=heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    test = stages[-1][0].rows(held, torch.Generator().manual_seed(seed + 1), test=True)
    row: Row = {"steps_95": None, "minutes_95": None}

    def step(task: FarTask, batch: int, share: float = 1.0) -> float:
        context["step"] += 1
        on_step(f"step {context['step']}, {task.length} tokens, {task.pairs} pairs")
        for group in optimizer.param_groups:
            group["lr"] = rate * share * min(1.0, context["step"] / 20)
        tokens, labels = task.rows(batch, generator)
        said, wanted = model(tokens)[labels != mqar.IGNORED], labels[labels != mqar.IGNORED]
        F.cross_entropy(said, wanted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float((said.argmax(-1) == wanted).float().mean())

    for task, batch in stages[:-1]:
        right: list[float] = []
        while len(right) < most and (len(right) < 3 or min(right[-3:]) < ENOUGH):
            right.append(step(task, batch))
    before, start, judging = context["step"], time.perf_counter(), 0.0
    for n in range(1, last + 1):
        step(*stages[-1], share=1.05 - n / last)
        if n % EVERY == 0 or n == last:
            now = time.perf_counter()
            row["accuracy"] = mqar.accuracy(model, *test, rows=4)
            judging += time.perf_counter() - now
            if row["accuracy"] >= ENOUGH and row["steps_95"] is None:
                row |= {"steps_95": n, "minutes_95": (time.perf_counter() - start - judging) / 60}
            if row["accuracy"] >= SOLVED:
                break
    row |= {"steps": context["step"], "steps_last": context["step"] - before}
    return row | {"density": _density(model, method, test[0][:1])}


@torch.no_grad()
def _density(model: mqar.Model, method: Method, tokens: Tensor) -> float:
    layer = model.layers[1]
    assert isinstance(layer, mqar.Attend)
    x = norm(model.layers[0](model.embed(tokens)))
    q, k, _ = layer.project(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    return density(method.select(q, k).plan)


def jobs(
    *,
    cases: Sequence[str] = tuple(CONTENDERS),
    seeds: Sequence[int] = (0,),
    on_step: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[Job]:
    """A row for every contender and seed."""
    task = STAGES[-1][0]
    same: Row = {"bench": "claim-mqar", "T": task.length, "pairs": task.pairs, "gap": task.gap}
    return [
        Job(
            same | {"case": case, "seed": seed},
            functools.partial(learn, CONTENDERS[case], seed=seed, on_step=on_step, **options),
        )
        for seed in seeds
        for case in cases
    ]


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each row that is not as it has to be: who must look up and cannot, and the reverse."""
    said = []
    for row in rows:
        found, must = float(row["accuracy"]), row["case"] in MUST_SOLVE
        if must != (found >= SOLVED) and (must or found >= ENOUGH):
            said.append(f"{row['case']}, seed {row['seed']}: {found:.1%} of the questions, unlike expected")
    return said
