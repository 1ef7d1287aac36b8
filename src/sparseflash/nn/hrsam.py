"""HRSAM: image windows padded with a learned token, and a selective scan that cycles over the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu, softplus

from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..ops.scan import scan
from ..plan import Plan
from ..plan.options import is_count
from .base import Layer, Positions, State, check_sizes, draw, rotate

CHUNK = 1024
"""Steps per chunk of the scan without gradients, which bounds the states in memory."""


class HRSAMAttention(Layer):
    """Attention inside the windows of an image, plain or shifted, with learned tokens as padding.

    Every window has the same number of slots. A slot outside the image holds one learned vector, which is
    attended to like any other (a mask would be another model): so a window sees the same number of keys
    whatever the image size, and weights learned at 1024 pixels work at 4096. A shift moves the window edges
    by half a window without cyclic rolling. Positions are those of the padded grid: rows in one half of a
    head, columns in the other.

    Papers: Huang et al., "HRSAM: Efficient Interactive Segmentation in High-Resolution Images", arXiv
    2407.02109, section 3.2.

    Parameters
    ----------
    width, heads, head_dim, positions, base, dropout
        As in `Layer`; rotary positions need a head_dim divisible by 4.
    window : int
        Side length of a window, in tokens.
    shifted : bool
        Whether the window edges are shifted by half a window.
    columns : int
        Tokens in a row of the image; set `grid` before a call for another size.
    spacing : float
        Distance between neighbouring tokens, in positions.

    Attributes
    ----------
    grid : (int, int)
        (rows, columns) of the image; rows -1 infers them from the number of tokens.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.HRSAMAttention(32, 2, window=4, shifted=True, columns=10)
    >>> layer(torch.randn(1, 60, 32)).shape
    torch.Size([1, 60, 32])
    """

    decodes = False

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 16,
        shifted: bool = False,
        columns: int = 64,
        spacing: float = 0.5,
        head_dim: int | None = None,
        positions: Positions = "rotary",
        base: float = 10_000.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, head_dim=head_dim, positions=positions, base=base)
        self.leave_out(dropout)
        check_sizes(1, window=window, columns=columns)
        require(
            (isinstance(shifted, bool), lambda: f"shifted={shifted!r}: expected True or False"),
            (
                math.isfinite(spacing) and spacing > 0,
                lambda: f"spacing={spacing!r}: expected a positive number",
            ),
            (
                positions == "none" or self.head_dim % 4 == 0,
                lambda: f"head_dim={self.head_dim}: rotary positions of two axes need a multiple of 4",
            ),
        )
        self.window, self.shifted, self.spacing = window, shifted, float(spacing)
        self.grid = (-1, columns)
        self.project_heads(bias=True, device=device, dtype=dtype)
        self.pad = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset()

    def slots(self, T: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Token and position of each slot: int64 [windows, window^2] (T for padding), [windows, window^2, 2].

        Positions are (row, column) of the padded grid.
        """
        rows, columns = self.grid
        whole = rows == -1 or rows * columns == T
        require((whole, lambda: f"grid={self.grid} is not {T} tokens; the first size may be -1"))
        rows, w = -(-T // columns), self.window
        before = (w - w // 2) % w if self.shifted else 0
        high, wide = (-(-(before + n) // w) for n in (rows, columns))
        y, x = (torch.arange(n * w, device=device) for n in (high, wide))
        place = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        place = place.view(high, w, wide, w, 2).transpose(1, 2).reshape(-1, w * w, 2)
        row, column = (place - before).unbind(-1)
        token = row * columns + column
        there = (row >= 0) & (column >= 0) & (column < columns) & (token < T)
        return torch.where(there, token, T), place

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Attend inside windows; x [B, T, width] in raster order."""
        B, T, _ = x.shape
        token, place = self.slots(T, x.device)
        long = torch.cat([x, self.pad.to(x.dtype).expand(B, 1, -1)], 1)
        near = token.flatten()
        q, k, v = (self.split(project(long))[:, :, near] for project in (self.query, self.key, self.value))
        if self.positions == "rotary":
            q, k = (self._turned(part, place.flatten(0, 1) * self.spacing) for part in (q, k))
        windows, n = token.shape
        q, k, v = (
            part.reshape(B, self.heads, windows, n, self.head_dim).transpose(1, 2).flatten(0, 1)
            for part in (q, k, v)
        )
        out = attention(q, k, v, Plan.dense(n, n, device=x.device), dropout_p=self.dropout_p)
        out = out.view(B, windows, self.heads, n, self.head_dim).transpose(1, 2).flatten(2, 3)
        back = torch.zeros(T + 1, dtype=torch.int64, device=x.device)
        back[near] = torch.arange(len(near), device=x.device)
        return self.end(out[:, :, back[:T]])

    def _turned(self, x: Tensor, place: Tensor) -> Tensor:
        parts = zip(x.chunk(2, -1), place.unbind(-1))
        return torch.cat([rotate(part, at, self.base) for part, at in parts], -1)

    def extra_repr(self) -> str:
        """One-line description of the shape and window."""
        return f"{super().extra_repr()}, window={self.window}, shifted={self.shifted}, grid={self.grid}"


class CyclicScan(Layer):
    """A selective scan that runs over an image several times, so that every token sees every other.

    `h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t` and `y_t = C_t h_t + D u_t` for each channel, over the
    tokens repeated `repeats` times: from the second round on, the first token has seen the last. The outputs
    of all rounds are summed with learned weights, and gated.

    Papers: Huang et al., "HRSAM", arXiv 2407.02109, section 3.3; Gu and Dao, "Mamba", arXiv 2312.00752.

    Parameters
    ----------
    width : int
        Width of x.
    heads : int
        Ignored: channels are scanned independently. Every `Layer` takes it.
    state : int
        State size per channel.
    repeats : int
        Number of rounds over the tokens.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> sf.nn.CyclicScan(32, 1, state=4)(torch.randn(1, 60, 32)).shape
    torch.Size([1, 60, 32])
    """

    decodes = False

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        state: int = 32,
        repeats: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads)
        check_sizes(1, state=state, repeats=repeats)
        self.size, self.repeats, self.rank = state, repeats, max(1, width // 16)
        self.enter = self.linear(width, 2 * width, True, device, dtype)
        self.choose = self.linear(width, self.rank + 2 * state, False, device, dtype)
        self.pace = self.linear(self.rank, width, True, device, dtype)
        self.output = self.linear(width, width, True, device, dtype)
        self.log_decay = nn.Parameter(torch.empty(width, state, device=device, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.rounds = nn.Parameter(torch.empty(width, repeats, device=device, dtype=dtype))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: decays from 1 to `state`, steps of about 0.03, equal weights for all rounds."""
        super().reset(generator)
        draw(self.pace.bias, 0.5, generator)
        self.pace.bias.sub_(3.5)
        self.log_decay.copy_(torch.arange(1, self.size + 1).log().expand(self.width, -1))
        self.skip.fill_(1.0)
        self.rounds.fill_(1 / self.repeats)

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Scan; x [B, T, width]."""
        T = x.shape[1]
        u, gate = silu(self.enter(x)).chunk(2, -1)
        pace, into, out = torch.split(self.choose(u), [self.rank, self.size, self.size], -1)
        delta, rate = softplus(self.pace(pace)), -self.log_decay.exp()
        chunk = max(1, self.repeats * T if torch.is_grad_enabled() else CHUNK)
        last, parts = None, []
        for part in torch.split(torch.arange(self.repeats * T, device=x.device) % max(T, 1), chunk):
            step = delta[:, part, :, None]
            fed = step * into[:, part, None] * u[:, part, :, None]
            h = scan((step * rate).exp(), fed, initial=last)
            last = h[:, -1] if len(part) else None
            parts.append((h * out[:, part, None]).sum(-1) + self.skip * u[:, part])
        rounds = torch.cat(parts, 1).view(len(x), self.repeats, T, self.width)
        y = (rounds * self.rounds.T[:, None]).sum(1)
        found: Tensor = self.output(gate * layer_norm(y, (self.width,)).to(gate.dtype))
        return found

    def extra_repr(self) -> str:
        """One-line description of the shape, state size and rounds."""
        return f"{super().extra_repr()}, state={self.size}, repeats={self.repeats}"


class HRSAMBlocks(nn.Module):
    """A stack of blocks, each windows (plain and shifted alternate) and an MLP, some behind a cyclic scan.

    Papers: those of `HRSAMAttention`.

    Parameters
    ----------
    width, heads, depth : int
        Width and heads of every block, and number of blocks.
    window : int
        Side length of a window, in tokens.
    scans : tuple of int
        Indices of the blocks that a cyclic scan precedes.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> blocks = sf.nn.HRSAMBlocks(32, 2, 4, window=4, scans=(2,))
    >>> blocks(torch.randn(1, 8 * 12, 32), grid=(8, 12)).shape
    torch.Size([1, 96, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int = 12,
        *,
        window: int = 16,
        scans: tuple[int, ...] = (2, 5, 8, 11),
    ) -> None:
        super().__init__()
        require((is_count(depth, 1), lambda: f"depth={depth!r}: expected a positive int"))
        self.blocks = nn.ModuleList(
            HRSAMAttention(width, heads, window=window, shifted=n % 2 == 1) for n in range(depth)
        )
        self.scans = nn.ModuleDict({str(n): CyclicScan(width) for n in scans if n < depth})
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 * depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """Map `x [B, rows * columns, width]` in raster order to the same shape."""
        for n, (layer, mlp) in enumerate(zip(self.blocks, self.mlps)):
            assert isinstance(layer, HRSAMAttention)
            if str(n) in self.scans:
                x = x + self.scans[str(n)](self.norms[3 * n](x))
            layer.grid = grid
            x = x + layer(self.norms[3 * n + 1](x))
            x = x + mlp(self.norms[3 * n + 2](x))
        return x
