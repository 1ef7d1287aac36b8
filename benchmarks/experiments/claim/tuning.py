"""The pretrained model after some steps of training with the attention that it is judged by.

All weights move, queries and keys too, so that a selection may become what it could not be on weights that
were trained without it. Contenders see the same sequences in the same order, dense does too. The rate is
constant after its warm-up, so that fewer steps are the beginning of more.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.common.files import replacing

from . import texts
from .rows import Job
from .smollm import CHUNK, Subject, contenders, exchanged, in_turn, losses

RATE, WARM, SAVE = 5e-5, 5, 10
"""Of AdamW, its steps of warm-up, and the steps between two checkpoints."""


class Tuning:
    """A model in fp32 with its optimiser; what it has learned is kept in a file."""

    def __init__(
        self,
        subject: Subject,
        case: str,
        seed: int,
        T: int,
        learn: Mapping[str, Mapping[str, str]],
        file: Path,
    ) -> None:
        self.subject = subject
        self.method, self.T, self.file, self.done = contenders(T, seed)[case], T, file, 0
        self.texts = [learn[kind][name] for kind, name in in_turn(learn)]
        self.generator = torch.Generator().manual_seed(seed)
        rates = {"lr": RATE, "betas": (0.9, 0.95), "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(self.subject.model.parameters(), **rates)
        if file.is_file():
            held = torch.load(file, weights_only=True)
            self.subject.model.load_state_dict(held["model"])
            self.optimizer.load_state_dict(held["optimizer"])
            self.generator.set_state(held["generator"])
            self.done = held["done"]

    def save(self) -> None:
        """Keep everything; the file is whole at every moment."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.subject.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replacing(self.file) as temporary:
            torch.save(state | {"generator": self.generator.get_state(), "done": self.done}, temporary)

    def to(self, steps: int, on_step: Callable[[str], None]) -> None:
        """Train until so many steps are done."""
        while self.done < steps:
            on_step(f"step {self.done + 1} of {steps}")
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (self.done + 1) / WARM)
            text = self.texts[self.done % len(self.texts)]
            begin = float(torch.rand((), generator=self.generator))
            reach = max(0.0, 1 - 8 * self.T / len(text))  # so that enough is left behind it
            self.loss(self.subject.tokens(text, begin * reach, self.T)).backward()
            torch.nn.utils.clip_grad_norm_(self.subject.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.done += 1
            if self.done % SAVE == 0 or self.done == steps:
                self.save()

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean nats of the next token, the logits of a few held at a time."""
        model = self.subject.model

        def some(hidden: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(model.lm_head(hidden).float(), wanted, reduction="sum")

        with exchanged(model, self.method), torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(tokens, use_cache=False).last_hidden_state[0, :-1]
            parts = zip(hidden.split(CHUNK), tokens[0, 1:].split(CHUNK), strict=True)
            sums = [checkpoint(some, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum() / len(hidden)

    def judge(self, tokens: Tensor) -> Tensor:
        """Nats of each next token."""
        with torch.autocast("cpu", torch.bfloat16):
            return losses(self.subject.model, self.subject.hidden(tokens, self.method), tokens)


def smollm_in_fp32() -> Subject:
    """The model to train."""
    return Subject.load(dtype=torch.float32)


def jobs(
    learn: Mapping[str, Mapping[str, str]],
    held: Mapping[str, Mapping[str, str]],
    *,
    runs: Path,
    T: int,
    steps: Sequence[int],
    cases: Sequence[str],
    seeds: Sequence[int] = (0,),
    begin: float = 0.3,
    load: Callable[[], Subject] = smollm_in_fp32,
    on_step: Callable[[str], None] = lambda text: None,
) -> list[Job]:
    """A row for every text that is held out, contender, seed and number of steps."""

    @functools.lru_cache(maxsize=1)
    def tuning(case: str, seed: int) -> Tuning:
        name = re.sub(r"[^a-z0-9]+", "-", f"{case} {T} seed {seed}".lower())
        return Tuning(load(), case, seed, T, learn, runs / f"{name}.pt")

    def run(kind: str, name: str, case: str, seed: int, wanted: int) -> Row:
        own = tuning(case, seed)
        if own.done > wanted:
            raise sf.SparseFlashError(f"{own.file} is at step {own.done}, beyond {wanted}: remove it")
        own.to(wanted, lambda text: on_step(f"{case}, seed {seed}, {text}"))
        tokens = own.subject.tokens(held[kind][name], begin, T)
        loss, far = own.judge(tokens), texts.far(tokens[0])
        return {
            "tokens": len(loss), "far_tokens": int(far.sum()), "lr": RATE,
            "loss": float(loss.mean()), "loss_far": float(loss[far].mean()),
        }  # fmt: skip

    found = []
    for seed, case, wanted, (kind, name) in itertools.product(seeds, cases, steps, in_turn(held)):
        key: Row = {"bench": "claim-smollm", "text": kind, "name": name, "T": T, "steps": wanted}
        found.append(
            Job(key | {"case": case, "seed": seed}, functools.partial(run, kind, name, case, seed, wanted))
        )
    return found


def apart(
    documents: Mapping[str, Mapping[str, str]], count: int
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """The first texts of each kind, to be judged on, and the others, to learn from."""
    named: dict[str, list[tuple[str, Any]]] = {kind: list(x.items()) for kind, x in documents.items()}
    held = {kind: dict(x[:count]) for kind, x in named.items()}
    return held, {kind: dict(x[count:]) for kind, x in named.items()}
