"""What a model was told of its tokens, and does not hand on to attention: images, and their grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Where configurations keep the ids of tokens that stand for what is seen; "index" in older ones."""


class Tokens(NamedTuple):
    """Of one call of a model: which modality each new token is of, and the shape of its videos, in tokens.

    `modality [B, S, 1]`: 0 text, 1 image or video. `grid`: (frames, rows, columns) of the first video, or of
    the first image where there is none; None: not known.
    """

    modality: Tensor
    grid: tuple[int, ...] | None


class Ear:
    """Holds the tokens of the call that runs."""

    def __init__(self) -> None:
        self.tokens: Tokens | None = None

    def hook(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the model."""
        if not torch.compiler.is_compiling():
            named = dict(zip(("input_ids",), args)) | kwargs
            self.tokens = read(getattr(model, "config", None), named)


@contextmanager
def heard(model: nn.Module) -> Iterator[Ear]:
    """An ear at the forward of a model."""
    ear = Ear()
    handle = model.register_forward_pre_hook(ear.hook, with_kwargs=True)
    try:
        yield ear
    finally:
        handle.remove()


def read(config: Any, given: Mapping[str, Any]) -> Tokens | None:
    """What the arguments of a model say of its tokens; None for a model of text alone."""
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
    """By the sizes that a model was given, or by the frames of its videos and the tokens that are theirs."""
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
