"""Generate with few keys or a small cache, beside dense generation: rates, bytes and agreement."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.common.errors import SparseFlashError

COMPRESSIONS = {"mustafar": sf.cache.Mustafar, "int8": sf.cache.Int8}


def known() -> list[str]:
    """Names of decoding methods, cache policies and compressions."""
    reading = [name for name in sf.methods.names() if sf.methods.find(name).decodes]
    return sorted({*reading, *sf.cache.names(), *COMPRESSIONS})


def how(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `sparse` for a name: a method that decodes, or a cache policy or compression.

    Raises
    ------
    SparseFlashError
        If the name is neither; the message lists the known ones.
    """
    if name in COMPRESSIONS:
        try:
            return {"cache": COMPRESSIONS[name](**settings)}
        except TypeError:
            fields = ", ".join(COMPRESSIONS[name].__dataclass_fields__)
            raise SparseFlashError(f"{name} has no {', '.join(settings)}: it has {fields}") from None
    if name in sf.cache.names():
        return {"cache": sf.cache.policy(name, **settings)}
    if name in known():
        return {"decode": sf.methods.get(name, **settings)}
    raise SparseFlashError(f"--decode {name!r}: expected one of {', '.join(known())}")


def begun(model: Any, ids: Tensor, enter: Callable[[], AbstractContextManager[Any]]) -> tuple[Any, Tensor]:
    """Prefill a prompt `[1,T]`; returns the cache and the next token."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    with enter():
        out = model(ids, past_key_values=cache, logits_to_keep=1)
    return cache, out.logits[:, -1].argmax(-1, keepdim=True)


def gone_on(
    model: Any, cache: Any, token: Tensor, n: int, told: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Decode n tokens, greedily or forced to `told`; returns tokens, log-probabilities and seconds."""
    said, logs, start = [token], [], time.perf_counter()
    for i in range(n):
        out = model(said[-1] if told is None else told[:, i : i + 1], past_key_values=cache)
        logs.append(out.logits[:, -1].float().log_softmax(-1))
        said.append(logs[-1].argmax(-1, keepdim=True))
    return torch.cat(said, 1), torch.stack(logs, 1), time.perf_counter() - start


def layers(cache: Any) -> list[tuple[float, int]]:
    """Mean number of keys per KV head, and bytes, of each layer."""
    found = []
    for layer in cache.layers:
        ours = isinstance(layer, sf.cache.Layer)
        size = layer.bytes if ours else layer.keys.nbytes + layer.values.nbytes
        held = layer.held.double().mean() if isinstance(layer, sf.cache.Evicting) else layer.get_seq_length()
        found.append((float(held), size))
    return found


def recalls(
    model: Any, whole: Any, own: Any, token: Tensor, enter: Callable[[], AbstractContextManager[Any]]
) -> list[float]:
    """The share of dense attention's mass that each layer still sees, for one query, mean over heads.

    `whole` and `own` are caches of all tokens up to `token`, dense and with few keys. The mass is that of the
    dense model's query on the keys that a policy holds, and of the sparse model's on those that a method
    chooses. Compressed keys are all there: 1.
    """
    from sparseflash.bench.capture import listening
    from sparseflash.integrations.transformers.reporting import measuring

    if not isinstance(own.layers[0], sf.cache.Evicting):
        own.crop(-1)
        with enter(), measuring(model, dense=False) as rows:
            model(token, past_key_values=own)
        return [sum(row.recall) / len(row.recall) for row in rows]
    whole.crop(-1)
    with sf.transformers.sparse(model), listening(model) as (tensors, about):
        model(token, past_key_values=whole)
    found = []
    for n, layer in enumerate(own.layers):
        q, k = (tensors[f"layer.{n}.{x}"].float() for x in "qk")
        group = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        logits = group @ k.mT * about[str(n)]["scale"]
        if cap := about[str(n)].get("softcap"):
            logits = cap * torch.tanh(logits / cap)
        if (window := about[str(n)]["window"]) is not None:
            logits[..., : max(k.shape[2] - window, 0)] = -torch.inf
        share = (logits.softmax(-1) * layer.kept()[:, :, None, -k.shape[2] :]).sum(-1)
        found.append(float(share.mean()))
    return found


@torch.no_grad()
def measure(model: Any, ids: Tensor, given: dict[str, Any], new: int) -> Iterator[tuple[Row, Tensor, Any]]:
    """Yield a row, the tokens and the cache, first of dense generation, then with the arguments `given`.

    `agree`: share of tokens equal to dense attention's, both after dense attention's own words. `kl`:
    divergence of the probabilities there, nats per token. `recall`: of the last query's dense attention mass,
    how much each layer still sees (`recalls`).
    """
    dense: dict[str, Any] = {}
    for name, enter in {
        "dense": lambda: sf.transformers.sparse(model),
        "sparse": lambda: sf.transformers.sparse(model, **given),
    }.items():
        cache, token = begun(model, ids, enter)
        with enter():
            again = copy.deepcopy(cache) if dense else None
            said, logs, seconds = gone_on(model, cache, token, new, None)
            row: Row = {"case": name, "T": ids.shape[1], "rate": new / seconds}
            if dense:
                would, logs, _ = gone_on(model, again, token, new, dense["said"])
                row["agree"] = float((would == dense["said"]).double().mean())
                row["kl"] = float((dense["logs"].exp() * (dense["logs"] - logs)).sum(-1).mean())
                row["recall"] = recalls(model, dense["cache"], again, dense["said"][:, new - 1 : new], enter)
            else:
                dense = {"said": said, "logs": logs, "cache": cache}
        row["kept"] = sum(kept for kept, _ in layers(cache)) / len(cache.layers)
        row["bytes"] = sum(size for _, size in layers(cache))
        yield row, said, cache
