"""Selections that stand beside hash-sparse attention: by chance, without means, by mass, and perfect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.methods import HashSparse
from sparseflash.methods.base import Context, Method, Selection
from sparseflash.selection import kmeans
from sparseflash.selection.orders import random_bits


@dataclass(frozen=True)
class Chance(HashSparse):
    """Hash-sparse attention whose buckets are drawn at random: the same budget, no choice."""

    def ids(self, q: Tensor, k: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Buckets of queries and of keys that know nothing of one another."""
        drawn = [
            random_bits(*x.shape[:3], seed=2 * (self.seed + 7919 * step) + n) % self.nb
            for n, x in enumerate((q, k))
        ]
        return drawn[0].to(q.device), drawn[1].to(k.device)


@dataclass(frozen=True)
class Centred(HashSparse):
    """Queries and keys are hashed without their means.

    Untied ones lie in two narrow cones, which a plane through the origin hardly cuts. The mean of the keys
    shifts all scores of a query alike; the mean is of the whole sequence, so that later tokens have a say.
    """

    causal_selection = False

    def ids(self, q: Tensor, k: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Buckets by angular hashing."""
        return super().ids(q - q.mean(2, keepdim=True), k - k.mean(2, keepdim=True), step)


@dataclass(frozen=True)
class ByMass(HashSparse):
    """Queries choose centroids by the mass to expect there: exp(scale q c) times the size of the cluster."""

    causal_selection = False

    def ids(self, q: Tensor, k: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """The cluster of each key, and the best of each query."""
        q, k = q.detach().float(), k.detach().float()
        with torch.autocast(q.device.type, enabled=False):
            label, centroid = kmeans(k, self.nb)
            size = torch.nn.functional.one_hot(label.long(), self.nb).sum(2)[:, :, None, None]
            score = q.unflatten(1, (k.shape[1], -1)) @ centroid[:, :, None].mT * q.shape[-1] ** -0.5
        best = (score + size.log()).flatten(1, 2).topk(self.top, -1).indices.int()
        return (best[..., 0] if self.top == 1 else best.movedim(-1, 0)), label


@dataclass(frozen=True)
class Early(HashSparse):
    """Centroids of the first quarter of the keys: what later queries see does not depend on later keys."""

    causal_selection = False

    def ids(self, q: Tensor, k: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each key, and the best of each query."""
        q, k = q.detach().float(), k.detach().float()
        with torch.autocast(q.device.type, enabled=False):
            _, centroid = kmeans(k[:, :, : max(1, k.shape[2] // 4)], self.nb)
            label, _ = kmeans(k, self.nb, iterations=0, init=centroid)
            score = q.unflatten(1, (k.shape[1], -1)) @ centroid[:, :, None].mT
        best = score.flatten(1, 2).topk(self.top, -1).indices.int()
        return (best[..., 0] if self.top == 1 else best.movedim(-1, 0)), label


@dataclass(frozen=True)
class Oracle(Method):
    """A window and sinks, and of what is left the keys with the largest scores: no choice can be better.

    It looks at every score, so it is no method, and slower than dense attention.
    """

    keys: int = 128
    window: int = 128
    sink_tokens: int = 4

    phases = ("prefill",)
    reads = ("q_offset",)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """A plan from the mask of them."""
        at = int((ctx or {}).get("q_offset", 0)) + torch.arange(q.shape[2])[:, None]
        token = torch.arange(k.shape[2])
        near = (token <= at) & ((token > at - self.window) | (token < self.sink_tokens))
        hidden = near | (token > at)
        group = q.shape[1] // k.shape[1]
        seen = near.expand(*q.shape[:2], *near.shape).clone()
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                score = (q[b, h] @ k[b, h // group].mT).float().masked_fill_(hidden, -torch.inf)
                best = score.topk(min(self.keys, len(token)), -1)
                seen[b, h].scatter_(1, best.indices, True)
        return Selection(sf.Plan.from_mask(seen & (token <= at)))
