"""Softmax attention with projections, over the keys that a method or a plan selects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.errors import require
from ..methods.base import Method, get
from ..methods.sink_window import SinkWindow
from ..methods.window import Window
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..plan.options import is_count
from .base import Layer, Positions, State, rms


class SelfAttention(Layer):
    """Projections around attention: dense, over any method, or over the caller's plan.

    `out = W_o concat_h attend(q_h, k_h, v_h)` with `q, k, v = W_q x, W_k x, W_v x`, and q and k rotated by
    their positions. Without a method, every token attends to all tokens up to itself.

    Parameters
    ----------
    width, heads, kv_heads, head_dim, positions, base, dropout
        As in `Layer`; positions are rotary by default.
    method : Method or str, optional
        Method that selects keys: an instance, or a name of `sparseflash.methods`.
    causal : bool
        Only without a method: False lets every token attend to all tokens (then there is no state).
    normed : bool
        Whether queries and keys are RMS-normalised before rotation.
    bias : bool
        Whether projections have a bias.
    context : mapping, optional
        Mapping that the method reads at every call (`ctx`), such as the step; it is kept by reference.

    Notes
    -----
    The state caches all keys and values; with `Window` and `SinkWindow` at most twice those that a later
    query attends to. A method can decode if its `decodes` is true: token by token it selects the same keys as
    at once.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.SelfAttention(64, 4, kv_heads=2, method="window")
    >>> x = torch.randn(2, 100, 64)
    >>> layer(x).shape
    torch.Size([2, 100, 64])
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-5)
    True
    """

    takes_plan = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        method: Method | str | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Positions = "rotary",
        base: float = 10_000.0,
        dropout: float = 0.0,
        causal: bool = True,
        normed: bool = False,
        bias: bool = False,
        context: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, positions=positions, base=base)
        self.leave_out(dropout)
        method = get(method) if isinstance(method, str) else method
        require(
            (
                method is None or isinstance(method, Method),
                lambda: f"method: {type(method).__name__}; expected a Method, or its name",
            ),
            (isinstance(causal, bool), lambda: f"causal={causal!r}: expected True or False"),
            (causal or method is None, "causal=False beside a method: causality is a setting of the method"),
        )
        self.method, self.causal, self.normed = method, causal, normed
        self.context = {} if context is None else context
        self.project_heads(bias=bias, device=device, dtype=dtype)
        self.reset()

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Project, select and attend; x [B, T, width]."""
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        if self.normed:
            q, k = rms(q), rms(k)
        q, k = self.turn(q, state), self.turn(k, state)
        offset = 0
        if state is not None:
            k, v = state.append(k=k, v=v)
            offset = k.shape[2] - x.shape[1]  # index into the cache; distances to the kept keys stay right
        if plan is not None:
            out = attention(q, k, v, plan, dropout_p=self.dropout_p)
        elif self.method is not None:
            at = None if state is None else offset
            out = self.method(q, k, v, ctx=self.context, q_offset=at, dropout_p=self.dropout_p)
        else:
            at = offset if self.causal else 0
            out = attention(q, k, v, causal=self.causal, q_offset=at, dropout_p=self.dropout_p)
        if state is not None:
            forget(self.method, state)
        return self.end(out)

    def new_state(self, batch: int) -> State:
        """Make an empty cache."""
        require(
            (
                self.causal and getattr(self.method, "causal", True),
                "causal=False: tokens see later ones, so there is no state",
            ),
            (
                self.method is None or self.method.decodes,
                lambda: f"{self.method!r} does not decode: what a token sees depends on the whole sequence",
            ),
        )
        return super().new_state(batch)

    def extra_repr(self) -> str:
        """One-line description of the shape and method."""
        own = f", method={self.method!r}" if self.method is not None else ""
        return super().extra_repr() + own + ("" if self.causal else ", causal=False")


def forget(method: Method | None, state: State) -> None:
    """Drop cached keys that no later query of the method attends to, once they are more than half."""
    if not isinstance(method, (Window, SinkWindow)) or not is_count(method.window):
        return  # per-head windows: keep all keys
    sink, near = method.sink_tokens if isinstance(method, SinkWindow) else 0, method.window - 1
    for name, x in state.tensors.items():
        n = x.shape[2]
        if n > 2 * (sink + near) and n > sink + near:
            state.tensors[name] = torch.cat([x[:, :, :sink], x[:, :, max(sink, n - near) :]], 2)
