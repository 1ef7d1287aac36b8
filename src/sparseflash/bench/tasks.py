"""Long documents with questions whose answers stand in them: what a model still finds when it reads sparsely.

Every question is answered by likelihood, the right answer against wrong ones that stand in the same document,
so that a small model can do it, and guessing among what it has seen cannot. A document is read once; all of
its questions continue the same cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseflash.errors import SparseFlashError

QUESTIONS = 16
"""Of each document."""
CHOICES = 4
"""Answers that a question may have, one of them right."""
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
    """How a question ends, right before its answer; and answers, of which the first is right."""

    ask: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Planted:
    """Lines that go into a document, in their order, and questions about them.

    `filler`: what stands between the lines; None: the text that the document is made of.
    """

    lines: tuple[str, ...]
    questions: tuple[Question, ...]
    filler: str | None = None


def _numbers(draw: random.Random, n: int) -> list[str]:
    return [str(x) for x in draw.sample(range(10_000, 100_000), n)]


def _among(draw: random.Random, right: str, others: Sequence[str]) -> tuple[str, ...]:
    """The right answer and some others that are not the same."""
    return (right, *draw.sample(sorted({x for x in others if x != right}), CHOICES - 1))


def _single(draw: random.Random) -> Planted:
    """A number that stands alone in the text, among three that stand elsewhere."""
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
    """The second of two numbers of one name, which stand far apart."""
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
    """Two numbers at once, the second after the first."""
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
    """Which word of a list comes often: nine words in ten are common ones."""
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
    """What a function returns."""
    names = [f"{a}_{b}" for a, b in zip(draw.sample(THINGS, QUESTIONS), draw.sample(THINGS, QUESTIONS))]
    numbers = _numbers(draw, QUESTIONS)
    lines = tuple(f"\ndef {a}():\n    return {b}\n" for a, b in zip(names, numbers))
    ask = [Question(f"\nassert {a}() ==", _among(draw, b, numbers)) for a, b in zip(names, numbers)]
    return Planted(lines, tuple(ask))


def _table(draw: random.Random) -> Planted:
    """The last cell of a table's row."""
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
"""After the kinds of RULER (arXiv 2404.06654), with questions that a small model can answer by likelihood."""


@dataclass(frozen=True)
class Document:
    """A kind, its tokens `ids [1, T]`, and its questions as tokens.

    Each question is `(ask [1, n], answers)`; of the answers, [1, n] each, the first is right.
    """

    kind: str
    ids: Tensor
    questions: tuple[tuple[Tensor, tuple[Tensor, ...]], ...]


def document(kind: str, tokenizer: Any, text: str, tokens: int, *, seed: int = 0) -> Document:
    """A document of so many tokens, with what a kind plants in it at places that the seed draws.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    tokenizer : callable
        Of Transformers.
    text : str
        What stands between the planted lines; of a list of words it is the list.
    tokens : int
        Of the document, without questions.
    seed : int
        Of names, numbers and places.

    Raises
    ------
    SparseFlashError
        For another kind, or where the text or the tokens are too few for what is planted.

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
    # none in the last eighth: there every window sees it
    cuts = sorted(draw.sample(range(rest * 7 // 8), len(lines)))
    ids, before = [], 0
    for at, line in zip(cuts, lines):
        ids += filler[before:at] + line
        before = at
    ids += filler[before:rest]
    questions = [
        (
            torch.tensor([read(f"\n\n{one.ask}" if one.ask[0] != "\n" else one.ask)]),
            tuple(torch.tensor([read(f" {answer}")]) for answer in one.answers),
        )
        for one in planted.questions
    ]
    return Document(kind, torch.tensor([ids]), tuple(questions))


@dataclass(frozen=True)
class Score:
    """Of a document: the share of questions whose right answer is likeliest, how many, and how sure.

    `margin`: nats by which the right answer is likelier than the best wrong one, mean.
    """

    right: float
    questions: int
    margin: float


@torch.no_grad()
def score(model: Any, given: Document, prefill: Callable[[], AbstractContextManager[Any]]) -> Score:
    """Read a document once under `prefill()`, and questions and answers behind it densely.

    The cache is cut back after every answer, so that no question sees another one.
    """
    from sparseflash.integrations.transformers import sparse

    with prefill():
        cache = model.base_model(given.ids, use_cache=True).past_key_values
    T, right, margins = given.ids.shape[1], 0, []
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
            right += margins[-1] > 0
    return Score(right / len(margins), len(margins), sum(margins) / len(margins))
