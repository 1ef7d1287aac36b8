"""Routing attention: queries and keys meet in clusters that are learned online."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..backends.numerics import state_dtype
from ..common.errors import require
from ..ops._arguments import AnyPlan
from ..ops.attention import attention
from ..ops.rows import take_rows
from ..plan import Plan
from ..selection.clusters import kmeans
from .base import Layer, Positions, State, check_choice, check_sizes, draw, survivors


class RoutingAttention(Layer):
    """Attention inside clusters: online k-means routes queries and keys to the same centroids.

    q and k are layer-normed without parameters (k is q if `shared`), and routed before rotation. Strict: a
    token belongs to the centroid with the largest `x . mu`, and a query attends to the last `window` keys of
    its cluster up to its own position; this can decode. Not strict (the paper's rule): each centroid takes
    the `window` nearest queries and keys of the whole sequence, its queries attend to its earlier keys,
    outputs of a token in several clusters are averaged, and a token in no cluster outputs 0. Which tokens are
    nearest depends on later ones, so this rule is for training and encoding only.

    Centroids have no gradient. A training forward records the sums of tokens per cluster, and `update()`,
    once a step, moves the centroids: `N <- g N + (1 - g) n`, `M <- g M + (1 - g) sum x`, `mu = M / N`, with N
    smoothed and sums over all processes of `torch.distributed`. A forward recomputed by checkpointing records
    the same sums.

    Paper: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997.

    Parameters
    ----------
    width, heads, kv_heads, head_dim, positions, base, dropout
        As in `Layer`; positions are rotary by default. Each KV head has its own centroids.
    clusters, window : int
        Centroids per head; keys of a cluster that a query attends to (strict), or tokens that a centroid
        takes.
    strict : bool
        Whether to use the causal rule instead of the paper's.
    shared : bool
        Whether keys are the queries (of each KV head's first query head); then there is no key projection.
    decay : float
        g: weight of the old means in an update.
    commitment : float
        `aux_loss` is `commitment` times the mean of `|x - mu|^2` over queries and keys.

    Notes
    -----
    The state holds the last `window` members of each cluster. `start(x)` initialises the centroids by k-means
    on a batch; random centroids would leave some clusters empty.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> layer = sf.nn.RoutingAttention(64, 4, clusters=4, window=16)
    >>> x = torch.randn(2, 100, 64)
    >>> layer.start(x)
    >>> layer(x).shape, float(layer.aux_loss.detach()) > 0
    (torch.Size([2, 100, 64]), True)
    >>> before = layer.centroid.clone()
    >>> layer.update()
    >>> torch.equal(layer.centroid, before)
    False
    """

    centroid: Tensor
    count: Tensor
    total: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        clusters: int = 16,
        window: int = 512,
        strict: bool = True,
        shared: bool = True,
        decay: float = 0.999,
        commitment: float = 1e-4,
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
        check_sizes(1, clusters=clusters, window=window)
        check_choice(strict=(strict, (True, False)), shared=(shared, (True, False)))
        require(
            (0 <= decay < 1, lambda: f"decay={decay!r}: expected a share in [0, 1)"),
            (
                math.isfinite(commitment) and commitment >= 0,
                lambda: f"commitment={commitment!r}: expected a number >= 0",
            ),
        )
        self.clusters, self.window, self.strict, self.shared = clusters, window, strict, shared
        self.decay, self.commitment = float(decay), float(commitment)
        self.project_heads(device=device, dtype=dtype)
        if shared:
            del self.key
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (self.kv_heads, clusters, self.head_dim)
        self.register_buffer("centroid", torch.empty(shape, device=device, dtype=wide))
        self.register_buffer("total", torch.empty(shape, device=device, dtype=wide))
        self.register_buffer("count", torch.empty(shape[:2], device=device, dtype=wide))
        self._seen: tuple[Tensor, Tensor] | None = None
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights and random centroids, each with a count of one token."""
        super().reset(generator)
        draw(self.centroid, 1.0, generator)
        self.total.copy_(self.centroid)
        self.count.fill_(1.0)
        self._seen = None

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project and normalise queries [B, Hq, T, D] and keys [B, Hkv, T, D]."""
        q = nn.functional.layer_norm(self.split(self.query(x)), (self.head_dim,))
        if self.shared:
            return q, q[:, :: self.heads // self.kv_heads]
        return q, nn.functional.layer_norm(self.split(self.key(x)), (self.head_dim,))

    def labels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cluster of each query `[B, Hq, T]` and each key `[B, Hkv, T]` of x `[B, T, width]`, int64."""
        q, k = (self._scores(y).argmax(2) for y in self.routed(x))
        return q, k

    def _scores(self, x: Tensor) -> Tensor:
        """`x . mu` of every head and centroid, [B, H, C, T], without gradient."""
        each = self.centroid.repeat_interleave(x.shape[1] // self.kv_heads, 0)
        return each @ x.detach().to(each.dtype).mT

    def _by_group(self, x: Tensor) -> Tensor:
        """Sum over the query heads that share centroids: [H, ...] to [Hkv, ...]."""
        return x.view(self.kv_heads, x.shape[0] // self.kv_heads, *x.shape[1:]).sum(1)

    def _note(self, *routed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(counts, sums, squared distances) for tokens [B, H, T, D] and their clusters [B, H, T]."""
        count, total, far = torch.zeros_like(self.count), torch.zeros_like(self.total), []
        for x, label in routed:
            each = self.centroid.repeat_interleave(x.shape[1] // self.kv_heads, 0)
            own = each[torch.arange(x.shape[1], device=x.device)[:, None], label]
            far.append((x.to(own.dtype) - own).square().sum(-1).flatten())
            member = nn.functional.one_hot(label, self.clusters).to(each.dtype)  # [B, H, T, C]
            sums = (member.mT @ x.detach().to(each.dtype)).sum(0)
            count = count + self._by_group(member.sum((0, 2)))
            total = total + self._by_group(sums)
        return count, total, torch.cat(far)

    def _route(
        self, x: Tensor, state: State | None, document: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Output of the layer, and the statistics to record (see `_note`)."""
        q, k = self.routed(x)
        v = self.split(self.value(x))
        scores = [self._scores(y) for y in ((k, q) if not self.shared or k.shape != q.shape else (q,))]
        labels = [s.argmax(2) for s in scores]
        own, label = labels[0], labels[-1]  # of keys, of queries
        noted = self._note((q, label), *(() if self.shared else ((k, own),)))
        q, k = self.turn(q, state), self.turn(k, state)
        if self.strict:
            out = self._strict(q, k, v, own, label, state, document)
        else:
            out = self._nearest(q, k, v, scores[0], scores[-1])
        return self.end(out), noted

    def _strict(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Tensor,
        label: Tensor,
        state: State | None,
        document: Tensor | None,
    ) -> Tensor:
        past = 0
        if document is not None:
            own, label = own + document * self.clusters, label + document * self.clusters
        if state is not None:
            old = [state.tensors.get(name) for name in ("k", "v", "own")]
            k, v, own = (y if z is None else torch.cat([z, y], 2) for z, y in zip(old, (k, v, own)))
            past = k.shape[2] - q.shape[2]
        each = own if own.shape == label.shape else own.repeat_interleave(self.heads // self.kv_heads, 1)
        plan = Plan.from_buckets(
            label,
            each,
            q_offset=past,
            window=(self.window - 1, 0),
            buckets=None if document is not None else self.clusters + (past > 0),
        )
        if state is not None:
            self._forget(state, k, v, own)
        return attention(q, k, v, plan, dropout_p=self.dropout_p)

    def _forget(self, state: State, k: Tensor, v: Tensor, own: Tensor) -> None:
        """Keep the last members of each cluster; heads with fewer are padded in front with cluster -1."""
        member = nn.functional.one_hot(own + 1, self.clusters + 1)  # padding is -1
        behind = member.flip(2).cumsum(2).flip(2).gather(-1, (own + 1)[..., None])[..., 0]
        keep = (behind <= self.window) & (own >= 0)
        place, alive = survivors(keep)
        own = own.gather(-1, place).masked_fill(~alive, -1)
        state.tensors.update(k=take_rows(k, place), v=take_rows(v, place), own=own)

    def _nearest(self, q: Tensor, k: Tensor, v: Tensor, of_keys: Tensor, of_queries: Tensor) -> Tensor:
        """Attend by the paper's rule: the nearest tokens of each centroid form a bucket of gathered rows."""
        B, H, T, D = q.shape
        most = min(self.window, T)
        rows, keys = (s.topk(most, -1).indices.sort(-1).values.flatten(2) for s in (of_queries, of_keys))
        bucket = torch.arange(self.clusters, device=q.device).repeat_interleave(most)[None, None]
        plan = Plan.from_buckets(bucket, bucket, causal=False, buckets=self.clusters)
        each = keys.repeat_interleave(H // keys.shape[1], 1)
        plan = plan.with_rules(causal=True, q_pos=rows.int(), k_pos=each.int())
        out = attention(
            take_rows(q, rows), take_rows(k, keys), take_rows(v, keys), plan, dropout_p=self.dropout_p
        )
        into = rows[..., None].expand_as(out)
        times = torch.zeros(B, H, T, device=q.device).scatter_add(
            2, rows, torch.ones_like(rows, dtype=torch.float)
        )
        sums = torch.zeros(B, H, T, D, dtype=state_dtype(q), device=q.device)
        sums = sums.scatter_add(2, into, out.to(sums.dtype))
        return (sums / times.clamp(min=1)[..., None]).to(out.dtype)

    def _learn(self, count: Tensor, total: Tensor, far: Tensor) -> None:
        self._aux = self.commitment * (far.mean() if far.numel() else far.sum())
        self._seen = (count, total) if self.training else None

    def mix(self, x: Tensor, plan: AnyPlan | None, state: State | None) -> Tensor:
        """Route and attend; x [B, T, width]."""
        out, noted = self._route(x, state)
        self._learn(*noted)
        return out

    def packed(self, x: Tensor, edges: list[int]) -> Tensor:
        """Run on packed documents: as clusters per document if strict, else one by one."""
        if self.strict:
            length = torch.tensor([b - a for a, b in zip(edges, edges[1:])], device=x.device)
            out, noted = self._route(
                x, None, torch.arange(len(length), device=x.device).repeat_interleave(length)
            )
            self._learn(*noted)
            return out
        parts = [self._route(x[:, a:b], None) for a, b in zip(edges, edges[1:])]
        counts, totals, far = zip(*(noted for _, noted in parts))
        self._learn(torch.stack(counts).sum(0), torch.stack(totals).sum(0), torch.cat(far))
        return torch.cat([out for out, _ in parts], 1)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centroids by the recorded sums of the last training forward."""
        if self._seen is None:
            return
        count, total = self._seen
        self._seen = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            torch.distributed.all_reduce(total)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        all_of = self.count.sum(-1, keepdim=True)
        smooth = (self.count + 1e-5) / (all_of + self.clusters * 1e-5) * all_of
        self.centroid.copy_(self.total / smooth[..., None])

    @torch.no_grad()
    def start(self, x: Tensor, *, iterations: int = 10) -> None:
        """Initialise the centroids by k-means on a batch `[B, T, width]`, from evenly spaced tokens."""
        q, k = self.routed(x)
        groups = q.view(len(q), self.kv_heads, -1, self.head_dim).transpose(0, 1).flatten(1, 2)
        if not self.shared:
            groups = torch.cat([groups, k.transpose(0, 1).flatten(1, 2)], 1)
        label, found = kmeans(groups[None], self.clusters, iterations=iterations)
        member = nn.functional.one_hot(label[0].long(), self.clusters).to(self.count)
        self.count.copy_(member.sum(1))
        self.centroid.copy_(found[0])
        self.total.copy_(found[0] * self.count[..., None])

    def new_state(self, batch: int) -> State:
        """Make an empty cache."""
        require(
            (self.strict, "strict=False has no state: which tokens a centroid takes depends on later ones")
        )
        return super().new_state(batch)

    def __getstate__(self) -> dict[str, object]:
        """State without the recorded sums."""
        return {**super().__getstate__(), "_seen": None}

    def extra_repr(self) -> str:
        """One-line description of the shape and clusters."""
        own = f", clusters={self.clusters}, window={self.window}, strict={self.strict}, shared={self.shared}"
        return super().extra_repr() + own
