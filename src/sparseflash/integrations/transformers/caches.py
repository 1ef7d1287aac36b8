"""Our cache layers, which replace the layers of a `DynamicCache` while it is empty."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from ...cache import (
    Attended,
    Compressed,
    Compression,
    Everything,
    Evicting,
    Growing,
    Layer,
    Offload,
    Offloaded,
    Paged,
    Pages,
    Policy,
    Share,
    Shared,
)
from ...common.errors import SparseFlashError
from .mask import SparseMask

CacheLayerMixin.register(Layer)

Kept = Policy | Compression | Offload | Share | Pages
"""Says how much of the past a layer keeps, where, or for how many rows."""
Make = Callable[[int], Layer]
"""Makes the cache layer for an attention layer's index."""

_made: dict[int, Make] = {}
"""Cache layer factories inside `sparse(cache=...)`, by the id of the model's config."""


def _growing(index: int) -> Layer:
    return Growing()


@contextmanager
def keeping(model: Any, cache: Kept | Mapping[int, Kept] | None, layers: int) -> Iterator[None]:
    """Make caches that begin inside the block keep what a policy, compression or offload says."""
    if cache is None:
        yield
        return
    policies = cache if isinstance(cache, Mapping) else dict.fromkeys(range(layers), cache)
    for number, policy in policies.items():
        if not isinstance(policy, Kept) or number not in range(layers):
            raise SparseFlashError(
                f"cache={{{number!r}: {policy!r}}}: expected a policy, a compression, where to offload, "
                "that prompts are shared or that keys lie in pages, such as sf.cache.SnapKV(), "
                "sf.cache.Mustafar(), sf.cache.Offload(folder), sf.cache.Share() or sf.cache.Pages(), or a "
                f"mapping from the numbers of layers, 0..{layers - 1}, to such"
            )

    ropes = {n: rope_of(model, n) for n, how in policies.items() if isinstance(how, Policy) and how.renumber}

    others = None if any(isinstance(how, Offload) for how in policies.values()) else Everything()

    def make(index: int) -> Layer:
        how = policies.get(index, others)
        if how is None:
            return Growing()
        if isinstance(how, Offload):
            return Offloaded(how)
        if isinstance(how, Compression):
            return Compressed(how)
        if isinstance(how, Share):
            return Shared(how)
        if isinstance(how, Pages):
            return Paged(how)
        return Evicting(how, layer=index, layers=layers, rope=ropes.get(index))

    config = model.config
    parts = {id(x) for x in (config, config.get_text_config(decoder=True))}
    before = {part: _made.get(part) for part in parts}
    _made.update(dict.fromkeys(parts, make))
    try:
        yield
    finally:
        for part, old in before.items():
            if old is None:
                _made.pop(part, None)
            else:
                _made[part] = old


