"""The interface of a backend: ops on tensors, a plan, and the options of the op's family (`numerics`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..plan import Plan
from .numerics import (
    NM,
    Best,
    Choice,
    Heaviest,
    Likeness,
    Linear,
    Masses,
    Numbers,
    Pages,
    Pointwise,
    Probing,
    Running,
    Softmax,
    Statistics,
    Stick,
)


class Backend(Protocol):
    """Functions that a module under `backends/` may offer."""

    NAME: str

    def status(self) -> tuple[bool, str]:
        """Return whether the backend runs on this machine, and what it is or why not."""
        ...

    def refuse(self, *tensors: Tensor) -> list[str]:
        """List every reason why an op on these tensors cannot run here; empty if it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        options: Softmax,
        *,
        key_bias: Tensor | None,
        out_dtype: torch.dtype,
        normed: bool,
        seed: Tensor | None = None,
        numbers: Numbers | None = None,
        alibi_slopes: Tensor | None = None,
        pair_bias: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Out, natural-log lse and, where `normed`, the norm [2,B,Hq,Tq] (see `numerics`).

        With a seed, a 0-dimensional int64 tensor, weights are dropped as `reference/dropout.py` defines, by
        the indices of tokens, or by their `numbers`.
        ALiBi's slopes are [Hq] or [B,Hq]; pair_bias expands to [B,Hq,Tq,Tk], or to
        [B,Hq,Tq+Tk-1], by distance: entry key - query + Tq - 1.
        With `skipped`, zeros [B,Hq,2], blocks of negligible weights may be skipped, as `attention` says; it
        receives the number of blocks, and of those skipped.

        A backend with `PEAKS = True` also takes `peaks`, zeros [B,Hq,tiles,units], and writes into it the
        largest weight of each block of `options.tile` query by `options.unit` key tokens.
        """
        ...

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plans: Sequence[Plan],
        options: Softmax,
        *,
        key_bias: Tensor | None,
        sink_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One softmax over all plans and the sinks, for few queries over many keys: out and lse."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        norm: Tensor,
        dlse: Tensor | None,
        plan: Plan,
        options: Softmax,
        *,
        delta: Tensor | None = None,
        key_bias: Tensor | None,
        grad_dtype: torch.dtype | None,
        seed: Tensor | None = None,
        numbers: Numbers | None = None,
        alibi_slopes: Tensor | None = None,
        pair_bias: Tensor | None = None,
        dpair: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and (per query head, in full precision) key_bias.

        `delta` is the sum over Dv of dout times out, [B,Hq,Tq]; where it is given, there may be no out.
        """
        ...

    def stats(
        self,
        q: Tensor,
        k: Tensor,
        norm: Tensor,
        plan: Plan,
        options: Statistics,
        *,
        key_bias: Tensor | None,
    ) -> Tensor:
        """Statistics of the weights under a given norm, [B,Hq,width]."""
        ...

    def influence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        norm: Tensor,
        delta: Tensor,
        plan: Plan,
        options: Statistics,
        *,
        key_bias: Tensor | None,
    ) -> Tensor:
        """Statistics of influences, the effect of removing a pair: `ops.stats` defines it."""
        ...

    def indexer_topk(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        low: Tensor,
        high: Tensor,
        keep: Tensor | None,
        options: Choice,
    ) -> tuple[Tensor, Tensor]:
        """The topk keys of each query, and their scores."""
        ...

    def indexer_loss(
        self,
        q_index: Tensor,
        k_index: Tensor,
        weights: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        index: Tensor | None,
        low: Tensor,
        high: Tensor,
        keep: Tensor | None,
        options: Likeness,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The indexer's KL loss against attention, summed over queries, and its three gradients."""
        ...

    def linear_forward(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, initial: Tensor | None, options: Linear
    ) -> tuple[Tensor, Tensor]:
        """Out and the state after the last token."""
        ...

    def linear_backward(
        self,
        dout: Tensor,
        dstate: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor | None,
        initial: Tensor | None,
        options: Linear,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and the initial state."""
        ...

    def pointwise_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        options: Pointwise,
        *,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Out."""
        ...

    def pointwise_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        options: Pointwise,
        *,
        grad_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...

    def stick_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Stick
    ) -> tuple[Tensor, Tensor]:
        """Out, and what is left of each query's stick."""
        ...

    def stick_backward(
        self,
        dout: Tensor,
        drem: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        options: Stick,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...

    def probe(
        self, q: Tensor, k: Tensor, sees: Tensor, at: Tensor, keep: Tensor | None, options: Probing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For some rows: lse, and the sums of their weights by key and by distance."""
        ...

    def tile_mass(
        self,
        rows: Tensor,
        columns: Tensor,
        sees: Tensor,
        keep: Tensor | None,
        level: Tensor | None,
        options: Masses,
    ) -> Tensor:
        """Weights of rows on columns, summed by tile and unit."""
        ...

    def top_indices(self, scores: Tensor, among: Tensor | None, options: Best) -> Tensor:
        """Indices of the k largest scores of each row."""
        ...

    def heaviest(self, mass: Tensor, among: Tensor | None, share: Tensor, options: Heaviest) -> Tensor:
        """Which entries of each row, largest first, hold its share of the row's sum."""
        ...

    def nm_product(self, x: Tensor, weight: Tensor, options: NM) -> Tensor:
        """Product of x with the N:M sparse part of a weight."""
        ...

    def page_scores(
        self, q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages
    ) -> Tensor:
        """Scores of pages; a backend that also offers `top_pages` finds the best pages in one pass."""
        ...

    def running_kth(self, x: Tensor, k: Tensor, options: Running) -> tuple[Tensor, Tensor]:
        """The k-th largest of each prefix, and where each place drops out of the k largest."""
        ...
