"""The board: every method on the same model, texts and tasks, at equal budgets, beside two controls.

It measures what a prefill method loses (phase `prompt`), what a cache method loses after a dense prefill
(`decode`), and which questions about a long document are still answered (`task`). A row is about one text or
document; `lines` averages the rows of a method and budget.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseflash import cache, methods
from sparseflash.bench import generate, tasks
from sparseflash.bench.prompts import Prompt, losses
from sparseflash.bench.results import Row
from sparseflash.cache import Held, Policy
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods.base import Method

BUDGETS = (2, 4, 8, 16)
"""At budget n, a method keeps about one in n of the pairs, or of the keys."""
CONTROLS = {"prompt": ("sink-window", "random"), "decode": ("streaming-llm", "random")}
"""Controls at every budget of a phase: first and last keys only, and first plus random keys."""
QUARTER = 4
"""An answer in the last of so many parts of a document is near its question; any other is far."""
NEW = 48
"""Number of tokens after a prompt whose probabilities are compared."""


@dataclass(frozen=True)
class Random(Policy):
    """Control policy: keeps random keys, drawn once per position and KV head."""

    def score(self, held: Held) -> Tensor:
        """A fixed random number for each position."""
        B, H, _ = held.position.shape
        draw = torch.rand(B, H, held.tokens, generator=torch.Generator().manual_seed(0))
        return draw.gather(2, held.position.clamp(min=0))


def window(tokens: int, budget: int) -> int:
    """Window size that keeps one in `budget` of the causal pairs of `tokens` tokens."""
    return max(16, round(tokens * (1 - math.sqrt(1 - 1 / budget))))


def prompts_of(tokens: int, budget: int) -> dict[str, Method]:
    """Prefill methods by name at a budget; methods that select by mass have one threshold per budget."""
    w = window(tokens, budget)
    block = 64 if w >= 512 else 32 if w >= 128 else 16
    blocks = max(3, round(w / block))
    step = BUDGETS.index(budget)

    def mass(*each: float) -> float:
        return each[step]

    return {
        "sink-window": methods.SinkWindow(window=w, sink_tokens=4),
        "random": methods.BigBird(
            block=block, global_blocks=1, window_blocks=1, random_blocks=blocks - 2, causal=True
        ),
        "tri-shape": methods.TriShape(sinks=min(128, w // 4), window=w - min(128, w // 4)),
        "dilated": methods.Dilated(window=w, dilation=2),
        "strided": methods.Strided(block=block, local=max(1, blocks // 2), stride=2 * budget),
        "bigbird": methods.BigBird(
            block=block,
            global_blocks=1,
            window_blocks=max(1, blocks // 3),
            random_blocks=max(1, blocks - 1 - max(1, blocks // 3)),
            causal=True,
        ),
        "moa": methods.MoA(alpha=0, beta=w / tokens, least=16),
        "star-attention": methods.StarAttention(
            block=max(64, tokens // (2 * budget)), anchor=max(16, tokens // (4 * budget))
        ),
        "hash-sparse": methods.HashSparse(nb=2 * budget, window=max(16, w // 2), sink_tokens=4),
        "hash-sparse-kmeans": methods.HashSparse(
            nb=2 * budget, window=max(16, w // 2), sink_tokens=4, buckets="kmeans"
        ),
        "qk-sparse": methods.QKSparse(q_drop=1 - budget**-0.5, k_drop=1 - budget**-0.5),
        "dynamic-mask": methods.DynamicMask(window=w),
        "block-topk": methods.BlockTopK(blocks=blocks, block=block),
        "xattention": methods.XAttention(threshold=mass(0.98, 0.92, 0.8, 0.6)),
        "flashprefill": methods.FlashPrefill(alpha=mass(0.2, 0.4, 0.7, 1.0), near=2, dense_tiles=1),
        "minference": methods.MInference(vertical=w // 2, slash=w // 2, near=30, last=96, share="sum"),
        "mtraining": methods.MTraining(vertical=w // 2, slash=w // 2, near=30, last=96),
        "flexprefill": methods.FlexPrefill(gamma=mass(0.95, 0.9, 0.8, 0.6), halo=True, min_budget=64),
        "pbs-attn": methods.PBSAttn(threshold=mass(0.9, 0.75, 0.6, 0.4)),
        "anchor-attention": methods.AnchorAttention(theta=mass(12.0, 8.0, 5.0, 3.0), step=4),
        "moba": methods.MoBA(budget=block * blocks, page=block),
        "dual-chunk-attention": methods.DualChunkAttention(context=max(64, tokens // budget)),
    }


def caches_of(tokens: int, budget: int) -> dict[str, Any]:
    """Cache methods and policies by name, each keeping `tokens / budget` of the prompt's keys."""
    n = max(16, tokens // budget)
    return {
        "streaming-llm": cache.StreamingLLM(budget=n),
        "random": Random(budget=n, sinks=4, recent=1),
        "snapkv": cache.SnapKV(budget=n),
        "pyramidkv": cache.PyramidKV(budget=n),
        "adakv": cache.AdaKV(budget=n),
        "threshold": cache.Threshold(budget=n),
        "h2o": cache.H2O(budget=n, recent=n // 2),
        "tova": cache.TOVA(budget=n),
        "knorm": cache.KNorm(budget=n, recent=n // 2, sinks=4),
        "expected-attention": cache.ExpectedAttention(budget=n),
        "quest": methods.Quest(budget=n),
        "lserve": methods.LServe(budget=n),
        "squeezed-attention": methods.SqueezedAttention(context=tokens, budget=n, window=min(100, n // 2)),
        "mustafar": cache.Mustafar(1 - 1 / budget),
    }


@dataclass
class Board:
    """A board to measure: one model, its texts, and the methods, budgets and tasks.

    Parameters
    ----------
    name : str
        Name of the model in the rows.
    model, tokenizer
        Model and tokenizer of Transformers.
    texts : mapping
        Texts by name.
    tokens : sequence of int
        Lengths of prompts.
    budgets : sequence of int
        Budgets, from `BUDGETS`.
    wanted : sequence of str
        Methods; empty: all. Controls are always included.
    asked : sequence of str
        Kinds of tasks, from `tasks.KINDS`, measured at one budget.
    at : int
        Budget of the tasks.
    minutes : float
        Time box: no measurement starts after it. 0: none.
    skip : int
        Number of characters that were taken off the front of each text, for the rows.
    """

    name: str
    model: Any
    tokenizer: Any
    texts: Mapping[str, str]
    tokens: Sequence[int] = (4096,)
    budgets: Sequence[int] = BUDGETS
    wanted: Sequence[str] = ()
    asked: Sequence[str] = ()
    at: int = 8
    minutes: float = 0.0
    skip: int = 0

    def __post_init__(self) -> None:
        if bad := [x for x in self.budgets if x not in BUDGETS]:
            raise SparseFlashError(f"budgets {bad}: expected some of {', '.join(map(str, BUDGETS))}")
        known = {*prompts_of(1024, 8), *caches_of(1024, 8)}
        if bad := [x for x in self.wanted if x not in known]:
            raise SparseFlashError(f"no such methods: {', '.join(bad)}; there are {', '.join(sorted(known))}")
        if bad := [x for x in self.asked if x not in tasks.KINDS]:
            raise SparseFlashError(f"no such tasks: {', '.join(bad)}; there are {', '.join(tasks.KINDS)}")

    def measure(
        self,
        known: Iterable[Mapping[str, Any]] = (),
        on_run: Callable[[str], None] = lambda text: None,
    ) -> Iterator[Row]:
        """Yield rows that are not in `known`: prompts, then caches, then tasks, each by length."""
        there = {key(row) for row in known}
        ends = time.monotonic() + 60 * self.minutes if self.minutes else math.inf
        parts = (self._prompts, self._caches, self._tasks)
        for part, tokens in itertools.product(parts, self.tokens):
            for row in part(tokens, there, ends, on_run):
                yield row | {"bench": "board", "model": self.name, "tokens": tokens, "skip": self.skip}

    def _cases(self, phase: str, tokens: int, budget: int) -> dict[str, Any]:
        made = prompts_of(tokens, budget) if phase != "decode" else caches_of(tokens, budget)
        control = CONTROLS.get(phase, CONTROLS["prompt"])
        return {x: y for x, y in made.items() if not self.wanted or x in self.wanted or x in control}

    def _texts(
        self, phase: str, tokens: int, there: set[Any], ends: float
    ) -> Iterator[tuple[str, Prompt, dict[tuple[str, int], Any]]]:
        """Each text with its unmeasured cases of a phase, by budget, so that a short run has all methods."""
        for text, words in self.texts.items():
            at = {"phase": phase, "model": self.name, "tokens": tokens, "text": text, "skip": self.skip}
            left = {
                (name, budget): made
                for budget in self.budgets
                for name, made in self._cases(phase, tokens, budget).items()
                if key(at | {"case": name, "budget": budget}) not in there
            }
            if left and time.monotonic() < ends:
                yield text, Prompt.of(self.model, self.tokenizer, words, tokens, NEW), left

    def _prompts(
        self, tokens: int, there: set[Any], ends: float, on_run: Callable[[str], None]
    ) -> Iterator[Row]:
        for text, prompt, left in self._texts("prompt", tokens, there, ends):
            cases = {f"{name}, 1/{budget}": made for (name, budget), made in left.items()}

            def said(what: str, at: str = f"{text}, {tokens} tokens: ") -> None:
                on_run(at + what)

            for row in losses(prompt, cases, on_run=said):
                if row["case"] == "dense":
                    row |= {"phase": "prompt", "text": text, "budget": 1}
                    if key(row | {"model": self.name, "skip": self.skip}) not in there:
                        yield row
                    continue
                name, _, part = row["case"].rpartition(", 1/")
                yield row | {"case": name, "phase": "prompt", "text": text, "budget": int(part)}
                if time.monotonic() > ends:
                    return

    @torch.no_grad()
    def _caches(
        self, tokens: int, there: set[Any], ends: float, on_run: Callable[[str], None]
    ) -> Iterator[Row]:
        import sparseflash as sf

        for text, whole_text, left in self._texts("decode", tokens, there, ends):
            prompt, told = whole_text.ids[:, :tokens], whole_text.ids[:, tokens:]
            on_run(f"{text}, {tokens} tokens: a dense cache")
            dense, first = generate.begun(self.model, prompt, lambda: sf.transformers.sparse(self.model))
            whole = sum(size for _, size in generate.layers(dense))
            with sf.transformers.sparse(self.model):
                _, logs, spent = generate.gone_on(self.model, copy.deepcopy(dense), first, NEW, told)
            for (name, budget), made in left.items():
                if time.monotonic() > ends:
                    return
                on_run(f"{text}, {tokens} tokens: {name}, 1/{budget}, token by token")
                given = {"decode" if isinstance(made, Method) else "cache": made}
                enter = functools.partial(sf.transformers.sparse, self.model, **given)
                reads = isinstance(made, Method)
                own = copy.deepcopy(dense) if reads else generate.begun(self.model, prompt, enter)[0]
                with enter():
                    _, said, seconds = generate.gone_on(self.model, own, first, NEW, told)
                row: Row = {"phase": "decode", "text": text, "case": name, "budget": budget}
                row |= {"kept": 1 / budget, "bytes": sum(size for _, size in generate.layers(own)) / whole}
                row["kl"] = float((logs.exp() * (logs - said)).sum(-1).mean())
                row["agree"] = float((logs.argmax(-1) == said.argmax(-1)).double().mean())
                row |= {"gain": spent / seconds, "method": repr(made), "new": NEW}
                yield row

    def _tasks(
        self, tokens: int, there: set[Any], ends: float, on_run: Callable[[str], None]
    ) -> Iterator[Row]:
        import sparseflash as sf

        [words, *_] = self.texts.values()
        cases: dict[str, Any] = {"dense": None} | self._cases("task", tokens, self.at)
        for name, kind in itertools.product(cases, self.asked):
            budget = 1 if name == "dense" else self.at
            row: Row = {"phase": "task", "text": kind, "case": name, "budget": budget}
            at = {"model": self.name, "tokens": tokens, "skip": self.skip}
            if key(row | at) in there or time.monotonic() > ends:
                continue
            on_run(f"{tokens} tokens with {kind}: {name}")
            given = tasks.document(kind, self.tokenizer, words, tokens)
            under = functools.partial(sf.transformers.sparse, self.model, prefill=cases[name])
            found = tasks.score(self.model, given, under)
            row |= {"right": found.right, "questions": found.questions, "margin": found.margin}
            last = tokens - tokens // QUARTER
            for name, own in (
                ("right_near", [x for x, at in zip(found.each, given.places) if at >= last]),
                ("right_far", [x for x, at in zip(found.each, given.places) if 0 <= at < last]),
            ):
                row[name] = _mean(own) if own else None
            yield row


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Identity of a row, equal for a measured row and one read from a file."""
    names = ("phase", "model", "tokens", "text", "case", "budget")
    return (*(str(row[x]) for x in names), str(row.get("skip") or 0))


@dataclass(frozen=True)
class Line:
    """A method at a budget, averaged over the texts.

    `beats`: whether its KL is below both controls' at an equal share of pairs or keys; None if a control is
    missing, or the method keeps everything.
    """

    phase: str
    model: str
    tokens: int
    case: str
    budget: int
    texts: int
    figures: Mapping[str, float]
    beats: bool | None
    method: str


FIGURES = ("kept", "recall", "recall_worst", "loss", "kl", "attention_gain", "bytes", "agree", "gain")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Average the rows of each method and budget, and compare with the controls."""
    groups: dict[tuple[str, str, int, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["phase"] != "task":
            at = (row["phase"], row["model"], int(row["tokens"]), row["case"], int(row["budget"]))
            groups.setdefault(at, []).append(row)
    means = {
        at: {
            x: _mean([float(row[x]) for row in own])
            for x in FIGURES
            if all(row.get(x) not in ("", None) for row in own)
        }
        for at, own in groups.items()
    }
    made = []
    for at, own in groups.items():
        phase, model, tokens, case, _ = at
        bounds = [
            _between(
                [(means[x]["kept"], means[x]["kl"]) for x in means if x[:3] == at[:3] and x[3] == control],
                means[at]["kept"],
            )
            for control in CONTROLS[phase]
        ]
        beats = None
        some = means[at]["kept"] < 0.999 and case not in CONTROLS[phase]
        if some and None not in bounds:
            beats = all(means[at]["kl"] < bound for bound in bounds if bound is not None)
        method = str(own[0].get("method") or "")
        made.append(Line(*at, len(own), means[at], beats, method))
    return made


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _between(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Interpolate a control's KL at the share `at`, log-linearly between its budgets."""
    points = sorted(points)
    if not points:
        return None
    if at >= points[-1][0]:
        # beyond the control's largest budget: interpolate towards KL 0 at all pairs
        points = [*points, (1.0, 0.0)]
    if at <= points[0][0]:
        return points[0][1]
    (a, low), (b, high) = next(
        (p, q) for p, q in itertools.pairwise(points) if p[0] <= at <= q[0] and p[0] < q[0]
    )
    share = (math.log(at) - math.log(a)) / (math.log(b) - math.log(a))
    if low <= 0 or high <= 0:
        return low + (high - low) * share
    return math.exp(math.log(low) + (math.log(high) - math.log(low)) * share)


def agreement(rows: Sequence[Mapping[str, Any]], phase: str, model: str, tokens: int) -> float | None:
    """Spearman correlation of the methods' KL order on the first two texts; None if there are fewer."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        if (row["phase"], row["model"], int(row["tokens"])) == (phase, model, tokens) and row[
            "case"
        ] != "dense":
            found.setdefault(row["text"], {})[row["case"], str(row["budget"])] = float(row["kl"])
    if len(found) < 2:
        return None
    one, two = list(found.values())[:2]
    both = [at for at in one if at in two]
    if len(both) < 3:
        return None
    ranks = torch.tensor([[own[at] for at in both] for own in (one, two)]).argsort(-1).argsort(-1).double()
    return float(torch.corrcoef(ranks)[0, 1])


CLEARLY = 0.15
"""Margin by which dense attention must outscore random selection for a kind of question to count."""


def tells(right: Mapping[tuple[str, str], float], kind: str) -> bool:
    """Whether a kind of question separates methods: dense attention scores clearly above random keys."""
    dense, random = right.get(("dense", kind)), right.get(("random", kind))
    return dense is not None and random is not None and dense >= random + CLEARLY
