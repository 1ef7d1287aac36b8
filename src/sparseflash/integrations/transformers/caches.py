"""Caches of our own: what takes the place of a dynamic cache's layers while it is empty."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from ...cache import Attended, Compressed, Compression, Everything, Evicting, Growing, Layer, Policy
from ...errors import SparseFlashError
from .mask import SparseMask

CacheLayerMixin.register(Layer)

Kept = Policy | Compression
"""What says how much of the past a layer keeps."""
Make = Callable[[int], Layer]
"""A layer for the attention layer of that number."""

_made: dict[int, Make] = {}
"""By the id of a model's config: the layers of the caches that it makes, inside of `sparse(cache=...)`."""


def _growing(index: int) -> Layer:
    return Growing()


@contextmanager
def keeping(model: Any, cache: Kept | Mapping[int, Kept] | None, layers: int) -> Iterator[None]:
    """Let a policy or a compression say what caches keep that begin inside of the block."""
    if cache is None:
        yield
        return
    policies = cache if isinstance(cache, Mapping) else dict.fromkeys(range(layers), cache)
    for number, policy in policies.items():
        if not isinstance(policy, Kept) or number not in range(layers):
            raise SparseFlashError(
                f"cache={{{number!r}: {policy!r}}}: expected a policy or a compression, such as "
                f"sf.cache.SnapKV() or sf.cache.Mustafar(), or a mapping from the numbers of layers, "
                f"0..{layers - 1}, to such"
            )

    def make(index: int) -> Layer:
        how = policies.get(index, Everything())
        return Compressed(how) if isinstance(how, Compression) else Evicting(how, layer=index, layers=layers)

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
    """Give an empty `DynamicCache` layers that do not copy themselves for each token, or those of a policy.

    Whatever is filled, static, offloaded or of another kind stays as it is, and so do its layers that slide.
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
    layers[:] = [make(n) if type(layer) is DynamicLayer else layer for n, layer in enumerate(layers)]


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
    """Attention of a layer whose cache attends itself: it has no tensor of all keys."""
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

    real = mask.tokens
    if real is not None and bool(real.all()):
        real = None
    return layer.attend(q, k, v, among=mask.plan, real=real, new=new, **options)


def layer_of(cache: Any, module: Any) -> Growing | None:
    """The layer of a cache that an attention module appends to, if it keeps all keys and is one of ours."""
    layers, at = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    if not isinstance(layers, list) or not isinstance(at, int) or at >= len(layers):
        return None
    return layers[at] if isinstance(layers[at], Growing) else None


class _Counted:
    """Makes the next layer of a cache that has none yet."""

    def __init__(self, cache: Any, make: Make) -> None:
        self.layers, self.make = cache.layers, make

    def __call__(self) -> Layer:
        return self.make(len(self.layers))
