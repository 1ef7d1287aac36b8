"""SparseK attention: a learned score per key, and a differentiable choice of about k keys."""

from __future__ import annotations

import heapq
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.numerics import state_dtype
from ..common.errors import SparseFlashError, require
from ..ops._arguments import AnyPlan
from ..ops._register import Gradient, register
from ..ops.attention import attention
from ..ops.rows import take_rows
from ..plan import Plan
from ..plan.options import is_count, precise
from .base import Layer, Positions, State, check_choice, check_sizes, survivors

WIDEST = 256
"""Widest values of one attention call; wider ones take two calls."""


class _Keep(NamedTuple):
    k: int


def _thresholds(scores: list[float], k: int) -> list[float]:
    """Threshold tau of every prefix, by two heaps: each key is whole, then a fraction, then gone. O(T log T).

    f(t) = sum_j clip(u_j - t, 0, 1) falls with t and rises with every key, so tau never falls. Between two
    edges (where a key goes, or stops being whole) f is linear: `fractions - len * t + whole = k`.
    """
    found, tau, seen, total = [], -math.inf, 0, 0.0
    whole: list[float] = []
    part: list[float] = []
    for u in scores:
        seen += u != -math.inf  # -inf marks padding
        if u - tau >= 1 and u != -math.inf:
            heapq.heappush(whole, u)
        elif u > tau:
            heapq.heappush(part, u)
            total += u
        while seen > k:
            edge = min(part[0] if part else math.inf, whole[0] - 1 if whole else math.inf)
            if part and len(whole) < k:
                at = (total + (len(whole) - k)) / len(part)
                if at <= edge:
                    tau = max(tau, at)
                    break
            elif not part and len(whole) <= k:  # f is constant between these edges: whole keys only
                break
            tau = max(tau, edge)
            if part and part[0] <= edge:
                total -= heapq.heappop(part)
                total = total if part else 0.0
            else:
                total += whole[0]
                heapq.heappush(part, heapq.heappop(whole))
        found.append(tau)
    return found


def _solve(u: Tensor, options: _Keep) -> Tensor:
    rows = u.detach().double().flatten(0, -2).tolist() if u.dim() > 1 else [u.tolist()]
    tau = torch.tensor([_thresholds(row, options.k) for row in rows], dtype=u.dtype, device=u.device)
    return tau.reshape(u.shape)


def _slope(run: Any, kept: Any, slopes: Any, options: _Keep) -> Any:
    """d tau_i / d u_j is 1 / |S_i| for j in S_i, the fractional keys of prefix i: two prefix-sum reads."""
    (u, tau), dtau = kept, slopes[0]
    if dtau is None:
        return (None,)
    whole, until = lives(u, tau)
    T = u.shape[-1]
    edges = torch.zeros((*u.shape[:-1], T + 1), dtype=torch.float64, device=u.device)
    one = torch.ones_like(edges[..., 1:])
    count = edges.scatter_add(-1, whole, one).scatter_add(-1, until, -one).cumsum(-1)[..., :T]
    share = torch.where(count > 0, dtau.double() / count.clamp(min=1), 0)
    running = torch.cat([torch.zeros_like(share[..., :1]), share.cumsum(-1)], -1)
    return (running.gather(-1, until) - running.gather(-1, whole),)


_threshold = register(
    "sparsek_threshold",
    _solve,
    lambda u, *rest: torch.empty_like(u, memory_format=torch.contiguous_format),
    gradient=Gradient(_slope, lambda given, found: (given[0], found)),
)


