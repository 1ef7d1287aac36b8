"""Profiled: a profile assigns a method to every head of every layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..common.errors import SparseFlashError
from ..selection.calibrate import EVERY, Profile
from . import heads
from .base import Context, Method, Selection, get


@dataclass(frozen=True)
class Profiled(Method):
    """Each head of a layer uses the method that a profile names for it; all heads attend in one call.

    Heads with equal settings select together. "dense" in a profile is dense causal attention.

    Papers: settings per head, found once for a model: MInference, arXiv 2407.02490; MoA, 2406.14909.

    Parameters
    ----------
    profile : Profile
        Profile of the model: `calibrate.search` finds one, `Profile.load` and `Profile.from_minference` read
        one.

    Notes
    -----
    `ctx` keys: `layer`, the number of the layer, which every host passes (not needed by a profile for all
    layers, -1); `q_offset`, `state`, and the `reads` of the profile's methods.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> near, far = {"method": "window", "window": 16}, {"method": "dense"}
    >>> profile = sf.calibrate.Profile.of("a model", {3: [near, near, far, near]})
    >>> q, k, v = torch.randn(3, 1, 4, 256, 32)
    >>> method = sf.methods.Profiled(profile)
    >>> method(q, k, v, ctx={"layer": 3}).shape
    torch.Size([1, 4, 256, 32])
    """

    profile: Profile | None = None

    reads = ("layer", "q_offset", "state")
    paper = "arXiv 2407.02490"
    phases = ("prefill",)
    causal_selection = False

    def __post_init__(self) -> None:
        if self.profile is not None and not isinstance(self.profile, Profile):
            raise SparseFlashError(f"profile={self.profile!r:.80}: expected a Profile (Profile.load(path))")
        inner = (x for own in self._layers.values() for m in own if m is not None for x in m.reads)
        self._set(reads=tuple(dict.fromkeys((*type(self).reads, *inner))))
        for number, own in self._layers.items():  # built now, so that errors of a profile are raised early
            if not own:
                raise SparseFlashError(f"layer {number} of the profile has no heads: expected a setting each")

    @functools.cached_property
    def _layers(self) -> dict[int | None, tuple[Method | None, ...]]:
        known = () if self.profile is None else self.profile.layers
        return {number: tuple(_method(dict(setting)) for setting in own) for number, own in known}

    def methods(self, layer: int | None = None) -> tuple[Method | None, ...]:
        """The method of each query head of a layer; None is dense."""
        made = self._layers
        if self.profile is None:
            raise SparseFlashError(
                "Profiled() has no profile: make one with sparseflash.calibrate.search, or read one with "
                "Profile.load(path) or Profile.from_minference(path)"
            )
        found = made.get(layer, made.get(EVERY))
        if found is None:
            self.profile.heads(layer)  # raises, with the known layers
            raise AssertionError(layer)
        return found

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select with the methods of this layer's heads."""
        return Selection(**heads.select(self.methods((ctx or {}).get("layer")), q, k, ctx))

    def notes(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> dict[str, Tensor]:
        """Collect what this layer's methods say."""
        return heads.notes(self.methods((ctx or {}).get("layer")), q, k, ctx)

    def observe(
        self, q: Tensor, k: Tensor, out: Tensor, lse: Tensor, selection: Selection, ctx: Context
    ) -> Any:
        """Collect the states of this layer's methods."""
        return heads.observe(self.methods(ctx.get("layer")), q, k, out, lse, selection, ctx)


def _method(setting: dict[str, Any]) -> Method | None:
    slug = setting.pop("method")
    return None if slug == "dense" else get(slug, **setting)