def roomy(cache: Any, config: Any) -> None:
    """Replace the layers of an empty `DynamicCache` by `Growing` ones, or by those of `keeping`.

    Caches that are filled, static, offloaded or of another class are unchanged, and so are sliding layers.
    """
    if cache is None:
        return
    make = _made.get(id(config))
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    layers = getattr(cache, "layers", [])
    if not plain or any(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
        if make is not None and not any(isinstance(layer, Attended) for layer in layers):
            warnings.warn(
                f"a {type(cache).__name__} that is not empty, or of a kind of its own, keeps its layers: the "
                "policy of sparse(cache=...) has no say in it. Begin with an empty DynamicCache",
                stacklevel=2,
            )
        return
    make = make or _growing
    if cache.layer_class_to_replicate is DynamicLayer and not layers:
        cache.layer_class_to_replicate = _Counted(cache, make)
    for n, layer in enumerate(layers):
        layers[n] = _behind(layers[:n], make(n)) if type(layer) is DynamicLayer else layer


def rope_of(model: Any, layer: int) -> Tensor:
    """The inverse frequencies `[D / 2]` of a model's rotary embedding in a layer.

    Raises
    ------
    SparseFlashError
        If the model has none, or they change with the length.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else ""
    for module in model.modules():
        for name, key in ((f"{kind}_inv_freq", kind), ("inv_freq", "")):
            found = getattr(module, name, None)
            if not isinstance(found, Tensor):
                continue
            how = getattr(module, "rope_type", "default")
            how = how.get(key, "default") if isinstance(how, dict) else how
            if how not in ("dynamic", "longrope"):
                return found
            raise SparseFlashError(
                f"{type(model).__name__} rotates keys by frequencies that change with the length ({how}): a "
                "policy cannot renumber them. Leave renumber=True out"
            )
    raise SparseFlashError(
        f"{type(model).__name__} has no rotary embedding with inverse frequencies (inv_freq): a policy "
        "cannot renumber its keys. Leave renumber=True out"
    )


@torch.no_grad()
def read(
    model: Any, ids: Tensor, *, chunk: int = 256, question: Tensor | None = None, cache: Any = None
) -> Any:
    """Read a text in chunks, into a cache whose policy evicts between them: memory for a chunk and a budget.

    Call it inside `sparse(model, cache=policy)`. Before each chunk the question, if given, attends to the
    held keys without being appended: policies that use attention follow it (`cache.Citrus`, `cache.SnapKV`).

    Parameters
    ----------
    model : PreTrainedModel
        The model, inside `sparse`.
    ids : Tensor
        Integers `[B,T]`, without padding.
    chunk : int
        Tokens per chunk. The policy should keep the newest chunk: `recent=chunk`.
    question : Tensor, optional
        Integers `[B,n]`: the question that will be asked about the text.
    cache : Cache, optional
        Cache to continue.

    Returns
    -------
    Cache
        Cache for `generate`, whose input is the whole text and what follows it.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> book, question = torch.randint(3, 100, (1, 300)), torch.randint(3, 100, (1, 7))
    >>> with sf.transformers.sparse(model, cache=sf.cache.Citrus(budget=96, recent=64)):
    ...     cache = sf.transformers.read(model, book, chunk=64, question=question)
    >>> cache.get_seq_length(), int(cache.layers[0].held.max())
    (300, 140)
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise SparseFlashError(f"chunk={chunk!r}: expected a positive int, tokens")
    cache = DynamicCache(config=model.config) if cache is None else cache
    for part in ids.split(chunk, 1):
        if question is not None and cache.get_seq_length():
            with asking(cache):
                model(question, past_key_values=cache, logits_to_keep=1)
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


@contextmanager
def asking(cache: Any) -> Iterator[None]:
    """Mark what the model reads inside the block as a question: policies see it, no layer appends it."""
    other = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, Evicting)}
    if other:
        raise SparseFlashError(
            f"a question that is not kept, and layers of kind {', '.join(sorted(other))}, which keep all "
            "that they read: expected those of a policy in every layer, sparse(model, cache=policy)"
        )
    try:
        for layer in cache.layers:
            layer.asking = True
        yield
    finally:
        for layer in cache.layers:
            layer.asking = False


def attend(
    module: Any,
    layer: Attended,
    setting: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SparseMask,
    options: dict[str, Any],
) -> Tensor:
    """Attention of a layer whose cache computes it (`Attended`), since no tensor of all keys exists."""
    layer.taken()
    if mask.documents:
        raise SparseFlashError(
            f"{type(module).__name__}: packed documents in a cache that evicts or compresses: give it one "
            "document a row"
        )
    new = None
    if setting is not None:
        if layer.is_initialized and q.shape[2] == 1 and setting.decode is not None:
            raise SparseFlashError(
                f"{type(module).__name__}: a method for decode reads a cache that keeps everything: set "
                "decode= or cache=, not both"
            )
        if not layer.is_initialized and q.shape[2] > 1:

            def new(q: Tensor, k: Tensor, v: Tensor, among: Any, **own: Any) -> Tensor:
                return setting(module, q, k, v, mask, own)

    def run() -> Tensor:
        return layer.attend(q, k, v, among=mask.plan, real=mask.tokens, new=new, **options)

    return run() if setting is None or new is not None else setting.of_cache(layer, q, run)


def layer_of(cache: Any, module: Any) -> Growing | None:
    """The cache layer that an attention module appends to, if it is a `Growing` one; else None."""
    layers, at = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    if not isinstance(layers, list) or not isinstance(at, int) or at >= len(layers):
        return None
    return layers[at] if isinstance(layers[at], Growing) else None


class _Counted:
    """Factory of the next layer of a cache that creates layers lazily."""

    def __init__(self, cache: Any, make: Make) -> None:
        self.layers, self.make = cache.layers, make

    def __call__(self) -> Layer:
        return _behind(self.layers, self.make(len(self.layers)))


def _behind(layers: list[Layer], new: Layer) -> Layer:
    """Register `new` as the `following` layer of the last one, if both are offloaded; returns `new`."""
    if isinstance(new, Offloaded) and layers and isinstance(layers[-1], Offloaded):
        layers[-1].following = new
    return new
