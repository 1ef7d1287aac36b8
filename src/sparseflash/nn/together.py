"""Layers beside one another: some heads of one kind, some of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import SparseFlashError
from ..ops._arguments import AnyPlan
from .base import Layer, State


@dataclass
class States(State):
    """A state for each of several layers."""

    parts: list[State] = field(default_factory=list)

    def detach_(self) -> States:
        """`State.detach_` of all."""
        for part in self.parts:
            part.detach_()
        return self


class Together(Layer):
    """The sum of layers over the same x, which is one layer that has the heads of all.

    The output projection of concatenated heads is the sum of those of its parts: six heads that look around
    and two that route, as in the Routing Transformer, are a layer of six heads and one of two.

    Parameters
    ----------
    *layers : Layer
        Of one width; give each its `head_dim`, since `width / heads` would be that of a whole layer.

    Notes
    -----
    `aux_loss`, `update`, `reset` and states are those of all parts; `positions` are "rotary" if any has them.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> around = sf.nn.SelfAttention(64, 6, head_dim=8, method=sf.methods.Window(window=32))
    >>> route = sf.nn.RoutingAttention(64, 2, head_dim=8, clusters=4, window=16)
    >>> layer = sf.nn.Together(around, route)
    >>> x = torch.randn(2, 100, 64)
    >>> layer(x).shape, layer.heads, torch.equal(layer.aux_loss, route.aux_loss)
    (torch.Size([2, 100, 64]), 8, True)
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers or not all(isinstance(layer, Layer) for layer in layers):
            raise SparseFlashError(f"{[type(x).__name__ for x in layers]}: expected layers, at least one")
        widths = sorted({layer.width for layer in layers})
        if len(widths) > 1:
            raise SparseFlashError(f"layers of widths {widths}: expected one width")
        turns = any(layer.positions == "rotary" for layer in layers)
        super().__init__(
            widths[0],
            sum(layer.heads for layer in layers),
            head_dim=2,  # of no use: parts have their own
            positions="rotary" if turns else "none",
        )
        self.layers = nn.ModuleList(layers)

    def _parts(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(
        self,
        x: Tensor,
        *,
        plan: AnyPlan | None = None,
        state: State | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Add up what all layers make of x; arguments go to each."""
        layers = self._parts()
        if state is not None and not (isinstance(state, States) and len(state.parts) == len(layers)):
            raise SparseFlashError(f"state: {type(state).__name__}; expected Together.new_state(batch)")
        parts = state.parts if isinstance(state, States) else [None] * len(layers)
        found: list[Tensor] = [
            layer(x, plan=plan, state=part, cu_seqlens=cu_seqlens) for layer, part in zip(layers, parts)
        ]
        if state is not None:
            state.length += x.shape[1]
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]

    @property
    def aux_loss(self) -> Tensor:
        """The sum of those of the parts."""
        return torch.stack([layer.aux_loss for layer in self._parts()]).sum()

    def new_state(self, batch: int) -> States:
        """A state of each part."""
        return States(batch, parts=[layer.new_state(batch) for layer in self._parts()])

    @torch.no_grad()
    def update(self) -> None:
        """`update` of each part."""
        for layer in self._parts():
            layer.update()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """`reset` of each part, in their order."""
        for layer in self._parts():
            layer.reset(generator)

    def extra_repr(self) -> str:
        """The width, and the heads of all."""
        return f"{self.width}, {self.heads}, positions={self.positions!r}"
