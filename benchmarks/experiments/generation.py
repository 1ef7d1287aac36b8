"""Tokens per second of a whole model behind a long prompt: its own cache, one with room, methods, policies.

All cases go on from the same prompt, source text of Python's own library, a few tokens at a time in turn;
`agree` is the share of tokens that are those of the stock model. `bytes` are those of the cache over those of
all keys and values of the tokens so far.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import sparseflash as sf
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row

Enter = Callable[[Any], AbstractContextManager[Any]]


def cases(length: int) -> dict[str, Enter]:
    """What the model runs in; of methods and policies those of an eighth of the keys."""
    few = length // 8
    return {
        "stock": lambda model: nullcontext(),
        "concatenated": lambda model: sf.transformers.sparse(model),
        "room": lambda model: sf.transformers.sparse(model),
        "quest": lambda model: sf.transformers.sparse(model, decode=sf.methods.Quest(budget=few)),
        "snapkv": lambda model: sf.transformers.sparse(model, cache=sf.cache.SnapKV(budget=few)),
        "streaming-llm": lambda model: sf.transformers.sparse(model, cache=sf.cache.StreamingLLM(budget=few)),
    }


def empty(case: str, model: Any) -> Any:
    """The cache that a case begins with."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    if case in ("stock", "room", "quest", "snapkv", "streaming-llm"):
        return DynamicCache()
    return Cache(layers=[DynamicLayer() for _ in range(model.config.num_hidden_layers)])


def held(cache: Any) -> int:
    """Bytes of keys and values, with their room."""
    total = 0
    for layer in cache.layers:
        own = layer.tensors().values() if hasattr(layer, "tensors") else (layer.keys, layer.values)
        total += sum(x.nbytes for x in own)
    return total


def begun(model: str, kind: torch.dtype, length: int) -> tuple[Any, torch.Tensor]:
    """A model, and so many tokens `[1, length]` of Python's own library."""
    loaded, tokenizer = sf.transformers.load(model, dtype=kind)
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    if prompt.shape[1] < length:
        raise sf.SparseFlashError(f"length={length}: the text has {prompt.shape[1]} tokens")
    return loaded, prompt


@torch.no_grad()
def measure(
    *,
    model: str = "smollm2",
    length: int = 8192,
    tokens: int = 8,
    rounds: int = 4,
    dtype: str = "bf16",
    threads: int = 0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a case: the best rate of the rounds, in which all take turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        kind = DTYPES[dtype]
        loaded, prompt = begun(model, kind, length)
        config = loaded.config
        found: dict[str, dict[str, Any]] = {}
        for case, enter in cases(length).items():
            on_run(f"{case}: {length} tokens of the prompt")
            cache = empty(case, loaded)
            with enter(loaded):
                out = loaded(prompt, past_key_values=cache, logits_to_keep=1)
            found[case] = {"cache": cache, "said": [out.logits[:, -1].argmax(-1, keepdim=True)], "s": []}
        for n in range(rounds):
            for case, enter in cases(length).items():
                on_run(f"{case}: round {n + 1}")
                own = found[case]
                with enter(loaded):
                    start = time.perf_counter()
                    for _ in range(tokens):
                        out = loaded(own["said"][-1], past_key_values=own["cache"])
                        own["said"].append(out.logits[:, -1].argmax(-1, keepdim=True))
                    own["s"].append(time.perf_counter() - start)
        stock = torch.cat(found["stock"]["said"], 1)
        width = config.num_key_value_heads * config.head_dim * 2 * kind.itemsize
        whole = width * (length + rounds * tokens) * config.num_hidden_layers
        for case, own in found.items():
            said = torch.cat(own["said"], 1)
            yield {
                "bench": "generation", "model": model, "dtype": dtype,
                "T": length, "case": case, "rate": tokens / min(own["s"]),
                "gain": min(found["stock"]["s"]) / min(own["s"]),
                "bytes": held(own["cache"]) / whole,
                "agree": float((said == stock).float().mean()), "rounds": rounds,
            }  # fmt: skip
    finally:
        torch.set_num_threads(before)
