"""What caches lose that keep or read few keys, on the queries and keys of a pretrained model.

A prompt is put into a cache, and further tokens one at a time; for these, `recall` is the share of dense
attention's mass on the keys that are read, `error` the distance of the output, mean over tokens, heads and
layers. Beside each stand two controls of the same number of keys, the first four among them: the last ones,
and a random choice. What reads no more of the mass than they do has found nothing, and `beats` says so.
`bytes` are those of the cache over those of all keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import cache, methods
from sparseflash.bench import capture
from sparseflash.bench.board import Random
from sparseflash.bench.results import Row
from sparseflash.cache import Evicting, Growing, Policy
from sparseflash.methods.base import Method

Make = Callable[[int], Any]
"""A policy or a method of so many keys."""

SLACK = 8
"""Tokens before a policy is asked again: what it holds beside its budget."""

CONTROLS: Mapping[str, Make] = {
    "window": lambda n: cache.StreamingLLM(budget=n),
    "random": lambda n: Random(budget=n, sinks=4, recent=1),
}


def cases(layer: capture.Layer, prompt: int) -> dict[str, Make]:
    """By name; what has to be found on other tokens is found on the first quarter of the prompt."""
    q, k, _ = layer.usual()
    few = prompt // 4
    channels = methods.heavy_channels(q[:, :, :few], k[:, :, :few], 16)
    return {
        "snapkv": lambda n: cache.SnapKV(budget=n),
        "snapkv, kernel 1": lambda n: cache.SnapKV(budget=n, kernel=1),
        "adakv": lambda n: cache.AdaKV(budget=n),
        "h2o": lambda n: cache.H2O(budget=n, recent=n // 2),
        "tova": lambda n: cache.TOVA(budget=n),
        "knorm": lambda n: cache.KNorm(budget=n),
        "knorm, half recent": lambda n: cache.KNorm(budget=n, recent=n // 2, sinks=4),
        "expected-attention": lambda n: cache.ExpectedAttention(budget=n),
        "quest": lambda n: methods.Quest(budget=n),
        "quest, each head": lambda n: methods.Quest(budget=n, share=""),
        "quest, largest": lambda n: methods.Quest(budget=n, share="max"),
        "lserve": lambda n: methods.LServe(budget=n),
        "lserve, whole pages": lambda n: methods.LServe(budget=n, part=64),
        "double-sparsity, 16": lambda n: methods.DoubleSparsity(budget=n, channels=channels),
        "double-sparsity, all channels": lambda n: methods.DoubleSparsity(
            budget=n, channels=(tuple(range(k.shape[3])),)
        ),
        "squeezed-attention": lambda n: methods.SqueezedAttention(context=prompt, budget=n),
    }


@torch.no_grad()
def judged(layer: capture.Layer, prompt: int, made: Any) -> dict[str, float]:
    """Recall, error and bytes of a policy or a method, over the tokens behind the prompt."""
    q, k, v = layer.usual()
    T = q.shape[2]
    dense, lse = sf.attention(q[:, :, prompt:], k, v, causal=True, q_offset=prompt, return_lse=True)
    held: Evicting | Growing = Evicting(made, slack=SLACK) if isinstance(made, Policy) else Growing()
    if isinstance(held, Evicting):
        held.attend(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    else:
        held.append(k[:, :, :prompt], v[:, :, :prompt])
    shares, errors = [], []
    for t in range(prompt, T):
        now = (x[:, :, t : t + 1] for x in (q, k, v))
        out, seen = step(held, made, t, *now)
        at = t - prompt
        shares.append((seen[:, :, 0] - lse[:, :, at]).exp().mean())
        errors.append((out[:, :, 0] - dense[:, :, at]).norm() / dense[:, :, at].norm())
    whole = 2 * k.nbytes
    room = held.bytes if isinstance(held, Evicting) else used(held)
    return {
        "recall": float(torch.stack(shares).mean()),
        "error": float(torch.stack(errors).mean()),
        "bytes": room / whole,
    }


def used(held: Growing) -> int:
    """The bytes of a cache without its room."""
    tensors = held.tensors()
    share = held.tokens / tensors["keys"].shape[2]
    return int(sum(x.nbytes for x in tensors.values()) * share)


def step(
    held: Evicting | Growing, made: Any, t: int, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of one token over what is read, and the log-sum-exp of that."""
    if isinstance(held, Evicting):
        held.attend(q, k, v)
        plan: Any = held.plan()
    else:
        held.append(k, v)
        assert isinstance(made, Method)
        plan = made.select(q, held.keys, {"cache": held, "q_offset": t}).plan
    return sf.decode(q, held.keys, held.values, plan, return_lse=True)


def measure(
    *,
    name: str = "smollm2",
    length: int = 4096,
    tokens: int = 96,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a case and budget: 1/2, 1/4, 1/8 and 1/16 of the prompt's keys."""
    captured = capture.load(name)
    layers = [captured.layer(n, tokens=length) for n in captured.layers]
    prompt = length - tokens
    controls: dict[tuple[str, int], float] = {}

    def mean(make: Callable[[capture.Layer], Any]) -> dict[str, float]:
        each = [judged(layer, prompt, make(layer)) for layer in layers]
        return {name: sum(x[name] for x in each) / len(each) for name in each[0]}

    for share in (2, 4, 8, 16):
        budget = prompt // share
        for case, make in CONTROLS.items():
            on_run(f"{case}, 1/{share}")
            controls[case, share] = mean(lambda layer, make=make, n=budget: make(n))["recall"]
        for case in cases(layers[0], prompt):
            on_run(f"{case}, 1/{share}")
            found = mean(lambda layer, case=case, n=budget: cases(layer, prompt)[case](n))
            both = {f"{name}_recall": controls[name, share] for name in CONTROLS}
            kind = "kept" if isinstance(cases(layers[0], prompt)[case](budget), Policy) else "read"
            yield {
                "bench": "caches", "capture": name, "T": length, "tokens": tokens, "case": case, "few": kind,
                "budget": budget, "share": f"1/{share}", **found, **both,
                "beats": found["recall"] > max(both.values()),
            }  # fmt: skip
