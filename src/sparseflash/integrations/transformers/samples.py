"""Samples of one prompt: `generate` repeats the prompt for each, and a model inside of this reads it once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...cache import Share


@contextmanager
def read_once(model: nn.Module, cache: Any) -> Iterator[None]:
    """Let a model read rows that are equal once, where `cache` says that they share a prompt.

    `generate(num_return_sequences=n)`, and beams, give each prompt n times to the first forward. Inside of
    this the model runs on the rows that differ; logits, and the layers of the cache, are then those of all.
    """
    shared = any(isinstance(x, Share) for x in (cache.values() if isinstance(cache, Mapping) else [cache]))
    if not shared:
        yield
        return
    reader = _Reader()
    handles = [
        model.register_forward_pre_hook(reader.before, with_kwargs=True),
        model.register_forward_hook(reader.after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reader:
    """What the two hooks know of the call that runs."""

    of: Tensor | None = None
    """Of each row that was given: the row that is read in its place; None: all are read."""

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave one of each row in what the model is given, at the beginning of a cache."""
        self.of = None
        if torch.compiler.is_compiling():
            return None
        named = dict(zip(("input_ids",), args)) | kwargs
        ids, mask, cache = (named.get(x) for x in ("input_ids", "attention_mask", "past_key_values"))
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) < 2 or cache is None:
            return None
        if cache.get_seq_length() or isinstance(mask, Tensor) and mask.shape != ids.shape:
            return None
        beside = [x for x in (kwargs.get("inputs_embeds"), kwargs.get("labels")) if x is not None]
        rows = ids if mask is None else torch.cat([ids, mask.to(ids.dtype)], 1)
        kinds, of = torch.unique(rows, dim=0, return_inverse=True)
        if beside or len(kinds) == len(ids):
            return None
        at = torch.stack([(of == n).nonzero()[0, 0] for n in range(len(kinds))])
        self.of, batch = of, len(ids)

        def one_of_each(x: Any) -> Any:
            return x[at] if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch else x

        return tuple(map(one_of_each, args)), {name: one_of_each(x) for name, x in kwargs.items()}

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """All rows again, of what the model returns and of the cache."""
        of, self.of = self.of, None
        if of is None:
            return None
        kinds, cache = int(of.max()) + 1, kwargs["past_key_values"]
        for layer in cache.layers:
            layer.batch_select_indices(of)

        def all_rows(x: Any) -> Any:
            return x[of] if isinstance(x, Tensor) and x.dim() and x.shape[0] == kinds else x

        return tree_map(all_rows, out)
