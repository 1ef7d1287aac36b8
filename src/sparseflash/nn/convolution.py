"""A short gated convolution: the mixer without attention that layers of look-ups are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._arguments import AnyPlan
from .base import Layer, State, check_sizes, draw


class Convolving(Layer):
    """A layer with a short causal convolution, one filter for each channel, times a gate `W x + b`."""

    gate: nn.Linear

    def convolve_with(self, size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Make the filters of so many taps, the last of which is that of the token itself."""
        check_sizes(1, size=size)
        self.size = size
        self.filter = nn.Parameter(torch.empty(self.width, size, device=device, dtype=dtype))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights."""
        super().reset(generator)
        draw(self.filter, self.size**-0.5, generator)

    def convolved(self, x: Tensor, state: State | None) -> Tensor:
        """Convolve x [B, T, width], and multiply by the gate; the state keeps the last inputs."""
        before = x.new_zeros(len(x), self.size - 1, self.width)
        if state is not None:
            before = state.tensors.get("x", before)
        long, T = torch.cat([before, x], 1), x.shape[1]
        if state is not None:
            state.tensors["x"] = long[:, T:]
        parts = [tap.to(x.dtype) * long[:, n : n + T] for n, tap in enumerate(self.filter.unbind(-1))]
        y = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        gated: Tensor = y * self.gate(x)
        return gated


class GatedConvolution(Convolving):
    """A short causal convolution times a gate, `y = W_o (conv(x) * (W x + b))`: no token looks back further.

    It is the BaseConv of the paper, one filter for each channel, with a projection behind it as layers of
    attention have one.

    Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv
    2312.04927, section 4.1.

    Parameters
    ----------
    width, heads : int
        As in `Layer`; heads only divide the width.
    size : int
        Taps of the convolution.

    Notes
    -----
    The state holds the last `size - 1` inputs.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.GatedConvolution(64, 4)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads)
        self.gate = self.linear(width, width, True, device, dtype)
        self.output = self.linear(width, width, False, device, dtype)
        self.convolve_with(size, device, dtype)
        self.reset()

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Convolve, gate and project; x [B, T, width]."""
        found: Tensor = self.output(self.convolved(x, state))
        return found

    def extra_repr(self) -> str:
        """One-line description of the shape."""
        return f"{super().extra_repr()}, size={self.size}"
