"""What a backend offers, and is asked: tensors, a plan, and the options of the family (`numerics`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..numerics import (
    Best,
    Choice,
    Likeness,
    Linear,
    Masses,
    Pages,
    Pointwise,
    Probing,
    Running,
    Softmax,
    Statistics,
    Stick,
)
from ..plan import Plan


class Backend(Protocol):
    """What a module under `backends/` offers."""

    NAME: str

    def status(self) -> tuple[bool, str]:
        """Whether it can run on this machine, and what it is or why not."""
        ...

    def refuse(self, *tensors: Tensor) -> list[str]:
        """Every reason why an op on these tensors cannot run here; empty when it can."""
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
        alibi_slopes: Tensor | None = None,
        pair_bias: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Out, natural-log lse and, where `normed`, the norm [2,B,Hq,Tq] (see `numerics`).

        With a seed, int64 of no dimensions, weights are left out as `reference/dropout.py` says. ALiBi's
        slopes are [Hq] or [B,Hq], pair_bias expands to [B,Hq,Tq,Tk], or
        to [B,Hq,Tq+Tk-1]: by key - query + Tq - 1.
        Where `skipped`, zeros [B,Hq,2], is given, blocks of keys may add nothing, as `attention` says: it
        counts blocks, and those that were skipped.

        Where a backend has `PEAKS = True` it also takes `peaks`, zeros [B,Hq,tiles,units], and writes into
        them the largest weight of each block of `options.tile` query by `options.unit` key tokens.
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
        alibi_slopes: Tensor | None = None,
        pair_bias: Tensor | None = None,
        dpair: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and (per query head, full precision) key_bias.

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
        """The same of what taking a pair away moves: `ops.stats` says how it is defined."""
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
        """The keys that each query chooses, and their scores."""
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
        """How far an indexer is from the attention, summed over queries, and its three gradients."""
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
        """Out and what is left of the sticks."""
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
        """Weights of rows against columns, by tile and unit."""
        ...

    def top_indices(self, scores: Tensor, among: Tensor | None, options: Best) -> Tensor:
        """The places of the best scores of each row."""
        ...

    def page_scores(
        self, q: Tensor, rows: Tensor, last: Tensor, rules: Tensor | None, options: Pages
    ) -> Tensor:
        """What queries say of pages; one that has `top_pages` too finds the best of them in one go."""
        ...

    def running_kth(self, x: Tensor, k: Tensor, options: Running) -> tuple[Tensor, Tensor]:
        """The k-th largest up to each place, and where each place falls out."""
        ...
