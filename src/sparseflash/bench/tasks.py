"""Long documents with planted facts and questions: what a model still finds when it reads sparsely.

Questions are answered by likelihood, the right answer against wrong ones from the same document: feasible for
a small model, while guessing from the words it has seen does not help. A document is read once; all questions
continue from the same cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseflash.common.errors import SparseFlashError

QUESTIONS = 16
"""Questions per document."""
CHOICES = 4
"""Answers per question, the first of which is right."""
PLACES = (
    "Lisbon", "Oslo", "Cairo", "Quito", "Delhi", "Lagos", "Paris", "Seoul", "Lima", "Rome", "Accra",
    "Hanoi", "Dublin", "Prague", "Tunis", "Vienna", "Athens", "Havana", "Manila", "Nairobi",
    "Berlin", "Kyiv", "Riga", "Sofia", "Tokyo", "Warsaw", "Zagreb", "Boston", "Denver", "Geneva",
    "Munich", "Naples",
)  # fmt: skip
THINGS = (
    "apple", "river", "candle", "window", "garden", "pencil", "bridge", "mirror", "basket",
    "hammer", "carpet", "ladder", "needle", "pepper", "rocket", "saddle", "ticket", "velvet",
    "wallet", "anchor", "button", "copper", "dragon", "engine", "feather", "glacier", "harbor",
    "island", "jacket", "kettle", "lantern", "marble",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """The end of a question, directly before the answer; and answers, of which the first is right."""

    ask: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Planted:
    """Lines to plant into a document, in order, and questions about them.

    `filler`: text between the lines; None: the document's own text.
    """

    lines: tuple[str, ...]
    questions: tuple[Question, ...]
    filler: str | None = None


def _numbers(draw: random.Random, n: int) -> list[str]:
    return [str(x) for x in draw.sample(range(10_000, 100_000), n)]


def _among(draw: random.Random, right: str, others: Sequence[str]) -> tuple[str, ...]:
    """The right answer and some different ones."""
    return (right, *draw.sample(sorted({x for x in others if x != right}), CHOICES - 1))


def _single(draw: random.Random) -> Planted:
    """A single fact: one number, and three others elsewhere in the text."""
    names, numbers = draw.sample(PLACES, CHOICES), _numbers(draw, CHOICES)
    lines = tuple(f"The secret number of {a} is {b}." for a, b in zip(names, numbers))
    ask = [Question(f"The secret number of {a} is", _among(draw, b, numbers)) for a, b in zip(names, numbers)]
    return Planted(lines, tuple(ask))


def _keys(draw: random.Random) -> Planted:
    """One of many numbers, by its name."""
    names, numbers = draw.sample(PLACES, len(PLACES)), _numbers(draw, len(PLACES))
    lines = tuple(f"The secret number of {a} is {b}." for a, b in zip(names, numbers))
    ask = [
        Question(f"The secret number of {a} is", _among(draw, b, numbers))
        for a, b in list(zip(names, numbers))[:QUESTIONS]
    ]
    return Planted(lines, tuple(ask))


def _values(draw: random.Random) -> Planted:
    """The second of two numbers of one name, far apart."""
    names, numbers = draw.sample(PLACES, QUESTIONS), _numbers(draw, 2 * QUESTIONS)
    pairs = [(names[n % QUESTIONS], x) for n, x in enumerate(numbers)]
    lines = tuple(f"A secret number of {a} is {b}." for a, b in pairs)
    ask = [
        Question(
            f"Two secret numbers of {a} are {numbers[n]} and",
            _among(draw, numbers[n + QUESTIONS], [x for x in numbers if x != numbers[n]]),
        )
        for n, a in enumerate(names)
    ]
    return Planted(lines, tuple(ask))


def _queries(draw: random.Random) -> Planted:
    """Two numbers at once, the second following the first."""
    names, numbers = draw.sample(PLACES, QUESTIONS), _numbers(draw, QUESTIONS)
    lines = tuple(f"The secret number of {a} is {b}." for a, b in zip(names, numbers))
    ask = []
    for n, a in enumerate(names):
        other = (n + QUESTIONS // 2) % QUESTIONS
        ask.append(
            Question(
                f"The secret numbers of {names[other]} and {a} are {numbers[other]} and",
                _among(draw, numbers[n], [x for x in numbers if x != numbers[other]]),
            )
        )
    return Planted(lines, tuple(ask))


def _variables(draw: random.Random) -> Planted:
    """A value through a chain of two assignments."""
    letters, numbers = draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 8), _numbers(draw, 8)
    chains = [
        (f"Let {a}1 = {b}.", f"Let {a}2 = {a}1, which is {a}2 = {b}.") for a, b in zip(letters, numbers)
    ]
    lines = tuple(line for part in zip(*chains) for line in part)
    ask = [
        Question(f"So the value of {a}{n} is {a}{n} =", _among(draw, b, numbers))
        for n in (1, 2)
        for a, b in zip(letters, numbers)
    ]
    return Planted(lines, tuple(ask))


def _words(draw: random.Random) -> Planted:
    """The frequent words of a list, in which nine words of ten are common ones."""
    common, rare = draw.sample(THINGS, 8), [x.lower() for x in draw.sample(PLACES, 8)]
    listed = [draw.choice(common) if draw.random() < 0.9 else draw.choice(rare) for _ in range(20_000)]
    ask = [
        Question(
            "The list above repeats one word many times, namely the word",
            (a, *draw.sample(rare, CHOICES - 1)),
        )
        for a in (common * 2)[:QUESTIONS]
    ]
    return Planted((), tuple(ask), ", ".join(listed))


def _code(draw: random.Random) -> Planted:
    """The return value of a function."""
    names = [f"{a}_{b}" for a, b in zip(draw.sample(THINGS, QUESTIONS), draw.sample(THINGS, QUESTIONS))]
    numbers = _numbers(draw, QUESTIONS)
    lines = tuple(f"\ndef {a}():\n    return {b}\n" for a, b in zip(names, numbers))
    ask = [Question(f"\nassert {a}() ==", _among(draw, b, numbers)) for a, b in zip(names, numbers)]
    return Planted(lines, tuple(ask))


def _table(draw: random.Random) -> Planted:
    """The last cell of a table row."""
    names, things = draw.sample(PLACES, QUESTIONS), draw.sample(THINGS, QUESTIONS)
    numbers = _numbers(draw, QUESTIONS)
    lines = tuple(f"\n| {a} | {t} | {b} |\n" for a, t, b in zip(names, things, numbers))
    ask = [Question(f"\n| {a} | {t} |", _among(draw, b, numbers)) for a, t, b in zip(names, things, numbers)]
    return Planted(lines, tuple(ask))


KINDS: dict[str, Callable[[random.Random], Planted]] = {
    "single": _single,
    "keys": _keys,
    "values": _values,
    "queries": _queries,
    "variables": _variables,
    "words": _words,
    "code": _code,
    "table": _table,
}
"""Kinds of documents, modelled on RULER (arXiv 2404.06654), for a small model that answers by likelihood."""


@dataclass(frozen=True)
class Document:
    """A document's kind, tokens `ids [1, T]`, and tokenised questions.

    Each question is `(ask [1, n], answers)`; of the answers, [1, n] each, the first is right. `places`: first
    token of the last line that holds the right answer, for each question; -1 if none does.
    """

    kind: str
    ids: Tensor
    questions: tuple[tuple[Tensor, tuple[Tensor, ...]], ...]
    places: tuple[int, ...]


def document(kind: str, tokenizer: Any, text: str, tokens: int, *, seed: int = 0) -> Document:
    """Make a document of `tokens` tokens, with a kind's lines planted at random positions.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    tokenizer : callable
        Tokenizer of Transformers.
    text : str
        Text between the planted lines; ignored by "words", which fills the document with its list.
    tokens : int
        Length of the document, without questions.
    seed : int
        Seed of names, numbers and positions.

    Raises
    ------
    SparseFlashError
        For an unknown kind, or if the text or `tokens` is too short for the planted lines.

    Examples
    --------
    >>> from sparseflash.bench import tasks
    >>> sorted(tasks.KINDS)
    ['code', 'keys', 'queries', 'single', 'table', 'values', 'variables', 'words']
    """
    if kind not in KINDS:
        raise SparseFlashError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    draw = random.Random(f"{kind} {seed}")
    planted = KINDS[kind](draw)

    def read(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False).input_ids)

    lines = [read(f" {line}" if line[0] != "\n" else line) for line in planted.lines]
    rest = tokens - sum(map(len, lines))
    filler = read(text if planted.filler is None else planted.filler)
    if rest < tokens // 2 or len(filler) < rest:
        raise SparseFlashError(
            f"{kind}: {tokens} tokens, {tokens - rest} of them planted in a text of {len(filler)}: expected "
            "a longer text, and at most half of the tokens planted; ask for more, or give a longer text"
        )
    # not in the last eighth, which every window covers
    cuts = sorted(draw.sample(range(rest * 7 // 8), len(lines)))
    ids, before, begins = [], 0, []
    for at, line in zip(cuts, lines):
        ids += filler[before:at]
        begins.append(len(ids))
        ids += line
        before = at
    ids += filler[before:rest]
    questions = [
        (
            torch.tensor([read(f"\n\n{one.ask}" if one.ask[0] != "\n" else one.ask)]),
            tuple(torch.tensor([read(f" {answer}")]) for answer in one.answers),
        )
        for one in planted.questions
    ]
    places = [
        max((at for at, line in zip(begins, planted.lines) if one.answers[0] in line), default=-1)
        for one in planted.questions
    ]
    return Document(kind, torch.tensor([ids]), tuple(questions), tuple(places))


@dataclass(frozen=True)
class Score:
    """Result of a document: share of questions whose right answer is likeliest, their number, and margin.

    `margin`: mean difference in nats between the right answer and the best wrong one. `each`: whether the
    right answer is likeliest, for each question.
    """

    right: float
    questions: int
    margin: float
    each: tuple[bool, ...]


@torch.no_grad()
def score(model: Any, given: Document, prefill: Callable[[], AbstractContextManager[Any]]) -> Score:
    """Read a document once under `prefill()`, then score questions and answers densely.

    The cache is cropped after every answer, so that questions do not see each other.
    """
    from sparseflash.integrations.transformers import sparse

    with prefill():
        cache = model.base_model(given.ids, use_cache=True).past_key_values
    T, margins = given.ids.shape[1], []
    with sparse(model):
        for ask, answers in given.questions:
            last = model(ask, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            found = []
            for answer in answers:
                logits = last[None]
                if answer.shape[1] > 1:
                    more = model(answer[:, :-1], past_key_values=cache).logits[0]
                    logits = torch.cat([logits, more])
                    cache.crop(T + ask.shape[1])
                logs = logits.float().log_softmax(-1)
                found.append(float(logs.gather(1, answer.T).sum()))
            cache.crop(T)
            margins.append(found[0] - max(found[1:]))
    right = tuple(margin > 0 for margin in margins)
    return Score(sum(right) / len(right), len(right), sum(margins) / len(margins), right)
