"""Layers in parallel: some heads of one kind, some of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..common.errors import SparseFlashError
from ..ops._arguments import AnyPlan
from .base import Layer, State


@dataclass
class States(State):
    """One state for each of several layers."""

    parts: list[State] = field(default_factory=list)

    def detach_(self) -> States:
        """Call `State.detach_` on all parts."""
        for part in self.parts:
            part.detach_()
        return self


class Together(Layer):
    """The sum of several layers over the same x, equivalent to one layer with all their heads.

    The output projection of concatenated heads equals the sum over groups of heads: six local heads and two
    routing heads, as in the Routing Transformer, are a layer of six heads plus one of two.

    Parameters
    ----------
    *layers : Layer
        Layers of equal width; give each its `head_dim`, since `width / heads` would be that of a whole layer.

    Notes
    -----
    `aux_loss`, `update`, `reset` and states combine those of all parts; `positions` is "rotary" if any part's
    is.

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
            head_dim=2,  # unused: parts have their own
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
        """Sum the outputs of all layers for x; arguments go to each."""
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
        """Sum of the parts' auxiliary losses."""
        return torch.stack([layer.aux_loss for layer in self._parts()]).sum()

    def new_state(self, batch: int) -> States:
        """Make a state for each part."""
        return States(batch, parts=[layer.new_state(batch) for layer in self._parts()])

    @torch.no_grad()
    def update(self) -> None:
        """Call `update` on each part."""
        for layer in self._parts():
            layer.update()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Call `reset` on each part, in order."""
        for layer in self._parts():
            layer.reset(generator)

    def extra_repr(self) -> str:
        """One-line description of width and heads."""
        return f"{self.width}, {self.heads}, positions={self.positions!r}"
