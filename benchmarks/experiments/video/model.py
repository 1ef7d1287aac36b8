"""A small video transformer (DiT), and the deterministic sampler that turns noise into videos with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.distributed import ContextParallel
from sparseflash.methods.base import Method
from sparseflash.nn.base import State
from sparseflash.ops._arguments import AnyPlan

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Velocities of videos [B, frames, side, side] at times [B]."""


class Attend(sf.nn.SelfAttention):
    """Attention of all tokens to all, or by a method; with `ranks`, over the tokens of all of them."""

    ranks: ContextParallel | None = None

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Project and attend; x [B, T, width], over ranks this rank's tokens."""
        if self.ranks is None:
            return super().mix(x, plan, state)
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        T = self.ranks.layout.T
        with self.ranks:
            chosen = sf.Plan.dense(T, T) if self.method is None else self.method
            return self.end(sf.distributed.attention(q, k, v, chosen, ctx=self.context))


class Block(nn.Module):
    """Attention and an MLP, each scaled, shifted and gated by the time (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = Attend(width, heads, positions="none", causal=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.condition = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The next x [B, T, width], and what attention put out."""
        shift, scale, gate, *mlp = self.condition(time)[:, None].chunk(6, -1)
        out = self.attend(normed(x, shift, scale))
        x = x + gate * out
        return x + mlp[2] * self.mlp(normed(x, mlp[0], mlp[1])), out


class VideoDiT(nn.Module):
    """Patches of all frames through blocks of self-attention: velocities at a time between 0 and 1.

    Tokens are in raster order of `grid` (frames, rows, columns). Attention is dense until `attend_by` gives
    layers a method.
    """

    def __init__(
        self,
        frames: int = 8,
        side: int = 24,
        patch: int = 6,
        *,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
    ) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"side={side}: expected a multiple of patch={patch}")
        self.ranks: ContextParallel | None = None
        self.grid, self.patch = (frames, side // patch, side // patch), patch
        self.embed = nn.Linear(patch * patch, width)
        self.places = nn.Parameter(places(self.grid, width), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.condition = zeroed(nn.Linear(width, 2 * width))
        self.head = zeroed(nn.Linear(width, patch * patch))

    def layers(self) -> list[Attend]:
        """The attention layers."""
        return [block.attend for block in self.blocks if isinstance(block, Block)]

    def attend_by(self, methods: Sequence[Method | None]) -> VideoDiT:
        """Give each layer its method, None for dense attention; the model."""
        for layer, method in zip(self.layers(), methods, strict=True):
            layer.method, layer.context = method, {} if method is None else {"grid": self.grid}
        return self

    def over(self, ranks: ContextParallel | None) -> VideoDiT:
        """Share the tokens of each video between ranks, which all give the same; the model."""
        self.ranks = ranks
        for layer in self.layers():
            layer.ranks = ranks
        return self

    def hear(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Velocities [B, frames, side, side], and the outputs [B, T, width] of attention in each layer."""
        p, (frames, rows, columns) = self.patch, self.grid
        tokens = x.view(len(x), frames, rows, p, columns, p).transpose(3, 4).flatten(4).flatten(1, 3)
        y = self.embed(tokens) + self.places
        y = y if self.ranks is None else self.ranks.shard(y, 1)
        time, heard = self.time(waves(t, y.shape[-1])), []
        for block in self.blocks:
            y, out = block(y, time)
            heard.append(out)
        y = self.head(normed(y, *self.condition(time)[:, None].chunk(2, -1)))
        y = y if self.ranks is None else self.ranks.unshard(y, 1)
        return y.view(len(x), frames, rows, columns, p, p).transpose(3, 4).reshape(x.shape), heard

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocities of videos [B, frames, side, side] at times [B]."""
        return self.hear(x, t)[0]

    @torch.no_grad()
    def calls(self, x: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values [B, H, T, D] of each layer."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def keep(layer: nn.Module, given: tuple[Tensor]) -> None:
            assert isinstance(layer, sf.nn.SelfAttention)
            q, k, v = (layer.split(project(given[0])) for project in (layer.query, layer.key, layer.value))
            found.append((q, k, v))

        hooks = [layer.register_forward_pre_hook(keep) for layer in self.layers()]
        try:
            self(x, t)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own, scaled and shifted."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A linear layer that puts out 0 at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def waves(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of times [B], of periods from far below to far above 1: [B, width]."""
    rate = 100 ** torch.linspace(0, 1, width // 2, dtype=t.dtype, device=t.device)
    angle = t[:, None] * rate
    return F.pad(torch.cat([angle.cos(), angle.sin()], -1), (0, width % 2))


def places(grid: Sequence[int], width: int) -> Tensor:
    """Cosines and sines of a token's frame, row and column, a third of the channels for each: [T, width]."""
    each = [width // len(grid)] * (len(grid) - 1)
    each.append(width - sum(each))
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    return torch.cat([waves(0.03 * x.flatten(), n) for x, n in zip(axes, each)], -1)


def times_of(steps: int) -> Tensor:
    """Times of so many equal steps, from 1, noise, to 0, the video: [steps + 1]."""
    return torch.linspace(1, 0, steps + 1)


def jump(x: Tensor, velocity: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """Move videos from time t to another on a straight line: the step of DDIM for this path of noise."""
    return x + (to - t).view(-1, 1, 1, 1) * velocity


@torch.no_grad()
def trajectory(model: Velocity, noise: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Videos on their way from noise [B, frames, side, side], and their times [B]: steps + 1 pairs."""
    x, times = noise, times_of(steps).to(noise).unsqueeze(-1).expand(-1, len(noise))
    found = [(x, times[0])]
    for t, to in itertools.pairwise(times):
        x = jump(x, model(x, t), t, to)
        found.append((x, to))
    return found


def generate(model: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Videos from noise, in so many steps; no randomness beside the noise."""
    return trajectory(model, noise, steps)[-1][0]
