"""Positions of video and text tokens in the sequences of each transformer class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ...common.errors import SparseFlashError


class Layout(NamedTuple):
    """Token layout of one call of a transformer."""

    grid: tuple[int, ...] | None
    """Numbers of tokens along each axis, outermost first; None if the call does not tell."""
    text: tuple[int, int]
    """Numbers of text tokens before and after the video, in the self-attention's sequences."""


Given = Mapping[str, Any]
"""The arguments of a call, by name."""


def _volume(shape: Any, patch: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(n // p for n, p in zip(shape, patch, strict=True))


def _wan(config: Any, given: Given) -> Layout:
    return Layout(_volume(given["hidden_states"].shape[2:], config.patch_size), (0, 0))


def _hunyuan(config: Any, given: Given) -> Layout:
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    text = given["encoder_hidden_states"].shape[1]
    return Layout(_volume(given["hidden_states"].shape[2:], patch), (0, text))


def _ltx(config: Any, given: Given) -> Layout:
    sizes = tuple(given.get(name) for name in ("num_frames", "height", "width"))
    return Layout(None if None in sizes else sizes, (0, 0))


def _flux(config: Any, given: Given) -> Layout:
    ids, text = given["img_ids"], given["encoder_hidden_states"].shape[1]
    places = ids[0] if ids.dim() == 3 else ids
    rows, columns = (int(places[:, n].max() - places[:, n].min()) + 1 for n in (1, 2))
    whole = rows * columns == given["hidden_states"].shape[1]  # false with appended reference images
    return Layout((rows, columns) if whole else None, (text, 0))


def _cogvideox(config: Any, given: Given) -> Layout:
    frames, _, height, width = given["hidden_states"].shape[1:]
    patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    return Layout(_volume((frames, height, width), patch), (given["encoder_hidden_states"].shape[1], 0))


LAYOUTS: dict[str, Callable[[Any, Given], Layout]] = {
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "LTXVideoTransformer3DModel": _ltx,
    "FluxTransformer2DModel": _flux,
    "CogVideoXTransformer3DModel": _cogvideox,
}
"""Layout function of each supported transformer class."""

_SELF = re.compile(r"^(transformer_blocks|single_transformer_blocks|blocks)\.\d+\.(attn|attn1)$")


def layout_of(transformer: nn.Module) -> Callable[[Any, Given], Layout]:
    """The layout function for a transformer's class.

    Raises
    ------
    SparseFlashError
        If the class is not in the table; the message lists those that are.
    """
    name = type(transformer).__name__
    if name not in LAYOUTS:
        raise SparseFlashError(
            f"{name}: where its text and its video lie is not known; known are {', '.join(LAYOUTS)} "
            "(integrations/diffusers/layouts.py has a row for each)"
        )
    return LAYOUTS[name]


def self_attention(transformer: nn.Module) -> dict[str, nn.Module]:
    """The self-attention layers of the transformer's blocks, by name, in order."""
    return {name: module for name, module in transformer.named_modules() if _SELF.match(name)}
