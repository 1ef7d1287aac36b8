"""Find the attention layers of a model, and those that a caller selects."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from ...common.errors import SparseFlashError

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""Global name that the forward of every attention layer on Transformers' registry uses."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """An attention layer: its name in the model, its index, and the module."""

    name: str
    index: int
    module: nn.Module

    @property
    def windowed(self) -> bool:
        """Whether the model itself limits this layer to a window or chunk."""
        config, number = getattr(self.module, "config", None), getattr(self.module, "layer_idx", None)
        kinds = getattr(config, "layer_types", None)
        if kinds and number is not None and number < len(kinds):
            return kinds[number] in ("sliding_attention", "chunked_attention")
        return getattr(self.module, "sliding_window", getattr(config, "sliding_window", None)) is not None


def attention_layers(model: nn.Module) -> list[Layer]:
    """List every layer of a model that uses the attention registry, in module order.

    Raises
    ------
    SparseFlashError
        If there is none; the message lists the classes that look like attention.

    Examples
    --------
    >>> import sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> [layer.name for layer in sf.transformers.attention_layers(LlamaForCausalLM(config))]
    ['model.layers.0.self_attn', 'model.layers.1.self_attn']
    """
    found = [(name, m) for name, m in model.named_modules() if _follows(m)]
    if not found:
        alike = sorted({type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__})
        raise SparseFlashError(
            f"{type(model).__name__} has no layer that uses Transformers' attention registry"
            + (f" ({', '.join(alike)} compute attention themselves)" if alike else "")
            + ": use a model class that calls ALL_ATTENTION_FUNCTIONS (without trust_remote_code, where "
            "Transformers has the model itself), or call sparseflash.attention in its forward"
        )
    numbers = [getattr(m, "layer_idx", None) for _, m in found]
    unique = None not in numbers and len(set(numbers)) == len(numbers)
    return [Layer(name, numbers[i] if unique else i, m) for i, (name, m) in enumerate(found)]


def bare(model: nn.Module) -> nn.Module:
    """Unwrap a model from `DataParallel`, `DistributedDataParallel` or `torch.compile`."""
    while not hasattr(model, "config"):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            raise SparseFlashError(
                f"{type(model).__name__} has no config, and wraps no model that has one: expected a model of "
                "Transformers"
            )
        model = inner
    return model


def _follows(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and REGISTRY in code.co_names


def chosen(model: nn.Module, layers: Iterable[int | str] | int | str | None) -> list[Layer]:
    """Select layers by index, by name (with `*`), or by default all without a window of their own."""
    every = attention_layers(model)
    if layers is None:
        wide = [layer for layer in every if not layer.windowed]
        if not wide:
            raise SparseFlashError(
                f"every attention layer of {type(model).__name__} has a window of its own: name the layers "
                f"that are meant, e.g. layers=range({len(every)})"
            )
        return wide
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    picked: dict[str, Layer] = {}
    for one in wanted:
        hits = [
            layer
            for layer in every
            if (fnmatchcase(layer.name, one) if isinstance(one, str) else layer.index == one)
        ]
        if not hits:
            raise SparseFlashError(
                f"layers: {one!r} is none of {type(model).__name__}: it has {[x.index for x in every]}, "
                f"named {every[0].name!r} to {every[-1].name!r}"
            )
        picked |= {layer.name: layer for layer in hits}
    return list(picked.values())
