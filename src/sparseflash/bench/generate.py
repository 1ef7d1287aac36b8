"""Generate with few keys or a small cache, beside dense generation: rates, bytes and agreement."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
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


def forced(model: Any, cache: Any, told: Tensor, watched: AbstractContextManager[Any]) -> tuple[Tensor, Any]:
    """Decode the tokens `told [1,n]`: log-probabilities, and what `watched` hears of the last step."""
    n = told.shape[1]
    logs = [gone_on(model, cache, told[:, :1], n - 1, told)[1]] if n > 1 else []
    with watched as heard:
        out = model(told[:, -1:], past_key_values=cache)
    return torch.cat([*logs, out.logits[:, -1:].float().log_softmax(-1)], 1), heard


def held(cache: Any, tensors: dict[str, Tensor], about: dict[str, dict[str, Any]]) -> list[float]:
    """The share of dense attention's mass on the keys that each layer holds, for one query, mean over heads.

    `tensors` and `about` are what dense layers were given for the cache's last token (`capture.listening`). A
    layer that nothing is evicted from holds all.
    """
    found = []
    for n, layer in enumerate(cache.layers):
        share = torch.ones(())
        if isinstance(layer, sf.cache.Evicting):
            q, k = (tensors[f"layer.{n}.{x}"].float() for x in "qk")
            logits = q.view(q.shape[0], k.shape[1], -1, q.shape[3]) @ k.mT * about[str(n)]["scale"]
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
    divergence of the probabilities there, nats per token. `recall`, of each layer: the share of dense
    attention's mass on the keys that the last token still sees; of the dense model's query if a cache evicts
    (`held`), of the sparse model's if a method chooses.
    """
    from sparseflash.bench.capture import listening
    from sparseflash.integrations.transformers.reporting import measuring

    dense: dict[str, Any] = {}
    evicts = isinstance(given.get("cache"), sf.cache.Policy)
    for name, enter in {
        "dense": lambda: sf.transformers.sparse(model),
        "sparse": lambda: sf.transformers.sparse(model, **given),
    }.items():
        cache, token = begun(model, ids, enter)
        with enter():
            again = copy.deepcopy(cache) if dense or evicts else None
            said, logs, seconds = gone_on(model, cache, token, new, None)
            row: Row = {"case": name, "T": ids.shape[1], "rate": new / seconds}
            if not dense:
                dense = {"said": said, "logs": logs, "told": said[:, :new]}
                if evicts:
                    dense["heard"] = forced(model, again, dense["told"], listening(model))[1]
            else:
                watched = nullcontext() if evicts else measuring(model, dense=False)
                logs, heard = forced(model, again, dense["told"], watched)
                would = torch.cat([token, logs.argmax(-1)], 1)
                row["agree"] = float((would == dense["said"]).double().mean())
                row["kl"] = float((dense["logs"].exp() * (dense["logs"] - logs)).sum(-1).mean())
                if evicts:
                    row["recall"] = held(again, *dense["heard"])
                else:
                    row["recall"] = [sum(call.recall) / len(call.recall) for call in heard]
        row["kept"] = sum(kept for kept, _ in layers(cache)) / len(cache.layers)
        row["bytes"] = sum(size for _, size in layers(cache))
        yield row, said, cache
