"""Round Attention: one layer selects the earlier chat rounds that the layers above it read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops.attention import attention
from ..ops.stats import attention_stats
from ..plan import Plan
from ..plan.options import TILE, is_count
from .base import Context, Method, Selection, check_counts, check_shares


class Rounds(NamedTuple):
    """State of a chat."""

    starts: tuple[int, ...]
    """Start positions of the rounds; the last round is that of the current question."""
    kept: Tensor | None = None
    """bool `[B, rounds - 1]`: the earlier rounds that layers above the watershed read."""


@dataclass(frozen=True)
class RoundAttention(Method):
    """Layers up to a watershed see everything; there the question selects rounds for the layers above.

    From some layer on all layers attend to the same rounds of a chat. So once a turn, the mass that the
    question's tokens give to each round in that layer decides for all later layers: they read the fewest
    rounds that hold `share` of the mass, beside the first one and the question's own. The keys of upper
    layers can be in slow memory (`cache.Offloaded`). No round is ever evicted.

    Paper: Tang et al., "Round Attention", arXiv 2502.15294; the rule for how many rounds is ours.

    Parameters
    ----------
    watershed : int
        The layer that selects: `sparseflash calibrate round` finds it. A call without a layer selects for
        itself.
    share : float
        Least share of the mass on earlier rounds that the selected ones hold.
    budget : int, optional
        Most tokens of all selected rounds; the best round is always read.
    rounds : tuple of int
        Start positions of rounds, ascending from 0. Without it, each call of several queries begins a round.

    Notes
    -----
    `ctx` keys: `layer`; `q_offset`, the position of the first query; `scale` and `softcap`; and `state`,
    shared by all layers (`across_layers`): a `Session` keeps it, and hosts do as long as a cache lives.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(1, 4, 30, 64), *torch.randn(2, 1, 2, 1030, 64)
    >>> method = sf.methods.RoundAttention(rounds=tuple(range(0, 1001, 100)), budget=200)
    >>> plan = method.select(q, k, {"q_offset": 1000}).plan
    >>> method(q, k, v, q_offset=1000).shape, 0.2 < plan.density < 0.4
    (torch.Size([1, 4, 30, 64]), True)
    """

    watershed: int = 8
    share: float = 0.9
    budget: int | None = None
    rounds: tuple[int, ...] = ()

    reads = ("q_offset", "layer", "state", "scale", "softcap")
    paper = "arXiv 2502.15294"
    phases = ("prefill", "decode")
    causal_selection = False
    across_layers = True

    def __post_init__(self) -> None:
        check_counts(self, 0, "watershed")
        check_shares(self, "share")
        if self.budget is not None:
            check_counts(self, 1, "budget")
        given = self.rounds
        whole = isinstance(given, tuple) and all(is_count(x) for x in given)
        rising = whole and all(a < b for a, b in zip((-1, *given), given))
        require(
            (
                rising and given[:1] in ((), (0,)),
                lambda: f"rounds={given!r}: expected a tuple of ascending positions that begins with 0",
            )
        )

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """A dense plan up to the watershed layer, which selects; the selected rounds above it."""
        ctx, Tq, Tk = ctx or {}, q.shape[2], k.shape[2]
        offset, layer = ctx.get("q_offset", 0), ctx.get("layer")
        if isinstance(offset, Tensor):
            if offset.numel() != 1:
                raise SparseFlashError(
                    f"ctx['q_offset'] {list(offset.shape)}: rounds are those of one chat: expected one number"
                )
            offset = int(offset)
        state = self.begun(ctx.get("state"), offset, Tq, Tk)
        chooses = layer is None or layer == self.watershed
        if chooses and len(state.starts) > 1 and Tq and (Tq > 1 or state.kept is None):
            state = state._replace(kept=self.chosen(q, k, state.starts, offset, ctx))
        if state.kept is None or (layer is not None and layer <= self.watershed):
            plan = Plan.dense(Tq, Tk, causal=True, q_offset=offset, device=q.device)
        else:
            plan = _reading(state, Tq, Tk, offset, q.device)
        return Selection(plan, state=state)

    def begun(self, before: Any, offset: int, Tq: int, Tk: int) -> Rounds:
        """Rounds so far: those of the state before, and the one that this call begins, if any."""
        known = before.starts if isinstance(before, Rounds) else (0,)
        starts = tuple(x for x in known if x <= offset)
        if self.rounds:
            starts = tuple(x for x in self.rounds if x < Tk)
        elif Tq > 1 and offset:
            starts = tuple(dict.fromkeys((*starts, offset)))
        same = isinstance(before, Rounds) and before.starts == starts
        return Rounds(starts or (0,), before.kept if same else None)

    def chosen(self, q: Tensor, k: Tensor, starts: tuple[int, ...], offset: int, ctx: Context) -> Tensor:
        """Select the earlier rounds with most mass of the question's tokens, bool `[B, rounds - 1]`."""
        first, edges = max(starts[-1] - offset, 0), torch.tensor(starts, device=q.device)
        options = {"scale": ctx.get("scale"), "softcap": ctx.get("softcap")}
        mass = round_mass(q[:, :, first:], k, edges, offset + first, **options)
        best = mass.argsort(dim=-1, descending=True, stable=True)
        sizes, mass = (edges[1:] - edges[:-1])[best], mass.gather(-1, best)
        wanted = mass.cumsum(-1) - mass < self.share * mass.sum(-1, keepdim=True)
        if self.budget is not None:
            wanted = wanted & (sizes.cumsum(-1) <= self.budget)
            wanted[:, :1] = True
        kept = torch.zeros_like(wanted).scatter(-1, best, wanted)
        kept[:, 0] = True  # round 0 holds the attention sinks
        return kept


@torch.no_grad()
def round_mass(q: Tensor, k: Tensor, edges: Tensor, offset: int, **options: Any) -> Tensor:
    """Sum the causal attention of queries from `offset` on over each round, `[B, n]`.

    `edges [n + 1]` are the starts of the rounds, and the end of the last one.
    """
    plan = Plan.dense(q.shape[2], k.shape[2], causal=True, q_offset=offset, device=q.device)
    lse = attention(q, k, k, plan, return_lse=True, **options)[1]
    keys = attention_stats(q, k, lse, plan, over="key", **options).sum(1)
    before = torch.nn.functional.pad(keys.double().cumsum(-1), (1, 0))[:, edges]
    return before.diff().float()


def _reading(state: Rounds, Tq: int, Tk: int, offset: int, device: torch.device) -> Plan:
    """Plan of the selected rounds and all keys from the question on; queries before it see everything."""
    assert state.kept is not None
    edges = torch.tensor((*state.starts, Tk), device=device)
    spans = torch.stack([edges[:-1], edges[1:]], -1)
    seen = torch.nn.functional.pad(state.kept, (0, 1), value=True)[:, None, None, :, None]
    tile = max(1, min(Tq, TILE)) if offset >= state.starts[-1] else 1
    tiles = -(-Tq // tile)
    if tile == 1:
        early = torch.arange(offset, offset + Tq, device=device) < state.starts[-1]
        seen = seen | early.view(1, 1, -1, 1, 1)
    spans = torch.where(seen, spans, 0).expand(-1, -1, tiles, -1, -1)
    return Plan.from_spans(spans, Tq=Tq, Tk=Tk, tile=tile, causal=True, q_offset=offset)
