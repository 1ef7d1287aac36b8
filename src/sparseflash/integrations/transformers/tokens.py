"""What a model receives about its tokens but does not pass to attention: modality and video grid."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Config fields with the ids of image and video tokens; "index" in older configs."""


CANVAS = {"decoder_input_ids", "self_conditioning_logits", "past_key_values"}
"""Arguments by which a decoder that denoises a canvas is known (DiffusionGemma)."""


class Tokens(NamedTuple):
    """Tokens of one call of a model: modality of each new token, and video shape in tokens.

    `modality [B, S, 1]`: 0 text, 1 image or video. `grid`: (frames, rows, columns) of the first video, else
    of the first image; None: unknown.
    """

    modality: Tensor
    grid: tuple[int, ...] | None


class Patches(NamedTuple):
    """An image that a vision model is given, in patches; class and register tokens come before them."""

    patches: tuple[int, int]


class Ear:
    """Holds the `Tokens` or `Patches` of the running call."""

    def __init__(self) -> None:
        self.tokens: Tokens | Patches | None = None
        self.denoising: dict[str, int] = {}
        """Inside of a decoder that denoises: step, steps (if known), and `generated`, the canvas."""
        self._step, self._read = -1, -1

    def hook(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        if not torch.compiler.is_compiling():
            named = dict(zip((getattr(model, "main_input_name", "input_ids"),), args)) | kwargs
            self.tokens = read(getattr(model, "config", None), named)

    def denoises(self, steps: int | None, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a decoder of canvases (block diffusion): counts the steps of each canvas."""
        canvas = kwargs.get("decoder_input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if torch.compiler.is_compiling() or not isinstance(canvas, Tensor) or cache is None:
            return
        read = int(cache.get_seq_length())
        again = kwargs.get("self_conditioning_logits") is not None and read == self._read
        self._step, self._read = self._step + 1 if again else 0, read
        self.denoising = {"step": self._step, "generated": canvas.shape[1]}
        self.denoising |= {} if steps is None else {"steps": steps}

    def denoised(self, *given: Any) -> None:
        """Forward hook of that decoder."""
        self.denoising = {}


@contextmanager
def heard(model: nn.Module) -> Iterator[Ear]:
    """Hook an `Ear` onto the forward of a model, and of a decoder of canvases inside it."""
    ear = Ear()
    handles = [model.register_forward_pre_hook(ear.hook, with_kwargs=True)]
    steps = getattr(getattr(model, "generation_config", None), "max_denoising_steps", None)
    for part in model.modules():
        takes = inspect.signature(part.forward).parameters.keys()
        if takes >= CANVAS and "input_ids" not in takes:
            begin = functools.partial(ear.denoises, steps)
            handles.append(part.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(part.register_forward_hook(ear.denoised, always_call=True))
    try:
        yield ear
    finally:
        for handle in handles:
            handle.remove()


def read(config: Any, given: Mapping[str, Any]) -> Tokens | Patches | None:
    """Read the tokens from a model's arguments; None for a text-only model."""
    pixels, size = given.get("pixel_values"), getattr(config, "patch_size", None)
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and "input_ids" not in given and size:
        rows, columns = (size, size) if isinstance(size, int) else size
        return Patches((pixels.shape[-2] // rows, pixels.shape[-1] // columns))
    kinds, ids = given.get("mm_token_type_ids"), given.get("input_ids")
    known = {name: x for name in _NAMES if isinstance(x := getattr(config, name, None), int)}
    videos = {x for name, x in known.items() if name.startswith("video")}
    if isinstance(kinds, Tensor) and kinds.dim() == 2:
        modality, of_video = (kinds > 0).long(), kinds == 2
    elif isinstance(ids, Tensor) and ids.dim() == 2 and known:
        modality = sum((ids == x for x in known.values()), torch.zeros_like(ids, dtype=torch.bool)).long()
        of_video = sum((ids == x for x in videos), torch.zeros_like(ids, dtype=torch.bool))
    else:
        return None
    return Tokens(modality[..., None], _grid(config, given, of_video))


def _grid(config: Any, given: Mapping[str, Any], of_video: Tensor) -> tuple[int, ...] | None:
    """Grid from the sizes passed to the model, or from its video frames and their number of tokens."""
    vision = getattr(config, "vision_config", None)
    for name in ("video_grid_thw", "image_grid_thw"):
        sizes = given.get(name)
        if isinstance(sizes, Tensor) and len(sizes):
            merged = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", 1)
            frames, rows, columns = sizes[0].tolist()
            return frames, rows // merged, columns // merged
    pixels, there = given.get("pixel_values_videos"), int(of_video.sum())
    if not (isinstance(pixels, Tensor) and pixels.dim() == 5 and there):
        return None
    videos, frames = pixels.shape[:2]
    area = there // (videos * frames)
    side = math.isqrt(area)
    if area * videos * frames != there:
        return None
    return (frames, side, side) if side * side == area else (frames, area)
