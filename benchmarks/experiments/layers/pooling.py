"""Pooling of jagged histories: time and memory beside padded SDPA, and a click model that it has to carry.

Times: `queries` learned queries with a bias of places pool histories of random lengths, forward and backward;
the padded twin has the bias and the padding in its mask. Padding itself is not counted.

Clicks: a history is 5 to 100 items of 20 topics, the newest first, and a candidate is clicked if its topic is
among the newest 8, but for one answer in ten. Attention asks the history with the candidate and learns a
bias of places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.bench import memory
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave

from ..claim.rows import Job


def jagged(lengths: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Normal rows, a nested tensor [B, j, width]."""
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = torch.randn(int(offsets[-1]), width, generator=generator)
    return torch.nested.nested_tensor_from_jagged(rows, offsets)


def times(
    *,
    batch: int = 256,
    longest: int = 512,
    queries: int = 4,
    width: int = 64,
    fills: Sequence[float] = (0.15, 0.3, 0.5),
    rounds: int = 5,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """A row for each fill: milliseconds and megabytes of both, and their ratios."""
    g = torch.Generator().manual_seed(0)
    for fill in fills:
        lengths = (torch.rand(batch, generator=g) * 2 * fill * longest).long().clamp(max=longest)
        k, v = (jagged(lengths, width, g) for _ in range(2))
        q = torch.randn(batch, queries, width, generator=g)
        bias = torch.randn(batch, longest, queries, generator=g)
        keep = torch.arange(longest) < lengths[:, None]
        padded = [torch.nested.to_padded_tensor(x, 0.0, output_size=(batch, longest, width)) for x in (k, v)]
        calls = {
            "jagged": partial(_jagged, q, k, v, bias),
            "padded": partial(_padded, q, *padded, bias, keep),
        }
        alike = [call()[0][lengths > 0] for call in calls.values()]
        torch.testing.assert_close(*alike, atol=1e-4, rtol=1e-3)
        found = interleave(calls, rounds=rounds, box=Box(60.0), on_run=on_run)
        peaks = {name: memory.peak(call) for name, call in calls.items()}
        row: Row = {"bench": "layers-pooling", "case": "times", "fill": float(keep.float().mean())}
        row |= {"B": batch, "T": longest, "queries": queries, "width": width, "rounds": rounds}
        row |= {f"ms_{name}": own.median * 1e3 for name, own in found.items()}
        row |= {f"mb_{name}": own / 2**20 for name, own in peaks.items()}
        row |= {"speedup": found["padded"].over(found["jagged"])}
        yield row | {"memory": peaks["jagged"] / max(1, peaks["padded"])}


def _jagged(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    q, bias, *rows = (x.detach().requires_grad_() for x in (q, bias, k.values(), v.values()))
    k, v = (torch.nested.nested_tensor_from_jagged(x, k.offsets()) for x in rows)
    out = sf.jagged_pool(q, k, v, bias)
    return out.detach(), *torch.autograd.grad(out.sum(), (q, bias, *rows))


def _padded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    given = q, bias, k, v = tuple(x.detach().requires_grad_() for x in (q, bias, k, v))
    mask = bias.mT.masked_fill(~keep[:, None], -torch.inf)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.where(keep.any(1)[:, None, None], 0)
    return out.detach(), *torch.autograd.grad(out.sum(), given)


class Clicks(nn.Module):
    """Whether a candidate is clicked, from it and a pooled history; `pool` is "attention" or "mean"."""

    def __init__(self, items: int, pool: str, width: int = 16, longest: int = 100) -> None:
        super().__init__()
        self.pool = pool
        self.embed = nn.Embedding(items, width)
        self.key = nn.Linear(width, width, bias=False)
        self.places = nn.Parameter(torch.zeros(1, longest, 1))
        self.judge = nn.Sequential(nn.Linear(3 * width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, items: Tensor, offsets: Tensor, candidate: Tensor) -> Tensor:
        """Logits [B] of histories `items [total]` between `offsets [B + 1]` and candidates [B]."""
        asked, history = self.embed(candidate), self.embed(items)
        if self.pool == "attention":
            v = torch.nested.nested_tensor_from_jagged(history, offsets)
            k = torch.nested.nested_tensor_from_jagged(self.key(history), offsets)
            seen = sf.jagged_pool(asked[:, None], k, v, self.places)[:, 0]
        else:
            sums = history.new_zeros(len(asked), history.shape[1])
            sample = torch.repeat_interleave(torch.arange(len(asked)), offsets.diff())
            seen = sums.index_add(0, sample, history) / offsets.diff().clamp(min=1)[:, None]
        return self.judge(torch.cat([asked, seen, asked * seen], -1))[:, 0]


def clicks(*, seeds: Sequence[int], steps: int = 1000, batch: int = 256) -> list[Job]:
    """A row for each pooling and seed."""
    keys = [
        {"bench": "layers-pooling", "case": f"clicks, {pool}", "seed": seed, "steps": steps, "B": batch}
        for pool in ("attention", "mean")
        for seed in seeds
    ]
    return [Job(key, partial(_click, key)) for key in keys]


TOPICS, EACH, NEW = 20, 4, 8


def _draw(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items of all histories, their edges, candidates, and clicks."""
    lengths = torch.randint(5, 101, (count,), generator=g)
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    topic = torch.randint(TOPICS, (int(offsets[-1]),), generator=g)
    sample = torch.repeat_interleave(torch.arange(count), lengths)
    new = torch.arange(len(topic)) - offsets[sample] < NEW
    seen = torch.zeros(count, TOPICS).index_put((sample[new], topic[new]), torch.tensor(1.0)) > 0
    liked = torch.rand(count, generator=g) < 0.5
    asked = (torch.rand(count, TOPICS, generator=g) + (seen == liked[:, None])).argmax(1)
    label = liked ^ (torch.rand(count, generator=g) < 0.1)
    items = topic * EACH + torch.randint(EACH, topic.shape, generator=g)
    candidate = asked * EACH + torch.randint(EACH, asked.shape, generator=g)
    return items, offsets, candidate, label.float()


def _click(key: Row) -> Row:
    torch.manual_seed(key["seed"])
    g = torch.Generator().manual_seed(key["seed"])
    model = Clicks(TOPICS * EACH, key["case"].split(", ")[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-3)
    for step in range(key["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / key["steps"])
        *given, label = _draw(key["B"], g)
        nn.functional.binary_cross_entropy_with_logits(model(*given), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    *given, label = _draw(4096, torch.Generator().manual_seed(1000 + key["seed"]))
    with torch.no_grad():
        logit = model(*given)
    return {"accuracy": ((logit > 0) == (label > 0)).float().mean().item(), "auc": _auc(logit, label)}


def _auc(logit: Tensor, label: Tensor) -> float:
    """How often a click has a larger logit than none has."""
    rank = logit.argsort().argsort().double() + 1
    yes, no = label.sum().item(), (1 - label).sum().item()
    return float((rank[label > 0].sum() - yes * (yes + 1) / 2) / (yes * no))
