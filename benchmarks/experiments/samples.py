"""Samples of one prompt: tokens per second and bytes of a whole model, its own cache beside one that shares.

The prompt is source text of Python's own library, read once; each case then goes on from it with so many
samples, drawn from the same logits by the same seed, a few tokens at a time in turn. `rate` counts the tokens
of all samples, `agree` the share of tokens that are those of the stock model, `bytes` keys and values with
their room.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row

from .generation import begun, held

CASES: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "stock": lambda model: nullcontext(),
    "room": lambda model: sf.transformers.sparse(model),
    "shared": lambda model: sf.transformers.sparse(model, cache=sf.cache.Share()),
}


@dataclass
class Run:
    """Samples of one case, as far as they are."""

    cache: Any
    logits: Tensor
    draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    tokens: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def go_on(self, model: Any, tokens: int) -> None:
        """So many tokens more of every sample."""
        start = time.perf_counter()
        for _ in range(tokens):
            best, at = self.logits.float().topk(20)
            drawn = at.gather(-1, torch.multinomial(best.softmax(-1), 1, generator=self.draw))
            self.tokens.append(drawn)
            self.logits = model(drawn, past_key_values=self.cache).logits[:, -1]
        self.seconds.append(time.perf_counter() - start)


@torch.no_grad()
def measure(
    *,
    model: str = "smollm2",
    length: int = 8192,
    samples: tuple[int, ...] = (4, 16, 32),
    names: tuple[str, ...] = tuple(CASES),
    tokens: int = 4,
    rounds: int = 3,
    dtype: str = "bf16",
    threads: int = 0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a case and number of samples: the best rate of the rounds, in which all take turns."""
    from transformers.cache_utils import DynamicCache

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        loaded, prompt = begun(model, DTYPES[dtype], length)
        read = {}
        for name in names:
            on_run(f"{name}: {length} tokens of the prompt")
            with CASES[name](loaded):
                cache = DynamicCache()
                read[name] = cache, loaded(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        for count in samples:
            runs = {}
            for name in names:
                own = copy.deepcopy(read[name][0])
                own.batch_repeat_interleave(count)
                runs[name] = Run(own, read[names[0]][1].repeat(count, 1))
            for n in range(rounds + 1):  # the first one warms up
                for name, run in runs.items():
                    on_run(f"{count} samples, {name}: round {n}")
                    with CASES[name](loaded):
                        run.go_on(loaded, tokens)
            first = runs[names[0]]
            for name, run in runs.items():
                agree = torch.stack([a == b for a, b in zip(first.tokens, run.tokens)]).float().mean()
                yield {
                    "bench": "samples", "model": model, "T": length, "dtype": dtype, "case": name,
                    "samples": count, "rate": count * tokens / min(run.seconds[1:]),
                    "ms": 1000 * min(run.seconds[1:]) / tokens, "bytes": held(run.cache),
                    "gain": min(first.seconds[1:]) / min(run.seconds[1:]),
                    "saved": held(first.cache) / held(run.cache), "agree": float(agree), "rounds": rounds,
                }  # fmt: skip
            del runs, first
    finally:
        torch.set_num_threads(before)
