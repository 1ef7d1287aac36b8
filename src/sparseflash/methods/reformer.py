"""Reformer: shared-QK attention inside fixed chunks of the hash-sorted sequence, several rounds merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.errors import require
from ..plan import Plan
from ..selection.orders import lsh_buckets, lsh_planes, sorted_order
from .base import Context, Method, Selection, check_counts

_PLANES = ("per-head", "shared")


@dataclass(frozen=True)
class Reformer(Method):
    """Sort tokens by hash bucket, cut the order into chunks, attend within a chunk and to the one before.

    A baseline for hash-sparse attention, on the same kernels. Chunks have a fixed size while buckets do
    not, so equal-bucket pairs more than a chunk apart in the sorted order are missed (`coverage`); more
    rounds, with other planes, include more of them.

    Paper: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, arXiv 2001.04451,
    section 2.

    Parameters
    ----------
    bucket : int
        Tokens in a chunk; a query sees at most 2 * bucket - 1 keys a round. There are about T / bucket
        buckets.
    rounds : int
        Hash rounds. One softmax covers the pairs of all rounds; a pair found in n rounds counts n times,
        which is the original's default. The paper uses 1 to 8.
    seed : int
        Seed of the planes of all rounds.
    planes : "shared" or "per-head"
        The same random directions for all heads (the original's default), or separate ones per KV head.
    attend_across_buckets : bool
        Whether a query sees keys of other buckets in its chunks (the original's default).

    Notes
    -----
    - As in the original a token sees itself only if it sees nothing else: the self pair is excluded, and
      a query without any key returns its own value (`lse` stays -inf). Made for tied k = q / |q|, which
      the caller provides; untied q and k are hashed and sorted separately, and chunk c of the queries
      sees chunks c and c - 1 of the keys.
    - The first chunk of a round also sees the last of the same round. (In the original it sees the last
      chunk of the round before; with one round that is the same.)
    - Causality is that of the original positions, but chunk boundaries depend on all tokens: changing a
      later token may change the keys that an earlier one sees (`causal_selection` is False, and the
      method cannot decode).
    - T need not be a multiple of 2 * bucket: the last chunk of the order has empty lanes.
    - `ctx` keys: `q_bucket` and `k_bucket`, `[rounds, B|1, H|1, T]` integers, replace the hash.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> q, v = torch.randn(2, 1, 4, 300, 32)
    >>> k = torch.nn.functional.normalize(q, dim=-1)
    >>> out = sf.methods.Reformer(bucket=32, rounds=2)(q, k, v)
    >>> bool((out[:, :, 0] == v[:, :, 0]).all())
    True
    """

    bucket: int = 64
    rounds: int = 1
    seed: int = 0
    planes: str = "shared"
    attend_across_buckets: bool = True

    reads = ("q_bucket", "k_bucket")
    paper = "arXiv 2001.04451"
    phases = ("training",)
    causal_selection = False
    approximate = True

    def __post_init__(self) -> None:
        check_counts(self, 1, "bucket", "rounds")
        known = self.planes in _PLANES
        require((known, lambda: f"planes={self.planes!r}: expected one of {', '.join(_PLANES)}"))

    def buckets(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the buckets of every round, int32: `[rounds, B, Hq, T]` and `[rounds, B, Hkv, T]`."""
        chunks = -(-q.shape[2] // self.bucket)
        number = max(2, chunks + chunks % 2)
        heads = k.shape[1] if self.planes == "per-head" else 1
        planes = lsh_planes(
            q.shape[-1], number, heads=heads, rounds=self.rounds, seed=self.seed, device=q.device
        )
        q_bucket, k_bucket = (torch.stack([lsh_buckets(x, p) for p in planes]) for x in (q, k))
        return q_bucket, k_bucket

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Make a plan for each round."""
        ctx = ctx or {}
        Tq, Tk = q.shape[2], k.shape[2]
        require((Tq == Tk, lambda: f"{Tq} queries, {Tk} keys: Reformer is self-attention over one sequence"))
        given = [ctx.get("q_bucket"), ctx.get("k_bucket")]
        require(
            (
                (given[0] is None) == (given[1] is None),
                "ctx holds buckets of one side alone: q_bucket and k_bucket belong together",
            )
        )
        q_bucket, k_bucket = self.buckets(q, k) if given[0] is None else given
        for name, x in (("q_bucket", q_bucket), ("k_bucket", k_bucket)):
            require(
                (
                    isinstance(x, Tensor)
                    and x.dim() == 4
                    and x.shape[0] == self.rounds
                    and x.shape[-1] == Tq
                    and not x.is_floating_point(),
                    lambda: (
                        f"ctx[{name!r}]: expected integers [rounds={self.rounds}, B|1, H|1, T={Tq}], got "
                        + (f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__)
                    ),
                )
            )
        if given[0] is not None:  # renumber any ids to 0, 1, ...
            names = torch.unique(torch.cat([q_bucket.flatten(), k_bucket.flatten()]))
            q_bucket, k_bucket = (torch.searchsorted(names, x.contiguous()) for x in (q_bucket, k_bucket))
        return Selection(tuple(self._round(a, b) for a, b in zip(q_bucket, k_bucket, strict=True)))

    def _round(self, q_bucket: Tensor, k_bucket: Tensor) -> Plan:
        """Tile c of the sorted queries sees chunks c - 1 and c of the sorted keys: one span, or two."""
        T, size = q_bucket.shape[-1], self.bucket
        q_order = sorted_order(q_bucket)
        chunks = -(-T // size)
        own = torch.arange(chunks, device=q_bucket.device) * size
        spans = torch.stack([(own - size).clamp(min=0), (own + size).clamp(max=T)], -1)
        count = torch.ones(chunks, dtype=torch.int32, device=q_bucket.device)
        start = torch.arange(chunks, device=q_bucket.device)
        if chunks > 2:  # chunk 0 also sees the last chunk
            last = torch.tensor([[(chunks - 1) * size, T]], device=q_bucket.device)
            spans, start = torch.cat([spans[:1], last, spans[1:]]), start + (start > 0)
            count = pad(count[1:], (1, 0), value=2)
        elif chunks == 2:
            spans[0, 1] = T
        label = {} if self.attend_across_buckets else {"q_seg": q_bucket.int(), "k_seg": k_bucket.int()}
        return Plan(
            T,
            T,
            tile=size,
            causal=True,
            include_self=False,
            q_order=pad(q_order, (0, -T % size), value=-1),
            k_order=q_order if k_bucket is q_bucket else sorted_order(k_bucket),
            span_start=start.view(1, 1, -1),
            span_full=torch.zeros_like(count).view(1, 1, -1),
            span_count=count.view(1, 1, -1),
            spans=spans.int(),
            **label,
        )

    def finish(self, out: Tensor, lse: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return the value of the own token for queries that see nothing else."""
        if v.shape[1] != out.shape[1]:
            v = v.repeat_interleave(out.shape[1] // v.shape[1], 1)
        return torch.where((lse == float("-inf"))[..., None], v.to(out.dtype), out), lse
