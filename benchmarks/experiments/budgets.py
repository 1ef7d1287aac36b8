"""Ways to keep or to read few keys in a whole model, beside each other: bytes, rates, what is said and found.

A text goes through the model once densely, and its continuation is dense attention's own. Each case then
reads the same words: `kl` is that of its next tokens' probabilities from the dense ones, nats a token,
`agree` the share of equal choices. `bytes` are those of the cache over those of all keys and values, `gain`
the rate over that of dense decoding on these kernels. Beside every budget stand two controls of as many keys:
the first four and the last ones, and a random choice, kept once. `beats` says whether a case's kl is below
both.

`asked`, `before` and `anew` are planted needles (`sparseflash.bench.needles`) in captured queries and keys,
which tokens behind the prompt ask for: the share that is found where the end of the prompt asked for them,
too; where a run in the middle did; and where nobody did. Found is what gets most of attention.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import cache, methods
from sparseflash.bench import capture, generate, needles
from sparseflash.bench.results import Row
from sparseflash.cache import Citrus, Compressed, Compression, Evicting, Growing, Policy

from .caches import CONTROLS, SLACK, step

Make = Callable[[int, Tensor, Tensor], Any]
"""A policy, a compression or a method for so many keys, and some queries and keys of its layer."""
SHARES = (2, 4, 8, 16)
WATERSHED = 12
"""Of SmolLM2: `sparseflash calibrate round`."""
LAST = needles.RUN * 8
"""Tokens that ask for needles."""


def cases(prompt: int) -> dict[str, Make]:
    """All of them by name, for prompts of so many tokens."""

    def labels(n: int, q: Tensor, k: Tensor) -> Any:
        return methods.DoubleSparsity(budget=n, channels=methods.heavy_channels(q, k, 16))

    made: dict[str, Make] = {name: lambda n, q, k, make=make: make(n) for name, make in CONTROLS.items()}
    return made | {
        "snapkv": lambda n, q, k: cache.SnapKV(budget=n),
        "pyramidkv": lambda n, q, k: cache.PyramidKV(budget=n),
        "adakv": lambda n, q, k: cache.AdaKV(budget=n),
        "threshold": lambda n, q, k: cache.Threshold(budget=n),
        "h2o": lambda n, q, k: cache.H2O(budget=n, recent=n // 2),
        "tova": lambda n, q, k: cache.TOVA(budget=n),
        "knorm": lambda n, q, k: cache.KNorm(budget=n, recent=n // 2, sinks=4),
        "expected-attention": lambda n, q, k: cache.ExpectedAttention(budget=n),
        "citrus": lambda n, q, k: Citrus(budget=n, recent=min(n // 2, 256)),
        "citrus, asked": lambda n, q, k: Citrus(budget=n, recent=min(n // 2, 256)),
        "quest": lambda n, q, k: methods.Quest(budget=n),
        "lserve": lambda n, q, k: methods.LServe(budget=n),
        "double-sparsity": labels,
        "squeezed-attention": lambda n, q, k: methods.SqueezedAttention(
            context=prompt, budget=n, window=min(100, n // 2)
        ),
        "round-attention": lambda n, q, k: methods.RoundAttention(
            watershed=WATERSHED, budget=n, share=1.0, rounds=tuple(range(0, prompt, prompt // 32))
        ),
        "mustafar": lambda n, q, k: cache.Mustafar(1 - n / prompt),
        "mustafar, int8": lambda n, q, k: cache.Mustafar(1 - n / prompt, int8=True),
        "int8": lambda n, q, k: cache.Int8(),
    }


def heard(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """The queries, keys and values of every layer that has no window of its own, for `ids [1,T]`."""
    from sparseflash.integrations.transformers import attention_layers
    from sparseflash.integrations.transformers.control import attached, on_sparse

    chosen = [layer for layer in attention_layers(model) if not layer.windowed]
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def listener(number: int) -> Callable[..., Tensor]:
        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
            found[number] = q, k, v
            return sf.attention(q, k, v, mask.plan, **options)

        return attend

    with on_sparse(model), attached(chosen, [listener(layer.index) for layer in chosen]):
        model.base_model(ids, use_cache=False)
    return found


def begun(model: Any, ids: Tensor, case: str, made: Mapping[int, Any], inputs: Mapping[int, Any]) -> Any:
    """The cache of a case after a prompt: it is attended to densely, but where it is read in chunks."""
    from transformers.cache_utils import Cache

    one = next(iter(made.values()))
    if isinstance(one, Citrus):
        with sf.transformers.sparse(model, cache=dict(made)):
            asked = ids[:, -64:] if "asked" in case else None
            return sf.transformers.read(model, ids, chunk=one.recent, question=asked)
    layers: list[Evicting | Compressed] = []
    for number, how in made.items():
        if isinstance(how, Compression):
            layers.append(Compressed(how))
        else:
            layers.append(Evicting(how, layer=number, layers=len(made)))
        q, k, v = inputs[number]
        layers[-1].attend(q, k, v, new=lambda q, *others, **options: q)  # what comes out is known
    return Cache(layers=layers)


def planted(q: Tensor, k: Tensor, kind: str) -> tuple[needles.Needles, int]:
    """Needles that the last tokens ask for, and how many tokens the prompt has."""
    T, generator = q.shape[2], torch.Generator().manual_seed(0)
    found = needles.plant(q, k, "mid" if kind == "before" else "question", generator)
    if kind == "asked":
        return found, T - LAST // 2
    if kind == "before":  # those who asked in the middle ask again at the end
        rows = found.asking.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None]
        asks = found.q.gather(2, rows.expand(-1, -1, -1, q.shape[3]))
        found = needles.Needles(
            torch.cat([found.q[:, :, :-LAST], asks], 2), found.k, found.asking, found.asked, found.scale
        )
    return found, T - LAST


@torch.no_grad()
def kept(layers: Sequence[capture.Layer], case: str, share: int) -> Row:
    """The share of needles of each kind that a case finds."""
    row: Row = {}
    for kind in ("asked", "before", "anew"):
        shares = []
        for layer in layers:
            q, k, v = layer.usual()
            there, prompt = planted(q, k, kind)
            q, k = there.q, there.k
            few = prompt // 4
            made = cases(prompt)[case](prompt // share, q[:, :, :few], k[:, :, :few])
            if isinstance(made, Compression):
                shares.append(weighed(there, made))
            else:
                shares.append(found(q, k, v, prompt, made, "asked" in case))
        row[kind] = sum(shares) / len(shares)
    return row


def found(q: Tensor, k: Tensor, v: Tensor, prompt: int, made: Any, ask: bool) -> float:
    """The share of tokens behind the prompt, and heads, that read most of dense attention's mass."""
    T = q.shape[2]
    _, lse = sf.attention(q[:, :, prompt:], k, v, causal=True, q_offset=prompt, return_lse=True)
    held: Evicting | Growing = Evicting(made, slack=SLACK) if isinstance(made, Policy) else Growing()
    chunk = made.recent if isinstance(made, Citrus) else prompt
    for begin in range(0, prompt, chunk):
        end = min(begin + chunk, prompt)
        if isinstance(held, Growing):
            held.append(k[:, :, begin:end], v[:, :, begin:end])
            continue
        if ask and begin:
            held.asking = True
            held.attend(q[:, :, prompt:], k[:, :, prompt:], v[:, :, prompt:])
            held.asking = False
        held.attend(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
    shares = []
    for t in range(prompt, T):
        _, seen = step(held, made, t, *(x[:, :, t : t + 1] for x in (q, k, v)))
        shares.append((seen[:, :, 0] - lse[:, :, t - prompt]).exp() > 0.5)
    return float(torch.stack(shares).double().mean())


def weighed(there: needles.Needles, made: Compression) -> float:
    """The share of needles that have most of the attention of those who ask, as a compression stores keys."""
    small = dataclasses.replace(there, k=made.packed(there.k).unpack())
    return float((small.dense()[1] > 0.5).double().mean())


@torch.no_grad()
def measure(
    text: Path,
    *,
    model: str = "smollm2",
    length: int = 2048,
    tokens: int = 32,
    skip: int = 20000,
    wanted: Sequence[str] = (),
    known: Sequence[Mapping[str, Any]] = (),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a case and budget; of what `known` has none."""
    loaded, tokenizer = sf.transformers.load(model)
    ids = tokenizer(text.read_text(encoding="utf-8")[skip:], return_tensors="pt").input_ids[:, :length]
    layers = capture.load(model)
    captured = [layers.layer(n, tokens=length) for n in layers.layers]
    on_run("dense")
    inputs, few = heard(loaded, ids), length // 4
    dense, first = generate.begun(loaded, ids, lambda: sf.transformers.sparse(loaded))
    with sf.transformers.sparse(loaded):
        said, logs, seconds = generate.gone_on(loaded, copy.deepcopy(dense), first, tokens, None)
    rate, whole = tokens / seconds, sum(2 * layer.keys.nbytes for layer in dense.layers)
    whole += whole * tokens // length
    done = {(row["model"], str(row["T"]), row["case"], row["share"]): row for row in known}
    for case, share in ((case, share) for case in wanted or cases(length) for share in SHARES):
        key = model, str(length), case, f"1/{share}"
        if key in done or (case == "int8" and share != 2):
            continue
        on_run(f"{case}, 1/{share}")
        of_budget = functools.partial(cases(length)[case], length // share)
        made = {n: of_budget(q[:, :, :few], k[:, :, :few]) for n, (q, k, _) in inputs.items()}
        reads = isinstance(next(iter(made.values())), methods.Method)
        own = copy.deepcopy(dense) if reads else begun(loaded, ids, case, made, inputs)
        with sf.transformers.sparse(loaded, decode=made if reads else None):
            would, found, seconds = generate.gone_on(loaded, own, first, tokens, said)
        row: Row = {
            "bench": "budgets", "model": model, "text": text.stem, "T": length, "tokens": tokens,
            "case": case, "few": "read" if reads else "kept", "share": f"1/{share}",
            "bytes": sum(size for _, size in generate.layers(own)) / whole,
            "rate": tokens / seconds, "gain": tokens / seconds / rate,
            "agree": float((would == said).double().mean()),
            "kl": float((logs.exp() * (logs - found)).sum(-1).mean()),
            **kept(captured, case, share),
        }  # fmt: skip
        done[key] = row
        others = [done.get((*key[:2], name, key[3])) for name in CONTROLS]
        if case not in CONTROLS and all(others):
            row["beats"] = row["kl"] < min(float(one["kl"]) for one in others if one)
        yield row
