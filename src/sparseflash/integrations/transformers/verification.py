"""`verify(model, ...)`: checks that a model computes the same on these kernels as on its own attention."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...common.errors import SparseFlashError
from .control import Choice, attached, sparse
from .layers import attention_layers, bare
from .pretrained import load


@dataclasses.dataclass(frozen=True)
class Difference:
    """Relative difference of one layer's outputs, in Frobenius norm."""

    layer: str
    error: float
    allowed: float


def verify(
    model: Any,
    prefill: Choice = None,
    layers: Iterable[int | str] | int | str | None = None,
    against: str | None = None,
    text: str | None = None,
    **inputs: Any,
) -> list[Difference]:
    """Run a model on its own attention and on "sparse", and compare every attention layer.

    Parameters
    ----------
    model : PreTrainedModel, str or path
        As for `sparse`, whose settings are ignored while this runs. Or an argument of `load`: `smollm2`,
        `gemma3`, a folder, a Transformers name.
    prefill, layers
        A method at full budget, such as `HashSparse(nb=1)`, and its layers, as for `sparse`. None: dense.
    against : str, optional
        Reference implementation; None: the current one, or "eager" if that is "sparse".
    text : str, optional
        Input text in place of `input_ids`, for a model given by name.
    **inputs
        Arguments of the model's forward. With a 2-d `attention_mask`, only real tokens are compared.

    Returns
    -------
    list of Difference
        One for each attention layer call, in order: all within half the digits of the model's dtype.

    Raises
    ------
    SparseFlashError
        If layers differ, naming the first one; and for a name that `load` refuses.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> found = sf.transformers.verify(model, input_ids=torch.arange(100)[None])
    >>> [x.layer for x in found]
    ['model.layers.0.self_attn', 'model.layers.1.self_attn']

    A pretrained model that `make models` installs, on any text:

    >>> found = sf.transformers.verify("smollm2", text="Call me Ishmael.")  # doctest: +SKIP
    """
    named = isinstance(model, (str, os.PathLike))
    if not named and text is not None:
        raise SparseFlashError("text= is for a model by its name, whose tokenizer is known: give input_ids=")
    if named:
        model, tokenizer = load(model)
        if text is not None:
            inputs = {**tokenizer(text, return_tensors="pt"), **inputs}
        if not inputs:
            raise SparseFlashError("verify of a model by its name: give text= or input_ids=")
    model = bare(model)
    before = model.config._attn_implementation
    stock = against or ("eager" if before == "sparse" else before)
    every = attention_layers(model)
    with attached(every, [None] * len(every)):
        try:
            model.set_attn_implementation(stock)
            want = _outputs(model, inputs)
        finally:
            model.set_attn_implementation(before)
        with sparse(model, prefill=prefill, layers=layers if prefill is not None else "*"):
            got = _outputs(model, inputs)
    found = []
    for (name, a), (_, b) in zip(got, want, strict=True):
        error = float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float32).tiny))
        found.append(Difference(name, error, torch.finfo(_dtype(model)).eps ** 0.5))
        if not found[-1].error <= found[-1].allowed:
            raise SparseFlashError(
                f"{name} is the first layer that differs from {stock!r}: by {error:.2g} of its output's "
                f"size, allowed are {found[-1].allowed:.2g}; {len(found) - 1} layers before it agree"
            )
    return found


def _dtype(model: Any) -> torch.dtype:
    """Floating point dtype of the parameters with the largest eps."""
    kinds = {x.dtype for x in model.parameters() if x.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


@torch.no_grad()
def _outputs(model: Any, inputs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Outputs of each attention layer, in call order, at real tokens only."""
    found: list[tuple[str, Tensor]] = []
    mask = inputs.get("attention_mask")

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            x = (out[0] if isinstance(out, tuple) else out).detach().float()
            if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[:2] == x.shape[:2]:
                x = x[mask.bool()]
            found.append((name, x))

        return hook

    hooks = [x.module.register_forward_hook(keep(x.name)) for x in attention_layers(model)]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
