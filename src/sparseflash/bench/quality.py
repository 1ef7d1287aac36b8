"""Loss of a selection: density, recall of attention mass, output error against dense attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.capture import Captured
from sparseflash.bench.needles import KINDS, plant
from sparseflash.bench.results import Row
from sparseflash.methods.base import Method
from sparseflash.ops._arguments import AnyPlan
from sparseflash.plan import Plan
from sparseflash.plan.figures import visible_pairs


@dataclass(frozen=True)
class Dense:
    """Dense causal attention as the reference: output, and log-sum-exp [B, H, T]."""

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
        """Share of dense attention's mass on the pairs of a plan, mean over the queries."""
        return float(self.shares(q, k, v, plan).mean())

    @torch.no_grad()
    def shares(self, q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan) -> Tensor:
        """As `recall`, for every query: [B,H,T]."""
        return (sf.attention(q, k, v, plan, return_lse=True)[1] - self.lse).exp()


def density(plan: AnyPlan) -> float:
    """Visible pairs over those of dense causal attention (`Plan.density` applies the plan's window too)."""
    found = 0.0
    for one in parts(plan):
        batch, heads = one.extent()
        found += visible_pairs(one) / (batch * heads * one.Tq * (one.Tq + 1) / 2)
    return found


def work(plan: AnyPlan) -> float:
    """Visited area over queries x keys."""
    return sum(one.work for one in parts(plan))


def parts(plan: AnyPlan) -> tuple[Plan, ...]:
    """The plans of one softmax, as a tuple."""
    return plan if isinstance(plan, tuple) else (plan,)


@torch.no_grad()
def judge(
    method: Method, captured: Captured, *, tokens: int | None = None, layers: Sequence[int] = ()
) -> Iterator[Row]:
    """Measure what a method loses in each layer of a capture, over its first tokens.

    Yields
    ------
    dict
        Per layer: ``density``; ``recall``, that of the second half of the queries (``recall_late``) and of
        the worst head (``recall_worst``); ``error`` of the output; and the kept share of needles, planted in
        the layer's own queries and keys, that the last tokens (``question``), some in the middle (``mid``)
        and single ones (``lone``) ask for. Density and recall are relative to causal attention, whatever
        window the layer has.

    Examples
    --------
    >>> import sparseflash as sf
    >>> from sparseflash.bench import capture, quality
    >>> window = sf.methods.SinkWindow(window=64)
    >>> [row] = quality.judge(window, capture.load("smollm2"), tokens=512, layers=[15])
    >>> row["density"] < 0.3, row["recall"] > 0.7, row["question"] < 0.01
    (True, True, True)
    """
    for number in layers or captured.layers:
        q, k, v = captured.layer(number, tokens=tokens).usual()
        selection = method.select(q, k, {"v": v})
        dense = Dense.of(q, k, v)
        plan = method.shown(q, k, selection, {"v": v})
        shares = dense.shares(q, k, v, plan)
        row: Row = {"layer": number, "T": q.shape[2], "density": density(plan)}
        row |= {"recall": float(shares.mean()), "recall_late": float(shares[:, :, q.shape[2] // 2 :].mean())}
        row |= {"recall_worst": float(shares.mean((0, 2)).min())}
        row |= {"error": dense.error(method(q, k, v, selection=selection))}
        for kind in KINDS:
            found = plant(q, k, kind, torch.Generator().manual_seed(0))
            chosen = method.select(found.q, found.k, {"v": v})
            row[kind] = float(found.kept(method.shown(found.q, found.k, chosen, {"v": v})).mean())
        yield row
