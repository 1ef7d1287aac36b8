"""Queries, keys and values of a real model, as benchmark input: noise has no structure to find.

Whatever calls ``torch.nn.functional.scaled_dot_product_attention`` is heard, without touching the model:
models of ``sparseflash train`` with dense attention, and those of Transformers with
``attn_implementation="sdpa"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparseflash.errors import SparseFlashError

NAMES = ("q", "k", "v")
MOST_MB = 8.0
"""What a capture in a repository may weigh."""


class Capture(TorchFunctionMode):
    """Keep q, k and v of each call of torch's attention inside the block, in order.

    Examples
    --------
    >>> import torch, torch.nn.functional as F
    >>> from sparseflash.bench.capture import Capture
    >>> with Capture() as heard:
    ...     out = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 4), is_causal=True)
    >>> [len(heard.calls), list(heard.calls[0][0].shape)]
    [1, [1, 2, 8, 4]]
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Pass every call on, after a look at attention."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args)) | kwargs
            q, k, v = (given[x].detach().clone() for x in ("query", "key", "value"))
            self.calls.append((q, k, v))
        return func(*args, **kwargs)


@torch.no_grad()
def capture(run: Callable[[], Any], layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """What the attention layers see while `run` runs a model once: ``layer.0.q`` and so on, [B, H, T, D].

    Parameters
    ----------
    run : callable
        One forward pass, such as ``lambda: model(tokens)``.
    layers : sequence of int
        Which calls to keep; by default all.

    Raises
    ------
    SparseFlashError
        If nothing called torch's attention, or not as often as `layers` wants.
    """
    with Capture() as heard:
        run()
    if not heard.calls:
        raise SparseFlashError(
            "the model never called scaled_dot_product_attention: load it with attn_implementation='sdpa', "
            "or train it with --attention dense"
        )
    for layer in layers:
        if not 0 <= layer < len(heard.calls):
            raise SparseFlashError(
                f"layer {layer}: the model has attention layers 0 to {len(heard.calls) - 1}"
            )
    chosen = layers or range(len(heard.calls))
    return {f"layer.{n}.{name}": x for n in chosen for name, x in zip(NAMES, heard.calls[n])}


def save(
    tensors: Mapping[str, Tensor], path: str | Path, about: Mapping[str, str], *, most: float = MOST_MB
) -> float:
    """Write a capture as bf16 safetensors, with what it is of; returns its megabytes.

    Raises
    ------
    SparseFlashError
        If it would be larger than `most` megabytes.
    """
    half = {name: x.to(torch.bfloat16).contiguous().cpu() for name, x in tensors.items()}
    size = sum(x.numel() * 2 for x in half.values()) / 2**20
    if size > most:
        raise SparseFlashError(
            f"the capture has {size:.1f} MB, more than {most:g}: take fewer layers or tokens"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(half, path, metadata=dict(about))
    return size


def inputs(
    path: str | Path, *, layer: int | None = None, dtype: torch.dtype
) -> Callable[[int], list[Tensor]]:
    """A function of the length that returns q, k, v and dout of a captured layer's first tokens.

    q, k and v want gradients; dout is normal. The layer in the middle is taken where none is named.
    """
    try:
        with safe_open(path, "pt") as file:
            names = sorted({int(name.split(".")[1]) for name in file.keys()})
            chosen = names[len(names) // 2] if layer is None else layer
            if chosen not in names:
                raise SparseFlashError(f"{path} has no layer {layer}; it has {', '.join(map(str, names))}")
            whole = [file.get_tensor(f"layer.{chosen}.{x}").to(dtype) for x in NAMES]
    except (OSError, ValueError, IndexError) as error:
        raise SparseFlashError(f"{path} is no capture: {error}") from None

    def of(length: int) -> list[Tensor]:
        have = whole[0].shape[2]
        if length > have:
            raise SparseFlashError(f"{path} has {have} tokens; --lengths asks for {length}")
        q, k, v = (x[:, :, :length].contiguous() for x in whole)
        generator = torch.Generator().manual_seed(0)
        dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(dtype)
        return [x.requires_grad_() for x in (q, k, v)] + [dout]

    return of
