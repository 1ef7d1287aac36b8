"""Dynamic-mask attention: each KV head keeps the keys whose learned scores are largest so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..methods.dynamic_mask import DynamicMask
from ..ops._arguments import AnyPlan
from ..ops.rows import take_rows
from .base import Layer, Positions, State, check_choice, check_sizes, rms


class DynamicMaskAttention(Layer):
    """Each query attends to the `window` earlier keys with the largest learned scores, added to its logits.

    `delta_j = exp(a * softplus(W_d v_j))` is one score per KV head and key, computed from the values of all
    KV heads. Query i attends to the `window` largest of `delta_0 .. delta_i` (the later of equal ones, so an
    untrained layer is a sliding window): `o_i = softmax_j(q_i . k_j / sqrt(D) + delta_j) v_j`. The choice has
    no gradient; the scores have one, through the logits.

    Paper: Shi et al., "Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124.

    Parameters
    ----------
    width, heads, kv_heads, head_dim, positions, base, dropout
        As in `Layer`; positions are rotary by default.
    window : int
        Maximum number of keys per query.
    exponential : bool
        False omits the exponential, as later versions of the authors' code do.
    normed : bool
        Whether queries and keys are RMS-normalised before rotation (the authors' are).

    Notes
    -----
    The state holds the `window` best keys, whatever the length. `sparseflash.methods.DynamicMask` makes the
    same choice for models with layers of their own.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.DynamicMaskAttention(64, 4, kv_heads=2, window=16)
    >>> x = torch.randn(2, 100, 64)
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-5), state.tensors["k"].shape[2]
    (True, 16)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 2048,
        exponential: bool = True,
        normed: bool = True,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Positions = "rotary",
        base: float = 10_000.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, positions=positions, base=base)
        self.leave_out(dropout)
        check_sizes(1, window=window)
        self.method = DynamicMask(window)
        check_choice(exponential=(exponential, (True, False)), normed=(normed, (True, False)))
        self.window, self.exponential, self.normed = window, exponential, normed
        self.project_heads(device=device, dtype=dtype)
        self.number = self.linear(self.kv_heads * self.head_dim, self.kv_heads, False, device, dtype)
        self.slope = nn.Parameter(torch.empty(self.kv_heads, device=device, dtype=dtype))
        self.reset()

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Score the keys, then attend; x [B, T, width]."""
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        if self.normed:
            q, k = rms(q), rms(k)
        q, k = self.turn(q, state), self.turn(k, state)
        delta = DynamicMask.scores(v, self.number.weight, self.slope, exponential=self.exponential)
        past = 0
        if state is not None:
            old = [state.tensors.get(name) for name in ("k", "v", "delta")]
            k, v, delta = (y if z is None else torch.cat([z, y], 2) for z, y in zip(old, (k, v, delta)))
            past = k.shape[2] - x.shape[1]
        out = self.method(q, k, v, q_offset=past, ctx={"delta": delta}, dropout_p=self.dropout_p)
        if state is not None:
            best = delta.detach().argsort(dim=-1, stable=True)[..., -self.window :].sort(-1).values
            state.tensors.update(k=take_rows(k, best), v=take_rows(v, best), delta=delta.gather(-1, best))
        return self.end(out)

    def extra_repr(self) -> str:
        """One-line description of the shape and budget."""
        return f"{super().extra_repr()}, window={self.window}, exponential={self.exponential}"
