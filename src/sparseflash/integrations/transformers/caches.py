"""Caches with room: what takes the place of a dynamic cache's layers while it is empty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from ...cache import Growing, Layer

CacheLayerMixin.register(Layer)

Make = Callable[[int], Layer]
"""A layer for the attention layer of that number."""


def roomy(cache: Any, make: Make = lambda index: Growing()) -> None:
    """Give an empty `DynamicCache` layers that do not copy themselves for each token.

    Whatever is filled, static, offloaded or of another kind stays as it is, and so do its layers that slide.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    if any(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
        return
    if cache.layer_class_to_replicate is DynamicLayer and not cache.layers:
        cache.layer_class_to_replicate = _Counted(cache, make)
    cache.layers[:] = [
        make(n) if type(layer) is DynamicLayer else layer for n, layer in enumerate(cache.layers)
    ]


class _Counted:
    """Makes the next layer of a cache that has none yet."""

    def __init__(self, cache: Any, make: Make) -> None:
        self.layers, self.make = cache.layers, make

    def __call__(self) -> Layer:
        return self.make(len(self.layers))
