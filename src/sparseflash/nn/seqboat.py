"""SeqBoat: a moving average for all tokens, and gated attention among the tokens a router activates."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..backends.numerics import state_dtype
from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..ops.pointwise import pointwise_attention
from ..ops.rows import take_rows
from ..plan import Plan
from .base import Layer, Positions, State, check_choice, check_sizes, draw, rotate, survivors

WIDEST = 256
"""Widest values of one attention head; wider ones are split over several heads."""


class EMA(nn.Module):
    """The damped exponential moving average of MEGA, with `size` averages per channel.

    `h_n <- phi_n h_n + p_n beta_n x`, `y = sum_n gamma_n h_n / sqrt(size) + omega x`, with `p =
    sigmoid(delta)`, `phi = 1 - p sigmoid(alpha)`: one convolution, by FFT, O(T log T).

    Paper: Ma et al., "Mega: Moving Average Equipped Gated Attention", arXiv 2209.10655.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> ema = sf.nn.EMA(8, 4)
    >>> y, h = ema(torch.randn(2, 50, 8))
    >>> y.shape, h.shape
    (torch.Size([2, 50, 8]), torch.Size([2, 8, 4]))
    """

    delta: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter
    gamma: nn.Parameter

    def __init__(
        self,
        width: int,
        size: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name in ("delta", "alpha", "beta", "gamma"):
            setattr(self, name, nn.Parameter(torch.empty(width, size, device=device, dtype=dtype)))
        self.omega = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters, distributed as in MEGA."""
        for weight, std in zip(self.parameters(), (0.2, 0.2, 0.02, 1.0, 1.0)):
            draw(weight, std, generator)
        self.beta.add_(1 - 2 * (torch.arange(self.beta.shape[1], device=self.beta.device) % 2))

    def forward(
        self, x: Tensor, h: Tensor | None = None, *, carry: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return (y, h) for `x [B, T, width]`, given the state `h [B, width, size]` of earlier tokens.

        `carry=False` skips the new state and returns None for it.
        """
        wide, T = state_dtype(x), x.shape[1]
        p = self.delta.to(wide).sigmoid()
        phi = 1 - p * self.alpha.to(wide).sigmoid()
        into, out = p * self.beta.to(wide), self.gamma.to(wide) * self.gamma.shape[1] ** -0.5
        # phi^t for t = a S + b is phi^(a S) phi^b: sums over n become products of two small tables
        S = max(1, math.isqrt(T))
        A = -(-T // S)
        step = torch.arange(S, device=x.device, dtype=wide)
        near = (phi.log()[..., None] * step).exp()  # [W, N, S]
        far = (phi.log()[..., None] * torch.arange(A, device=x.device, dtype=wide) * S).exp()  # [W, N, A]

        def series(c: Tensor) -> Tensor:
            """`sum_n c_n phi_n^t` for t < T, [..., W, T] of [..., W, N]."""
            return ((c[..., None] * far).mT @ near).flatten(-2)[..., :T]

        signal, n = x.to(wide).mT, 2 * max(T, 1)  # [B, W, T]
        y = signal
        if signal.numel():
            kernel = torch.fft.rfft(series(into * out), n)
            y = torch.fft.irfft(kernel * torch.fft.rfft(signal, n), n)[..., :T]
        left = None
        if carry:
            back = nn.functional.pad(signal.flip(-1), (0, A * S - T)).view(*signal.shape[:2], A, S)
            left = ((back @ near.mT) * far.mT).sum(2) * into
        if h is not None:
            y = y + series(h * out * phi)
            left = None if left is None else left + h * phi**T
        return (y.mT + self.omega.to(wide) * x).to(x.dtype), left


class SeqBoat(Layer):
    """Sparse modular activation: all tokens pass a moving average, active ones also gated attention.

    `M = silu(EMA(x))`; `u = W_u M` are two logits, `P = softmax(u / exp(t))`, and a token is active if
    `P_1 > P_0`, with confidence `g = P_1`. Only active tokens enter a gated attention unit:
    `[z | r | w] = silu(W M)`, queries and keys are `z * a + b`, each query attends to itself and the previous
    `window` active tokens, however far back, and `h = W_o (A w * r)`. `y = W_x M + g h`, where g is 0 for
    inactive tokens. The choice has no gradient; the router learns through g.

    Paper: Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv 2306.11197. The
    paper's outer parts (a norm before, `silu(x + y)` after) are left to the model.

    Parameters
    ----------
    width, heads, head_dim, positions, base
        As in `Layer`; the paper uses one head. Positions, rotary by default, count all tokens, active or not.
    window : int
        Active tokens before its own that a query attends to.
    inner : int, optional
        Width of r and w, a multiple of heads; twice the width by default.
    size : int
        Moving averages per channel.
    law : "softmax" or "relu2"
        Attention weights: a softmax of `z.z' / sqrt(head_dim)`, or `max(0, z.z' / window)^2`.
    temperature : float
        Initial value of exp(t), divided by sqrt(width).

    Notes
    -----
    On a CPU the active tokens are packed before projection. On other devices, and in compiled graphs, where
    counting them would synchronise, all tokens are projected and the plan drops inactive ones. The state
    holds the averages and the last `window` active keys and values. `awake` is the share of active tokens in
    the last forward, a 0-d tensor.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.SeqBoat(64, 1, window=8, size=4)
    >>> x = torch.randn(2, 100, 64)
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-4), state.tensors["k"].shape[2]
    (True, 8)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 1024,
        inner: int | None = None,
        size: int = 16,
        law: Literal["softmax", "relu2"] = "softmax",
        temperature: float = 1.0,
        head_dim: int | None = None,
        positions: Positions = "rotary",
        base: float = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, head_dim=head_dim, positions=positions, base=base)
        inner = 2 * width if inner is None else inner
        check_sizes(1, window=window, inner=inner, size=size)
        check_choice(law=(law, ("softmax", "relu2")))
        require(
            (inner % heads == 0, lambda: f"inner={inner}: expected a multiple of heads={heads}"),
            (temperature > 0, lambda: f"temperature={temperature!r}: expected a positive number"),
        )
        self.window, self.inner, self.law, self.temperature = window, inner, law, float(temperature)
        self.average = EMA(width, size, device=device, dtype=dtype)
        self.route = self.linear(width, 2, True, device, dtype)
        self.plain = self.linear(width, width, True, device, dtype)
        self.unit = self.linear(width, heads * self.head_dim + 2 * inner, True, device, dtype)
        self.scales = nn.Parameter(torch.empty(2, heads * self.head_dim, device=device, dtype=dtype))
        self.shifts = nn.Parameter(torch.empty(2, heads * self.head_dim, device=device, dtype=dtype))
        self.output = self.linear(inner, width, True, device, dtype)
        self.heat = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.awake: Tensor | None = None
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights."""
        super().reset(generator)
        self.average.reset(generator)
        self.scales.fill_(1.0)
        draw(self.shifts, 0.02, generator)
        self.heat.fill_(math.log(self.temperature * self.width**0.5))

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Average, route, attend; x [B, T, width]."""
        m, h = self.average(x, state and state.tensors.get("h"), carry=state is not None)
        m = nn.functional.silu(m)
        share = (self.route(m).to(state_dtype(x)) / self.heat.exp()).softmax(-1)[..., 1]
        active = share.detach() > 0.5
        self.awake = active.float().mean() if active.numel() else active.new_zeros((), dtype=torch.float)
        packs = state is None and x.device.type == "cpu" and not torch.compiler.is_compiling()
        if packs:
            found = self._packed(m, active)
        else:
            found = self._dropped(m, active, state)
        if state is not None:
            state.tensors["h"] = h
        gate = torch.where(active, share, 0)[..., None].to(found.dtype)
        y: Tensor = self.plain(m) + gate * found
        return y

    def _packed(self, m: Tensor, active: Tensor) -> Tensor:
        """Apply the attention unit to active tokens only, packed as documents; inactive tokens give zero."""
        place = active.flatten().nonzero()[:, 0]
        edges = nn.functional.pad(active.sum(1).cumsum(0), (1, 0))
        q, k, v, r = self._unit(m.flatten(0, 1)[place][None], place % max(1, m.shape[1]))
        plan = Plan.from_documents(edges, Tq=len(place), Tk=len(place), window=(self.window, 0))
        h = self._attend(q, k, v, r, plan)[0]
        return h.new_zeros(m.shape[0] * m.shape[1], self.width).index_copy(0, place, h).view(m.shape)

    def _dropped(self, m: Tensor, active: Tensor, state: State | None) -> Tensor:
        """Apply the attention unit to all tokens, with a plan that covers only active ones."""
        T, past = m.shape[1], 0
        q, k, v, r = self._unit(m, 0 if state is None else state.length)
        own = torch.where(active, 0, 2)[:, None]  # active: 0; inactive keys 2, queries 1, which never meet
        if state is not None:
            old = [state.tensors.get(name) for name in ("k", "v", "own")]
            k, v, own = (y if z is None else torch.cat([z, y], 2) for z, y in zip(old, (k, v, own)))
            past = k.shape[2] - T
            self._forget(state, k, v, own)
        asks = torch.where(active, 0, 1)[:, None]
        plan = Plan.from_buckets(asks, own, q_offset=past, window=(self.window, 0), buckets=3)
        return self._attend(q, k, v, r, plan)

    def _forget(self, state: State, k: Tensor, v: Tensor, own: Tensor) -> None:
        """Keep the last `window` active keys; sequences with fewer are padded in front."""
        keep = own == 0
        keep = keep & (keep.flip(2).cumsum(2).flip(2) <= self.window)
        place, alive = survivors(keep)
        each = place.expand(-1, self.heads, -1)
        state.tensors.update(k=take_rows(k, each), v=take_rows(v, each), own=torch.where(alive, 0, 2))

    def _unit(self, m: Tensor, at: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [B, H, T, D], values [B, H, T, inner / H] and r [B, T, inner]."""
        own = self.heads * self.head_dim
        u = nn.functional.silu(self.unit(m))
        z, r, v = u[..., :own], u[..., own : own + self.inner], u[..., own + self.inner :]
        q, k = (self.split(z * scale + shift) for scale, shift in zip(self.scales, self.shifts))
        if self.positions == "rotary":
            q, k = rotate(q, at, self.base), rotate(k, at, self.base)
        return q, k, v.view(*v.shape[:-1], self.heads, self.inner // self.heads).transpose(1, 2), r

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, plan: Plan) -> Tensor:
        wide = v.shape[-1]
        parts = next(n for n in range(1, wide + 1) if wide % n == 0 and wide // n <= WIDEST)
        if parts > 1:  # split values over more heads with the same scores
            q, k = (y.repeat_interleave(parts, 1) for y in (q, k))
            v = v.reshape(*v.shape[:3], parts, wide // parts).transpose(2, 3).flatten(1, 2)
        if self.law == "softmax":
            out = attention(q, k, v, plan)
        else:
            out = pointwise_attention(q, k, v, plan, activation="relu2", scale=1 / self.window)
        if parts > 1:
            out = out.reshape(len(out), self.heads, parts, *out.shape[2:]).transpose(2, 3).flatten(3)
        found: Tensor = self.output(self.join(out) * r)
        return found

    def __getstate__(self) -> dict[str, object]:
        """State without the statistic of the last forward."""
        return {**super().__getstate__(), "awake": None}

    def extra_repr(self) -> str:
        """One-line description of the shape and window."""
        return f"{super().extra_repr()}, window={self.window}, inner={self.inner}, law={self.law!r}"
