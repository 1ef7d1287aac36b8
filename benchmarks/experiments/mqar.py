"""Multi-query associative recall: whether an attention still finds what was said once, far back.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", ICLR 2024, arXiv
2312.04927. A row lists key-value pairs and asks for the value of each key later on. No mean over the past
solves that, and dense attention learns it in a minute; so an attention that fails has lost the ability, not
the race. Each is trained at several learning rates and judged by its best one, as in the paper.
One convolution, one attention layer of eight heads of 8, 128 tokens of vocabulary, 8 pairs in rows of 64: the
smallest setting found that dense and hashed attention solve and attention without a view back does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.bench.quality import density
from sparseflash.bench.results import Row
from sparseflash.nn import Layer, update
from sparseflash.train.attention import Attention, build
from sparseflash.train.model import norm

IGNORED = -100
HELD_OUT = 8
"""One row of so many belongs to the test set, by what it says: no row can be in both sets."""


@dataclass(frozen=True)
class Task:
    """The rows.

    Parameters
    ----------
    vocabulary : int
        Token 0 fills, the lower half are keys, the upper half values.
    length : int
        Tokens of a row.
    pairs : int
        Keys of a row, each asked for once.
    power : float
        Gaps g between the end of the list and a question follow p(g) ~ power * g^(power - 1): near ones most.
    """

    vocabulary: int = 128
    length: int = 64
    pairs: int = 8
    power: float = 0.01

    def __post_init__(self) -> None:
        if not 4 * self.pairs <= self.length < self.vocabulary:
            raise ValueError(
                f"length={self.length}: expected at least 4 * pairs = {4 * self.pairs} and below the "
                f"vocabulary of {self.vocabulary}"
            )

    @property
    def words(self) -> int:
        """Tokens up to the last value."""
        return self.vocabulary

    def rows(self, count: int, generator: torch.Generator, *, test: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens and labels, int64 [count, length]; labels stand where a key is asked for."""
        found: list[Tensor] = []
        missing = count
        while missing > 0:
            drawn = self._pairs(missing * (2 * HELD_OUT if test else 2), generator)
            held_out = drawn.prod(1).sum(-1) % HELD_OUT == 0
            found.append(drawn[held_out == test][:missing])
            missing -= len(found[-1])
        return self._lay_out(torch.cat(found), generator)

    def _pairs(self, count: int, generator: torch.Generator) -> Tensor:
        """Distinct keys and distinct values, [count, 2, pairs]."""
        half = self.words // 2
        keys, values = (
            torch.rand(count, n, generator=generator).topk(self.pairs).indices + start
            for n, start in ((half - 1, 1), (self.words - half, half))
        )
        return torch.stack([keys, values], 1)

    def _lay_out(self, pairs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, begin = len(pairs), 2 * self.pairs
        slots = (self.length - begin) // 2
        gap = torch.arange(1, slots + 1, dtype=torch.float64)
        weight = self.power * gap ** (self.power - 1)
        at = torch.multinomial(weight.expand(count, -1), self.pairs, generator=generator) * 2 + begin
        tokens = torch.zeros(count, self.length, dtype=torch.int64)
        tokens[:, :begin] = pairs.mT.flatten(1)
        tokens.scatter_(1, at, pairs[:, 0])
        labels = torch.full_like(tokens, IGNORED).scatter_(1, at, pairs[:, 1])
        return tokens, labels


class Conv(nn.Module):
    """BaseConv: a short causal convolution times a gate, added to its input."""

    def __init__(self, width: int, taps: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, taps, groups=width, padding=taps - 1)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours; x [B, T, width]."""
        u = norm(x)
        mixed = self.conv(u.mT)[..., : x.shape[1]].mT
        return x + mixed * self.gate(u)


class Attend(nn.Module):
    """One layer of the attention under test, added to its input."""

    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Look back; x [B, T, width]."""
        q, k, v = self.project(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.output(self.attention(q, k, v).transpose(1, 2).flatten(2))


class Mix(nn.Module):
    """A layer of `sparseflash.nn` under test, added to its input."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Look back; x [B, T, width]."""
        return x + self.layer(norm(x))


class Model(nn.Module):
    """Embedding, convolution, attention or layers in its place, and the embedding again as the head."""

    def __init__(self, task: Task, attention: Attention | Sequence[Layer], *, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(task.vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        mixers = [Attend(width, heads, attention)] if callable(attention) else map(Mix, attention)
        self.layers = nn.Sequential(Conv(width), *mixers)

    def aux_loss(self) -> Tensor:
        """What layers add to the loss of the last forward."""
        found = [mixer.layer.aux_loss for mixer in self.layers if isinstance(mixer, Mix)]
        return torch.stack(found).sum() if found else self.embed.weight.new_zeros(())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary]."""
        return norm(self.layers(self.embed(tokens))) @ self.embed.weight.mT * self.embed.embedding_dim**0.5


ATTENTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "dense": ("dense", {}),
    "hash-sparse, 4 buckets": ("hash-sparse", {"nb": 4}),
    "window of 4": ("window", {"window": 4}),
    "random dropping, 50 %": ("qk-sparse", {"q_drop": 0.5, "k_drop": 0.5}),
}
"""Two that have to solve it and two that must not be able to; dropping sees the pairs of four buckets."""
MUST_SOLVE = ("dense", "hash-sparse, 4 buckets")
RATES = (3e-3, 1e-2, 2e-2)


@torch.no_grad()
def accuracy(model: Model, tokens: Tensor, labels: Tensor, rows: int = 500) -> float:
    """Share of the questions that are answered right, so many rows at a time."""
    parts = zip(tokens.split(rows), labels.split(rows), strict=True)
    model.eval()
    right = [(model(some).argmax(-1) == wanted)[wanted != IGNORED] for some, wanted in parts]
    model.train()
    return float(torch.cat(right).float().mean())


Make = Callable[[dict[str, int]], Attention | Sequence[Layer]]
"""From a context, in which the step is told, to the attention of the layer, or to layers."""


def train(
    attention: Make,
    *,
    task: Task,
    rate: float,
    steps: int,
    batch: int = 128,
    held: int = 500,
    width: int = 64,
    heads: int = 8,
    enough: float = 0.995,
    every: int = 50,
    seed: int = 0,
    on_score: Callable[[int, float], None] = lambda step, found: None,
) -> tuple[Model, float, int]:
    """Train on fresh rows until `enough` of the questions of `held` unseen ones are answered, or for `steps`.

    Returns
    -------
    model, accuracy, steps taken
    """
    torch.manual_seed(seed)
    context = {"step": 0}
    model = Model(task, attention(context), width=width, heads=heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    test = task.rows(held, torch.Generator().manual_seed(seed + 1), test=True)
    found = accuracy(model, *test, batch)
    for step in range(1, steps + 1):
        context["step"] = step
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20, 1.05 - step / steps)
        tokens, labels = task.rows(batch, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        (loss + model.aux_loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(model)
        if step % every == 0 or step == steps:
            found = accuracy(model, *test, batch)
            on_score(step, found)
            if found >= enough:
                return model, found, step
    return model, found, steps


def measure(
    *,
    task: Task | None = None,
    attentions: Sequence[str] = tuple(ATTENTIONS),
    rates: Sequence[float] = RATES,
    steps: int = 400,
    on_run: Callable[[str], None] = lambda text: None,
    **options: int,
) -> Iterator[Row]:
    """Train every attention at every rate; `best` marks the rate that an attention is judged by."""
    task = task or Task()
    for name in attentions:
        slug, hyper = ATTENTIONS[name]
        rows: list[Row] = []
        for rate in rates:
            on_run(f"{name}, learning rate {rate:g}")
            start = time.perf_counter()
            make = partial(_attention, slug, hyper, options.get("seed", 0))
            model, found, taken = train(make, task=task, rate=rate, steps=steps, **options)
            row: Row = {"bench": "mqar", "case": name, "lr": rate, "accuracy": found, "steps": taken}
            row |= {"seconds": time.perf_counter() - start, "density": _density(model, task)}
            row |= {"vocabulary": task.vocabulary, "T": task.length, "pairs": task.pairs}
            rows.append(row | {"parameters": sum(p.numel() for p in model.parameters())})
        best = max(rows, key=lambda row: row["accuracy"])
        for row in rows:
            yield row | {"best": "yes" if row is best else ""}


def _attention(slug: str, options: dict[str, object], seed: int, context: dict[str, int]) -> Attention:
    return build(slug, options, seed=seed, context=context)


@torch.no_grad()
def _density(model: Model, task: Task) -> float:
    """Share of the causal pairs that the trained attention sees on unseen rows."""
    layer = model.layers[1]
    assert isinstance(layer, Attend)
    if not hasattr(layer.attention, "select"):
        return 1.0
    tokens, _ = task.rows(32, torch.Generator().manual_seed(2), test=True)
    x = norm(model.layers[0](model.embed(tokens)))
    q, k, _ = layer.project(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    return density(layer.attention.select(q, k).plan)


def verdict(rows: Sequence[Row]) -> list[str]:
    """What speaks against the gate: an attention that has to solve the task and does not, or the reverse."""
    wrong = []
    for row in rows:
        if not row["best"]:
            continue
        must = row["case"] in MUST_SOLVE
        if must and row["accuracy"] < 0.99:
            wrong.append(f"{row['case']} reaches {row['accuracy']:.1%}, expected 99 % or more")
        if not must and row["accuracy"] > 0.9:
            wrong.append(f"{row['case']} reaches {row['accuracy']:.1%}, and should not be able to")
    return wrong