def lives(u: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `[.., T]` from which a key is no longer whole, and no longer kept at all; T for never."""
    u, tau = u.detach(), tau.detach().contiguous()
    own = torch.arange(u.shape[-1], device=u.device)
    whole = torch.searchsorted(tau, (u - 1).contiguous(), right=True)
    until = torch.searchsorted(tau, u.contiguous())
    return torch.maximum(torch.minimum(whole, until), own), torch.maximum(until, own)


def sparsek_threshold(u: Tensor, k: int) -> Tensor:
    """SparseK threshold of every prefix: `sum_{j <= i} clip(u_j - tau_i, 0, 1) = k`.

    Parameters
    ----------
    u : Tensor
        Scores `[..., T]`, floating point; -inf marks padding.
    k : int
        Sum of the weights per prefix.

    Returns
    -------
    Tensor
        tau, shaped as u, with its exact gradient in O(T); -inf while there are at most k keys. tau never
        falls along a row, so a dropped key does not come back.

    Notes
    -----
    Runs on the host with two heaps, O(T log T) a row; scores on an accelerator are copied there and back.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> u = torch.tensor([0.0, 0.5, 1.0])
    >>> tau = sf.nn.sparsek_threshold(u, 1)
    >>> tau.tolist()
    [-inf, -0.25, 0.25]
    >>> (u - tau[-1]).clamp(0, 1).sum().item()
    1.0
    """
    good = isinstance(u, Tensor) and u.dim() > 0 and u.is_floating_point()
    if not good:
        given = f"{list(u.shape)} {u.dtype}" if isinstance(u, Tensor) else type(u).__name__
        raise SparseFlashError(f"u: {given}; expected floating point [..., T]")
    require((is_count(k, 1), lambda: f"k={k!r}: expected a positive int"))
    return _threshold(u.to(state_dtype(u)), _Keep(k)).to(u.dtype)


class SparseKAttention(Layer):
    """Each query attends to a learned choice of about k earlier keys, and to a window of recent ones.

    A key has one score for all queries, `u_j = w . x_j + slope * j`, and the weight
    `m_ij = clip(u_j - tau_i, 0, 1)`, where tau_i makes the weights of keys 0..i sum to k; keys in the last
    `window` have weight 1. Then `o_i = sum_j m_ij e_ij v_j / sum_j m_ij e_ij`, `e_ij = exp(q_i . k_j /
    sqrt(D))`. As tau never falls, a key is whole, then a fraction, then gone for good: two plans of key
    lifetimes (whole, fractional). On fractional keys m is linear in u_j and tau_i, so no per-pair weight is
    ever materialised.

    Paper: Lou et al., "Sparser is Faster and Less is More", arXiv 2406.16747.

    Parameters
    ----------
    width, heads, kv_heads, head_dim, positions, base
        As in `Layer`; positions are rotary by default.
    k, window : int
        Sum of the weights; number of recent keys that are always attended to.
    form : "weight" or "gate"
        Whether m weighs the pair in the softmax, or only the value (the denominator then sums e_ij alone).
    slope : float
        Score added per token of position.

    Notes
    -----
    The state holds the surviving keys and the window, whatever the length: unless all scores fall steadily,
    little more than k + window.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.SparseKAttention(64, 4, k=8, window=4)
    >>> x = torch.randn(2, 100, 64)
    >>> state = layer.new_state(2)
    >>> parts = [layer(part, state=state) for part in x.split(40, dim=1)]
    >>> torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-4)
    True
    >>> state.tensors["k"].shape[2] < 50
    True
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        k: int = 256,
        window: int = 64,
        form: Literal["weight", "gate"] = "weight",
        slope: float = 0.0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: Positions = "rotary",
        base: float = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, positions=positions, base=base)
        check_sizes(1, k=k)
        check_sizes(0, window=window)
        check_choice(form=(form, ("weight", "gate")))
        require(
            (
                isinstance(slope, (int, float)) and math.isfinite(slope),
                lambda: f"slope={slope!r}: expected a finite number",
            )
        )
        self.k, self.window, self.form, self.slope = k, window, form, float(slope)
        self.project_heads(device=device, dtype=dtype)
        self.score = self.linear(width, self.kv_heads, False, device, dtype)
        self.reset()

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Score, choose and attend; x [B, T, width]."""
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        q, k = self.turn(q, state), self.turn(k, state)
        wide, T, past = state_dtype(x), x.shape[1], 0
        with precise(x):  # reduced precision would tie many keys' scores
            u = nn.functional.linear(x.to(wide), self.score.weight.to(wide)).transpose(1, 2)
            if self.slope:
                begin = 0 if state is None else state.length
                u = u + self.slope * torch.arange(begin, begin + T, device=x.device, dtype=wide)
            if state is not None:
                k, v, u = self._with_past(state, k, v, u)
                past = k.shape[2] - T
            tau = sparsek_threshold(u, self.k)
            whole, until = lives(u, tau)
            own = torch.arange(u.shape[-1], device=u.device).expand_as(u)
            near = torch.maximum(whole, own + self.window)
            plans = [
                Plan.from_lifetimes(first, torch.maximum(first, last), Tq=T, q_offset=past)
                for first, last in ((torch.where(u == -torch.inf, near, own), near), (near, until))
            ]
            part, lse_part = self._fractions(q.to(wide), k.to(wide), v.to(wide), u, tau[..., past:], plans[1])
        out, lse = attention(q, k, v, plans[0], return_lse=True)
        lse = lse.to(wide)
        top = torch.maximum(lse, lse_part).detach()
        top = torch.where(top == -torch.inf, 0, top)
        a, b = (lse - top).exp()[..., None], (lse_part - top).exp()[..., None]
        sums = a * out.to(wide) + b * part[..., 1:]
        out = sums / (a + (b * part[..., :1] if self.form == "weight" else b))
        if state is not None:
            self._forget(state, k, v, u, until)
        return self.end(out.to(q.dtype))

    def _fractions(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, tau: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """Means of [m | m v] over fractional keys, and lse: m = u_j - tau_i, so means of u v, v and u."""
        group = self.heads // self.kv_heads
        mean = u.masked_fill(u == -torch.inf, 0).mean(-1, keepdim=True).detach() if u.shape[-1] else 0
        u = torch.where(u == -torch.inf, 0, u - mean)[..., None]  # centred: only differences to tau matter
        tau = torch.where(tau == -torch.inf, 0, tau - mean).repeat_interleave(group, 1)[..., None]
        ones = torch.cat([torch.ones_like(u), v], -1)
        if 2 * ones.shape[-1] <= WIDEST:
            both, lse = attention(q, k, torch.cat([u * ones, ones], -1), plan, return_lse=True)
            first, second = both.chunk(2, -1)
        else:
            first, lse = attention(q, k, u * ones, plan, return_lse=True)
            second = attention(q, k, ones, plan)
        return first - tau * second, lse.to(q.dtype)

    def _with_past(self, state: State, *new: Tensor) -> list[Tensor]:
        kept = [state.tensors.get(name) for name in "kvu"]
        return [y if old is None else torch.cat([old, y], 2) for old, y in zip(kept, new)]

    def _forget(self, state: State, k: Tensor, v: Tensor, u: Tensor, until: Tensor) -> None:
        """Keep keys that a later query may attend to; heads with fewer are padded in front."""
        n = u.shape[-1]
        keep = (until == n) | (torch.arange(n, device=u.device) > n - self.window)
        keep = keep & (u.detach() != -torch.inf)
        place, alive = survivors(keep)
        u = u.gather(-1, place).masked_fill(~alive, -torch.inf)
        state.tensors.update(k=take_rows(k, place), v=take_rows(v, place), u=u)

    def extra_repr(self) -> str:
        """One-line description of the shape and budget."""
        own = f", form={self.form!r}" + (f", slope={self.slope}" if self.slope else "")
        return f"{super().extra_repr()}, k={self.k}, window={self.window}{own}"
