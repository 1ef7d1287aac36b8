"""Combiner: direct attention to a few keys, and to regions summarised by attention inside them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..backends.numerics import state_dtype
from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..ops.merge import merge
from ..plan import Plan
from .base import Layer, Positions, State, check_choice, check_sizes

Pattern = Literal["fixed", "logsparse", "axial"]


class Combiner(Layer):
    """Every earlier token has some weight, as a direct key or through a region, in one softmax.

    `p(j | i) = a_i(j)` for a direct key j, and `a_i(R) p(j | R)` for a key j in a region R, where a_i is the
    softmax over the logits `s q_i . k_j` of direct keys and `s q_i . k_R` of regions. With `q_R`, `k_R` the
    elementwise maxima over the region, `p(j | R) = softmax_j(s q_R . k_j)`, so `v_R = sum_j p(j | R) v_j` is
    the same for all queries.

    - "fixed": direct keys are those of the query's own segment of `segment` tokens, up to itself; regions are
      all earlier segments. O(T (segment + T / segment)).
    - "logsparse": the only direct key is the query's own; regions are the aligned power-of-two blocks that
      partition the tokens before it. O(T log T).
    - "axial": tokens form rows of `segment` columns. Direct keys are those of the query's row up to itself;
      each earlier row is a region, summarised at the query's column: `v_R` uses the query of the token there
      as `q_R`, and `k_R = W_s v_R`. O(T (segment + T / segment)).

    Both ways (`causal=False`, "fixed" alone), direct keys are the whole own segment, regions all others.

    Paper: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv 2107.05768.

    Parameters
    ----------
    width, heads, kv_heads, head_dim, positions, base, dropout
        As in `Layer`; positions are rotary by default. Queries are pooled for each query head.
    pattern : "fixed", "logsparse" or "axial"
        Which keys are direct, and which regions there are.
    segment : int
        Tokens of a segment or row; the last one may be shorter.
    log_size : bool
        Whether to add the log of a region's size to its logit, so that a region of n equal keys weighs as
        much as n direct keys. Not in the paper, where a region weighs as much as one key.
    causal : bool
        Whether a query sees only what is not later.

    Notes
    -----
    The state holds the open segment and all summaries: T / segment of them ("axial": T). "logsparse" has no
    state, nor has a layer that looks both ways.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.Combiner(64, 4, segment=8)
    >>> x = torch.randn(2, 100, 64)
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        pattern: Pattern = "fixed",
        segment: int = 64,
        log_size: bool = False,
        causal: bool = True,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Positions = "rotary",
        base: float = 10_000.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, positions=positions, base=base)
        self.leave_out(dropout)
        check_choice(pattern=(pattern, ("fixed", "logsparse", "axial")), log_size=(log_size, (True, False)))
        check_choice(causal=(causal, (True, False)))
        check_sizes(1, segment=segment)
        require(
            (causal or pattern == "fixed", lambda: f"causal=False with pattern={pattern!r}: expected 'fixed'")
        )
        self.pattern, self.segment, self.log_size, self.causal = pattern, segment, log_size, causal
        self.project_heads(device=device, dtype=dtype)
        axial = pattern == "axial"
        self.summary = self.linear(self.head_dim, self.head_dim, False, device, dtype) if axial else None
        self.reset()

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Attend to keys and regions; x [B, T, width]."""
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        q, k = self.turn(q, state), self.turn(k, state)
        if self.pattern == "logsparse":
            return self.end(self._logsparse(q, k, v))
        if not self.causal:
            return self.end(self._both_ways(q, k, v))
        T, c, past = x.shape[1], self.segment, 0
        own = q
        if state is not None:
            old = [state.tensors.get(name) for name in ("q", "k", "v")]
            own, k, v = (y if z is None else torch.cat([z, y], 2) for z, y in zip(old, (q, k, v)))
            past = own.shape[2] - T
        whole = own.shape[2] // c * c
        made = self._rows if self.summary is not None else self._pooled
        key, value = made(own[:, :, :whole], k[:, :, :whole], v[:, :, :whole], c)
        before = 0
        if state is not None:
            for name, y in (("q", own), ("k", k), ("v", v)):
                state.tensors[name] = y[:, :, whole:]
            key, value = state.append(key=key, value=value)
            before = key.shape[2] - (whole if self.summary is not None else whole // c)
        at = torch.arange(past, past + T, device=x.device)
        near = Plan.from_intervals(
            (at // c * c).view(1, 1, -1), (at + 1).view(1, 1, -1), Tk=k.shape[2], moving=True
        )
        if self.summary is None:
            far = Plan.from_intervals(None, (before + at // c).view(1, 1, -1), Tk=key.shape[2], moving=True)
        else:
            column = torch.arange(key.shape[2], device=x.device) % c
            far = Plan.from_buckets(
                (at % c).view(1, 1, -1),
                column.view(1, 1, -1),
                include_self=False,
                q_offset=before + past,
                buckets=c,
            )
        return self.end(self._joined(q, (k, v, near), (key, value, far), [(key.shape[2], c)]))

    def _joined(
        self,
        q: Tensor,
        direct: tuple[Tensor, Tensor, Plan],
        regions: tuple[Tensor, Tensor, AnyPlan],
        runs: list[tuple[int, int]],
    ) -> Tensor:
        """One softmax over direct keys and regions, of (number, size) each: out [B, Hq, T, D]."""
        p, sizes = self.dropout_p, self._sizes(regions[0], runs)
        parts = [
            attention(q, *direct, dropout_p=p, return_lse=True),
            attention(q, *regions, key_bias=sizes, dropout_p=p, return_lse=True),
        ]
        return merge(parts)[0]

    def _both_ways(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the whole own segment, and to all other segments as regions; the last may be shorter."""
        T, c = q.shape[2], self.segment
        at = torch.arange(T, device=q.device)
        own, whole, runs = at // c, T // c * c, [(T // c, c)]
        made = [self._pooled(q[:, :, :whole], k[:, :, :whole], v[:, :, :whole], c)]
        if T > whole:
            made.append(self._pooled(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:], T - whole))
            runs.append((1, T - whole))
        key, value = (torch.cat(parts, 2) for parts in zip(*made, strict=True))
        near = Plan.from_intervals(
            (own * c).view(1, 1, -1), ((own + 1) * c).clamp(max=T).view(1, 1, -1), Tk=T, moving=True
        )
        n, row = key.shape[2], own.view(1, 1, -1)
        before = Plan.from_intervals(None, row, Tk=n, moving=True)
        behind = Plan.from_intervals(row + 1, torch.full_like(row, n), Tk=n, moving=True)
        return self._joined(q, (k, v, near), (key, value, (before, behind)), runs)

    def _sizes(self, key: Tensor, runs: list[tuple[int, int]]) -> Tensor | None:
        """Log of the number of tokens that each key stands for, as a key bias."""
        if not self.log_size:
            return None
        wide = state_dtype(key)
        parts = [torch.full((n,), math.log(size), dtype=wide, device=key.device) for n, size in runs]
        return torch.cat(parts)[None, None]

    def _pooled(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Summarise regions of `size` tokens: (k_R, v_R), [B, Hq, n, D] each."""
        group = self.heads // self.kv_heads
        q, k, v = (y.reshape(*y.shape[:2], y.shape[2] // size, size, y.shape[3]) for y in (q, k, v))
        wide = state_dtype(q)
        key = k.amax(3).repeat_interleave(group, 1)
        k, v = (y.repeat_interleave(group, 1) for y in (k, v))
        logit = (k.to(wide) * q.amax(3).to(wide)[..., None, :]).sum(-1) * self.head_dim**-0.5
        value = (logit.softmax(-1)[..., None] * v.to(wide)).sum(3)
        return key, value.to(v.dtype)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Summarise every token of every whole row over its row: (k_R, v_R), [B, Hq, n, D] each."""
        assert self.summary is not None
        edges = torch.arange(0, q.shape[2] + 1, size, device=q.device)
        value = attention(q, k, v, Plan.from_documents(edges, Tq=q.shape[2], Tk=q.shape[2], causal=False))
        return self.summary(value), value

    def _logsparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Concatenate block levels as keys; a query attends to itself and one block per bit of its place."""
        T, group = q.shape[2], self.heads // self.kv_heads
        keys, values = [k.repeat_interleave(group, 1)], [v.repeat_interleave(group, 1)]
        at = torch.arange(T, device=q.device)
        index, runs, level = [at, torch.where(at % 2 == 1, at - 1, -1)], [(T, 1)], 1
        while 1 << level < T:
            size, begin = 1 << level, sum(n for n, _ in runs)
            whole = T // size * size
            key, value = self._pooled(q[:, :, :whole], k[:, :, :whole], v[:, :, :whole], size)
            block = at // size
            index.append(torch.where(block % 2 == 1, begin + block - 1, -1))
            keys, values, runs = [*keys, key], [*values, value], [*runs, (whole // size, size)]
            level += 1
        key, value = torch.cat(keys, 2), torch.cat(values, 2)
        seen = torch.stack(index, -1)[None, None]
        plan = Plan.from_keys(seen, Tq=T, Tk=key.shape[2], unique=True)
        return attention(q, key, value, plan, key_bias=self._sizes(key, runs), dropout_p=self.dropout_p)

    def new_state(self, batch: int) -> State:
        """An empty state."""
        require(
            (self.pattern != "logsparse", "logsparse has no state: its blocks grow with the sequence"),
            (self.causal, "causal=False has no state: earlier tokens see later ones"),
        )
        return super().new_state(batch)

    def extra_repr(self) -> str:
        """One-line description of the shape and pattern."""
        own = f", pattern={self.pattern!r}, segment={self.segment}"
        own += ", causal=False" if not self.causal else ""
        return super().extra_repr() + own + (", log_size=True" if self.log_size else "")
