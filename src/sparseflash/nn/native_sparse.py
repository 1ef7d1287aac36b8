"""Native sparse attention: compressed blocks, the key blocks they select, and a window, gated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends.numerics import state_dtype
from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..plan import Plan
from ..selection.budgets import top_indices
from .base import Layer, Positions, State, check_sizes, draw

SCORES = 1 << 22
"""Upper bound on the compressed scores in memory at a time."""


class NativeSparseAttention(Layer):
    """Three attention branches, each with its own keys and values, summed with learned gates.

    - *Compressed*: blocks of `block` keys, one every `stride`, become one key and one value each, `W_2
      relu(W_1 [k_1 + p_1 | ... | k_l + p_l])`. A query attends to those of finished blocks.
    - *Selected*: the weights that a group of query heads gives to the summaries, split by their overlap with
      each block of `select` keys, rank these blocks; the group attends to the best `top`, which always
      include the first `first` and the last `near` (with the query's own). The choice has no gradient.
    - *Window*: the last `window` keys.

    `o = sum_b sigmoid(W_b x) o_b`, a gate for each branch and head. Sizes need not divide one another. Rotary
    positions apply to the selected and the window branch; summaries have the in-block positions p.

    Paper: Yuan et al., "Native Sparse Attention", arXiv 2502.11089.

    Parameters
    ----------
    width, heads, kv_heads, head_dim, positions, base, dropout
        As in `Layer`; positions are rotary by default. The heads of a KV head select together.
    block, stride : int
        Keys of a summary, and distance from one summary to the next (at most `block`).
    select, top, first, near : int
        Keys of a selectable block; blocks a query attends to, and how many of them are always the first and
        the last ones.
    window : int
        Number of recent keys in the window branch.

    Notes
    -----
    The state holds all keys and values of the selected branch, all summaries, and the last few keys of the
    other branches.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.NativeSparseAttention(64, 4, kv_heads=2, block=8, stride=4, select=8, top=4, window=16)
    >>> x = torch.randn(2, 100, 64)
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-4)
    True
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        block: int = 32,
        stride: int = 16,
        select: int = 64,
        top: int = 16,
        first: int = 1,
        near: int = 2,
        window: int = 512,
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
        check_sizes(1, block=block, stride=stride, select=select, top=top, near=near, window=window)
        check_sizes(0, first=first)
        require(
            (
                stride <= block,
                lambda: f"stride={stride}: expected at most block={block}, or keys are in no summary",
            ),
            (first + near <= top, lambda: f"first={first} and near={near} blocks are more than top={top}"),
        )
        self.block, self.stride, self.select, self.top = block, stride, select, top
        self.first, self.near, self.window = first, near, window
        D, few = self.head_dim, self.kv_heads * self.head_dim
        self.project_heads(device=device, dtype=dtype)
        self.key = self.linear(width, 3 * few, False, device, dtype)
        self.value = self.linear(width, 3 * few, False, device, dtype)
        self.gate = self.linear(width, 3 * heads, False, device, dtype)
        self.place = nn.Parameter(torch.empty(2, block, D, device=device, dtype=dtype))
        self.summary_in = nn.ModuleList(self.linear(block * D, D, False, device, dtype) for _ in range(2))
        self.summary_out = nn.ModuleList(self.linear(D, D, False, device, dtype) for _ in range(2))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights; in-block positions are small."""
        super().reset(generator)
        draw(self.place, 0.02, generator)

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Compress, select, attend; x [B, T, width]."""
        T, past = x.shape[1], 0 if state is None else state.length
        q = self.split(self.query(x))
        k, k_sel, k_near = self.split(self.key(x)).chunk(3, 1)
        v, v_sel, v_near = self.split(self.value(x)).chunk(3, 1)
        k, v = self._summaries(k, v, state)
        at = torch.arange(past, past + T, device=x.device)
        done = ((at + 1 - self.block).div(self.stride, rounding_mode="floor") + 1).clamp(min=0)
        far = Plan.from_intervals(None, done.view(1, 1, -1), Tk=k.shape[2], moving=True)
        compressed, lse = attention(q, k, v, far, dropout_p=self.dropout_p, return_lse=True)
        q_turned, k_sel, k_near = (self.turn(y, state) for y in (q, k_sel, k_near))
        recent = 0
        if state is not None:
            k_sel, v_sel = state.append(k_sel=k_sel, v_sel=v_sel)
            k_near, v_near = (self._recent(state, n, y) for n, y in (("k_near", k_near), ("v_near", v_near)))
            recent = k_near.shape[2] - T
        chosen = Plan.from_choice(
            self._choose(q, k, lse, at, done, past + T),
            Tk=past + T,
            unit=self.select,
            q_offset=past,
            unique=True,
            tile=1 if torch.compiler.is_compiling() else None,
        )
        selected = attention(q_turned, k_sel, v_sel, chosen, dropout_p=self.dropout_p)
        local = Plan.dense(
            T, k_near.shape[2], causal=True, window=(self.window - 1, 0), q_offset=recent, device=x.device
        )
        near = attention(q_turned, k_near, v_near, local, dropout_p=self.dropout_p)
        gate = self.gate(x).sigmoid().view(*x.shape[:2], 3, self.heads, 1).permute(2, 0, 3, 1, 4)
        return self.end(gate[0] * compressed + gate[1] * selected + gate[2] * near)

    def _summaries(self, k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
        """Summarise every finished block into one key and one value, [B, Hkv, C, D]."""
        found = []
        for n, (name, x) in enumerate((("k", k), ("v", v))):
            if state is not None and name + "_open" in state.tensors:
                x = torch.cat([state.tensors[name + "_open"], x], 2)
            count = max(0, (x.shape[2] - self.block) // self.stride + 1)
            rows = x[:, :, :0, None].expand(-1, -1, -1, self.block, -1)
            if count:
                rows = x.unfold(2, self.block, self.stride).transpose(-1, -2)
            hidden = self.summary_in[n]((rows + self.place[n]).flatten(-2))
            made = self.summary_out[n](hidden.relu())
            if state is not None:
                (made,) = state.append(**{name: made})
                state.tensors[name + "_open"] = x[:, :, count * self.stride :]
            found.append(made)
        return found[0], found[1]

    def _recent(self, state: State, name: str, x: Tensor) -> Tensor:
        old = state.tensors.get(name)
        x = x if old is None else torch.cat([old, x], 2)
        state.tensors[name] = x[:, :, max(0, x.shape[2] - self.window + 1) :]
        return x

    @torch.no_grad()
    def _choose(self, q: Tensor, k: Tensor, lse: Tensor, at: Tensor, done: Tensor, total: int) -> Tensor:
        """Choose the blocks of each query, int32 [B, Hkv, T, top], padded with -1."""
        (B, H, T, D), C, wide = q.shape, k.shape[2], state_dtype(q)
        S = -(-total // self.select)
        begin = torch.arange(C, device=q.device)[:, None] * self.stride
        edge = torch.arange(S, device=q.device) * self.select
        reach = torch.minimum(begin + self.block, edge + self.select) - torch.maximum(begin, edge)
        share = reach.clamp(min=0).to(wide) / self.block  # [C, S]
        of = at[:, None] // self.select
        block = torch.arange(S, device=q.device)
        always = (block < self.first) | (block > of - self.near)
        step = max(1, SCORES // max(1, B * H * max(C, S)))
        group, found = H // k.shape[1], []
        keys = k.to(wide).repeat_interleave(group, 1).mT
        for lo in range(0, T, step):
            rows = slice(lo, lo + step)
            logit = q[:, :, rows].to(wide) @ keys * D**-0.5
            sees = torch.arange(C, device=q.device) < done[rows, None]
            weight = torch.where(sees, (logit - lse[:, :, rows, None].to(wide)).exp(), 0)
            mass = (weight @ share).view(B, k.shape[1], group, logit.shape[2], S).sum(2)
            mass = mass.masked_fill(always[rows], torch.inf)
            found.append(top_indices(mass, self.top, block <= of[rows]))
        if found and B:
            return torch.cat(found, 2)
        return torch.full((1, k.shape[1], T, min(self.top, S)), -1, dtype=torch.int32, device=q.device)

    def extra_repr(self) -> str:
        """One-line description of the shape and sizes."""
        names = ("block", "stride", "select", "top", "first", "near", "window")
        return ", ".join([super().extra_repr(), *(f"{n}={getattr(self, n)}" for n in names)])
