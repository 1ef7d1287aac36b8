"""What a selection loses: density, recall of attention mass, error of the output against dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.ops._arguments import AnyPlan
from sparseflash.plan import Plan
from sparseflash.plan.figures import visible_pairs


@dataclass(frozen=True)
class Dense:
    """Causal attention over all earlier keys, as the yardstick: output, and log-sum-exp [B, H, T]."""

    out: Tensor
    lse: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Dense:
        """Attend once."""
        return cls(*sf.attention(q, k, v, causal=True, return_lse=True))

    def error(self, out: Tensor) -> float:
        """Norm of the difference over the norm of the dense output."""
        return float((out.float() - self.out.float()).norm() / self.out.float().norm())

    @torch.no_grad()
    def recall(self, q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan) -> float:
        """Share of dense attention's mass that lies on the pairs of a plan, mean over the queries."""
        lse = sf.attention(q, k, v, plan, return_lse=True)[1]
        return float((lse - self.lse).exp().mean())


def density(plan: AnyPlan) -> float:
    """Visible pairs over those of dense causal attention (`Plan.density` knows windows as dense too)."""
    found = 0.0
    for one in parts(plan):
        batch, heads = one.extent()
        found += visible_pairs(one) / (batch * heads * one.Tq * (one.Tq + 1) / 2)
    return found


def work(plan: AnyPlan) -> float:
    """Visited area over queries x keys."""
    return sum(one.work for one in parts(plan))


def parts(plan: AnyPlan) -> tuple[Plan, ...]:
    """The plans of one softmax."""
    return plan if isinstance(plan, tuple) else (plan,)
