"""Lightning attention: linear attention with a decay per head, and a state of constant size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.linear import linear_attention
from .base import Layer, State, check_sizes


def slopes(heads: int) -> list[float]:
    """ALiBi slopes: `2 ** (-8 (h + 1) / H)` for a power of two; other H add slopes of the next power."""
    near = 1 << int(math.log2(heads))
    first = [2.0 ** (-8 * (h + 1) / near) for h in range(near)]
    return first + [2.0 ** (-4 * (2 * h + 1) / near) for h in range(heads - near)]


class LightningAttention(Layer):
    """Linear attention with exponential decay, layer norm and gate: constant time and memory per token.

    `o_t = sum_{j <= t} exp(-s_h (t - j)) (q_t . k_j) v_j` with `q, k, v = silu(W x)`, then
    `y = W_o (layer_norm(concat_h o) * sigmoid(W_2 W_1 x))`. There is no softmax and no positional embedding.

    Papers: Qin et al., "Lightning Attention-2", arXiv 2401.04658; Qin et al., "TransNormerLLM", arXiv
    2307.14995, for norm, gate and decay rates.

    Parameters
    ----------
    width, heads, kv_heads, head_dim
        As in `Layer`.
    layer, layers : int
        Index of this layer, and number of layers: decay rates are ALiBi slopes times
        `1 - layer / (layers - 1) + 1e-5`, so the last layer hardly forgets.
    gate : int, optional
        Rank of the output gate, `head_dim` by default; 0 means no gate.

    Notes
    -----
    The state is `sum_j exp(-s (T - 1 - j)) k_j v_j^T`, `[B, heads, head_dim, head_dim]` in fp32, whatever the
    length.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.LightningAttention(64, 4)
    >>> x = torch.randn(2, 100, 64)
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-5)
    True
    """

    rate: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim)
        check_sizes(1, layers=layers)
        check_sizes(0, layer=layer, gate=self.head_dim if gate is None else gate)
        require((layer < layers, lambda: f"layer={layer}: expected less than layers={layers}"))
        self.layer, self.layers = layer, layers
        rank = self.head_dim if gate is None else gate
        self.project_heads(device=device, dtype=dtype)
        own = self.heads * self.head_dim
        self.gate_in = self.linear(width, rank, False, device, dtype) if rank else None
        self.gate_out = self.linear(rank, own, False, device, dtype) if rank else None
        self.register_buffer("rate", torch.empty(heads, device=device), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights, and set the decay rates of this layer."""
        super().reset(generator)
        depth = 1 - self.layer / max(1, self.layers - 1) + 1e-5
        self.rate.copy_(torch.tensor(slopes(self.heads)) * depth)

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Run linear attention; x [B, T, width]."""
        q, k, v = (
            self.split(nn.functional.silu(project(x))) for project in (self.query, self.key, self.value)
        )
        memory = None if state is None else state.tensors.get("memory")
        rate = self.rate.float()
        out, memory = linear_attention(q, k, v, decay_rate=rate, initial_state=memory, return_state=True)
        if state is not None:
            state.tensors["memory"] = memory
        y = nn.functional.layer_norm(self.join(out), (self.heads * self.head_dim,))
        if self.gate_in is not None and self.gate_out is not None:
            y = y * self.gate_out(self.gate_in(x)).sigmoid()
        found: Tensor = self.output(y)
        return found

    def extra_repr(self) -> str:
        """One-line description of the shape and layer index."""
        return f"{super().extra_repr()}, layer={self.layer}, layers={self.layers}"
