"""Queries, keys and values of a real model, as benchmark input: noise has no structure to find.

Whatever calls ``torch.nn.functional.scaled_dot_product_attention`` is heard, without touching the model, such
as those of Transformers with ``attn_implementation="sdpa"``. Models of ``sparseflash train`` are heard under
any attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparseflash.errors import SparseFlashError
from sparseflash.files import no_file, replacing
from sparseflash.train.attention import Attention
from sparseflash.train.sample import load_model

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
            self.keep(*(given[x] for x in ("query", "key", "value")))
        return func(*args, **kwargs)

    def keep(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take a copy of one call."""
        self.calls.append((q.detach().clone(), k.detach().clone(), v.detach().clone()))


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
            "the model never called scaled_dot_product_attention: load it with attn_implementation='sdpa'"
        )
    return _named(heard, layers)


@torch.no_grad()
def of_run(directory: Path, text: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """What the layers of a run of ``sparseflash train`` see in bytes [B, T]; see `capture`."""
    model, _ = load_model(directory)
    heard = Capture()
    for block in model.blocks:
        block.attention.attention = _Heard(heard, block.attention.attention)
    model(text)
    return _named(heard, layers)


def of_model(name: str, text: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """What the layers of a causal model of Transformers see in bytes [1, T]; see `capture`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa").eval()
    said = bytes(text[0].to(torch.uint8).tolist()).decode("utf-8", "replace")
    tokens = AutoTokenizer.from_pretrained(name)(said, return_tensors="pt").input_ids
    return capture(lambda: model(tokens), layers)


@dataclass(frozen=True)
class _Heard:
    """An attention whose calls are kept."""

    heard: Capture
    attention: Attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.heard.keep(q, k, v)
        return self.attention(q, k, v)


def _named(heard: Capture, layers: Sequence[int]) -> dict[str, Tensor]:
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
    with replacing(Path(path)) as temporary:
        save_file(half, temporary, metadata=dict(about))
    return size


def inputs(
    path: str | Path, *, layer: int | None = None, dtype: torch.dtype
) -> Callable[[int], list[Tensor]]:
    """A function of the length that returns q, k, v and dout of a captured layer's first tokens.

    q, k and v want gradients; dout is normal. The layer in the middle is taken where none is named.
    """
    try:
        if kind := no_file(path):
            raise SparseFlashError(f"{path} is {kind}: expected a capture (safetensors)")
        with safe_open(path, "pt") as file:
            names = sorted({int(name.split(".")[1]) for name in file.keys()})
            chosen = names[len(names) // 2] if layer is None else layer
            if chosen not in names:
                raise SparseFlashError(f"{path} has no layer {layer}; it has {', '.join(map(str, names))}")
            whole = [file.get_tensor(f"layer.{chosen}.{x}").to(dtype) for x in NAMES]
    except SparseFlashError:
        raise
    except (OSError, ValueError, IndexError, SafetensorError) as error:
        raise SparseFlashError(f"{path} is no capture: {error}") from None
    for name, x in zip(NAMES, whole):
        if x.dim() != 4 or x.shape[2] != whole[0].shape[2] or not bool(x.isfinite().all()):
            raise SparseFlashError(
                f"{path} is no capture: layer.{chosen}.{name} is {list(x.shape)}, expected finite [B,H,T,D]"
            )

    def of(length: int) -> list[Tensor]:
        have = whole[0].shape[2]
        if length > have:
            raise SparseFlashError(f"{path} has {have} tokens; --lengths asks for {length}")
        q, k, v = (x[:, :, :length].contiguous() for x in whole)
        generator = torch.Generator().manual_seed(0)
        dout = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(dtype)
        return [x.requires_grad_() for x in (q, k, v)] + [dout]

    return of
