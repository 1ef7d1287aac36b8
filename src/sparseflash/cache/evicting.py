"""`Evicting`: a cache of the keys that a policy keeps, at their original positions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops.attention import attention
from ..ops.decode import decode
from ..ops.merge import merge
from ..ops.rotary import turned
from ..ops.rows import take_rows
from ..ops.stats import attention_stats
from ..plan import Plan
from ..plan.options import is_count, shape_of
from ..plan.ragged import begins
from .base import Attended, Call, check_new
from .policies.base import Held, Policy


class Evicting(Attended):
    """The keys and values of a layer that a policy keeps: memory for a budget, whatever the length.

    Each KV head of each sequence owns a slice of one pool, with capacity for its keys and `slack` more
    tokens. When a slice is full, the policy chooses what to keep. Kept keys keep the rotation of their
    positions, and positions go on counting: the model notices nothing except for the missing keys. Attention
    over the held keys is exact. Inference only.

    Parameters
    ----------
    policy : Policy
        `cache.SnapKV(budget=1024)`, `cache.StreamingLLM(...)`, ...
    layer, layers : int
        Index of this layer, and number of layers: some policies give layers different budgets.
    slack : int
        Tokens appended between two calls of the policy.
    rope : Tensor, optional
        Inverse frequencies `[D / 2]` of the model's rotary embedding, for a policy that renumbers.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> cache = sf.cache.Evicting(sf.cache.SnapKV(budget=64, recent=16))
    >>> for n in (500, 1, 1):
    ...     q, k, v = torch.randn(1, 8, n, 32), *torch.randn(2, 1, 2, n, 32)
    ...     out = cache.attend(q, k, v)
    >>> out.shape, cache.tokens, cache.held.tolist()
    (torch.Size([1, 8, 1, 32]), 502, [[66, 66]])
    """

    asking: bool = False
    """While True, attended tokens are a question: the policy sees the queries; nothing is appended."""

    def __init__(
        self, policy: Policy, *, layer: int = 0, layers: int = 1, slack: int = 64, rope: Tensor | None = None
    ) -> None:
        require(
            (
                isinstance(policy, Policy),
                f"policy={policy!r}: expected one, such as cache.SnapKV(budget=1024)",
            ),
            (is_count(slack, 1), f"slack={slack!r}: expected an int >= 1, tokens"),
        )
        if policy.renumber is (rope is None):
            raise SparseFlashError(
                f"renumber={policy.renumber}, rope={shape_of(rope)}: a policy that renumbers rotates keys by "
                "rope=, the model's inverse frequencies [D / 2], and no other does"
            )
        self.policy, self.slack, self._rope = policy.of_layer(layer, layers), slack, rope
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._tokens = self._floor = 0
        self._own: Tensor | None = None  # [B], real (non-padding) tokens of each sequence
        self._prompt: Tensor | None = None  # _own at the first eviction
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._position: Tensor | None = None
        self._mass: Tensor | None = None
        self._queries: Tensor | None = None
        self._start: Tensor | None = None
        self._used: Tensor | None = None
        self._spare = 0
        self._end = 0  # if keys are renumbered: position of the next token
        self._asked = False  # whether a question was attended since the last eviction
        self.taken()

    # ------------------------------------------------------------ the four verbs

    @property
    def tokens(self) -> int:
        """Tokens that were appended, held or evicted."""
        return self._tokens

    @property
    def held(self) -> Tensor:
        """Number of keys that each KV head holds, `[B,Hkv]`."""
        return torch.zeros(0, 0, dtype=torch.int64) if self._used is None else self._used

    @property
    def real(self) -> Tensor:
        """Number of tokens of each sequence, held or evicted, without padding: `[B]`."""
        return torch.zeros(0, dtype=torch.int64) if self._own is None else self._own

    @property
    def keys(self) -> Tensor | None:
        """The key pool of all heads, `[1,1,slots,D]`; `plan` gives each head's slots."""
        return self._keys

    @property
    def values(self) -> Tensor | None:
        """The value pool, `[1,1,slots,Dv]`."""
        return self._values

    @property
    def positions(self) -> Tensor | None:
        """Position of the token in each slot, int32 `[slots]`; -1 if empty."""
        return self._position

    def kept(self) -> Tensor:
        """Which tokens each KV head still holds, bool `[B,Hkv,tokens]`."""
        held = self.held
        found = torch.zeros(*held.shape, self.tokens, dtype=torch.bool, device=held.device)
        if self._position is None or self._start is None:
            return found
        for b, h in itertools.product(*map(range, held.shape)):
            first = int(self._start[b, h])
            at = self._position[first : first + int(held[b, h])].long()
            found[b, h, at[at >= 0]] = True
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The pools, positions and slices of the heads, and the statistics of the policy."""
        names = ("keys", "values", "position", "mass", "queries", "start", "used")
        own = {name: getattr(self, f"_{name}") for name in names}
        return {name: x for name, x in own.items() if x is not None}

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]` of n new tokens, without evicting any.

        `attend` and `evict` drop what is over the budget.
        """
        self._check(k, v)
        self._put(k, v)

    def plan(self, Tq: int = 1) -> Plan:
        """Plan of the last Tq queries over the pool: each head's keys up to the query's own."""
        assert self._start is not None and self._used is not None and self._keys is not None
        row = torch.arange(1 - Tq, 1, device=self._used.device)
        spans = self._seen((self._used[..., None] + row).clamp(min=0))
        spans = torch.maximum(spans, torch.zeros_like(spans)) + self._start[..., None, None, None]
        spans[..., 1] = torch.maximum(spans[..., 0], spans[..., 1])
        return Plan.from_spans(spans, Tq=Tq, Tk=self._keys.shape[2], tile=1)

    # ------------------------------------------------------------ attending

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Implement `attend`; then the policy evicts."""
        self._check(k, v)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise SparseFlashError("a cache that evicts has no gradients: call it under torch.no_grad()")
        n, real = q.shape[2], call.real
        own, softcap, sink_logits = (call.options[name] for name in ("scale", "softcap", "sink_logits"))
        own = q.shape[-1] ** -0.5 if own is None else own
        options: dict[str, Any] = {"scale": own, "softcap": softcap}
        many = self._used is None or n > self.slack
        if not many and not self.asking and self._spare < n:  # late, as a crop may free slots
            self.evict(own, softcap)
        q, k = self._placed(q, real), self._placed(k, real)
        massed = self._massed(many)
        if n == 1 and self._used is not None and real is None and not self.asking:
            self._put(k, v)
            out, _ = self._over(q, self.plan(), options, sink_logits, massed)
        else:
            out, mass = self._beside(q, k, v, call.among_new(q), options, sink_logits, call.new, massed)
            if not self.asking:
                self._put(k, v, real, mass)
        if self.asking or not self._asked:
            self._see(q)
        if self.asking:
            self._asked = self._used is not None
        elif many:
            self.evict(own, softcap)
        return out

    def _massed(self, many: bool) -> bool:
        """Whether the policy needs this call's attention mass; under "last", clears older mass first."""
        if self.policy.massed != "last":
            return self.policy.massed == "all" and not self.asking
        wanted = self.asking or (many and not self._asked)
        if wanted and self._mass is not None:
            self._mass.zero_()
        return wanted

    def _placed(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Rotate new queries or keys to their positions among the held keys, if the policy renumbers."""
        if self._rope is None:
            return x
        if real is not None and (self._used is not None or bool((real[:, :-1] > real[:, 1:]).any())):
            raise SparseFlashError(
                "a cache that renumbers takes padding on the left, in the first call alone: "
                "tokenizer.padding_side = 'left'"
            )
        gone = self._tokens - self._end
        return turned(x, torch.full((1, x.shape[2]), gone, device=x.device), [self._rope]) if gone else x

    def _over(
        self,
        q: Tensor,
        plan: Plan,
        options: dict[str, Any],
        sink_logits: Tensor | None = None,
        massed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attend over the pool; add each key's attention mass to `_mass` if `massed`."""
        assert self._keys is not None and self._values is not None
        out, lse = decode(
            q, self._keys, self._values, plan, return_lse=True, sink_logits=sink_logits, **options
        )
        if massed and self._mass is not None:
            self._mass += attention_stats(q, self._keys, lse, plan, **options).sum((0, 1))
        return out, lse

    def _beside(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        among: Plan,
        options: dict[str, Any],
        sink_logits: Tensor | None,
        new: Callable[..., Any] | None,
        massed: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the held keys and among the new tokens; also return the mass of the new keys."""
        first = self._used is None
        if first and new is not None and not massed:
            return new(q, k, v, among, sink_logits=sink_logits, **options), None
        out, lse = attention(q, k, v, among, return_lse=True, sink_logits=sink_logits, **options)
        before = None if first else self._before(q.shape[2])
        if before is not None:
            out, lse = merge([self._over(q, before, options), (out, lse)])
        if first and new is not None:
            out = new(q, k, v, among, sink_logits=sink_logits, **options)
        if not massed:
            return out, None
        if before is not None:
            assert self._mass is not None and self._keys is not None
            self._mass += attention_stats(q, self._keys, lse, before, **options).sum((0, 1))
        mass = attention_stats(q, k, lse, among, **options)
        return out, mass.view(k.shape[0], k.shape[1], -1, k.shape[2]).sum(2)

    def _before(self, n: int) -> Plan:
        """Plan of n queries that each attend to all held keys."""
        assert self._start is not None and self._used is not None and self._keys is not None
        spans = self._seen(self._used[..., None])
        spans = torch.maximum(spans, spans[..., :1]) + self._start[..., None, None, None]
        tile = max(1, min(n, 128))
        return Plan.from_spans(
            spans.expand(-1, -1, -(-n // tile), -1, -1), Tq=n, Tk=self._keys.shape[2], tile=tile
        )

    def evict(self, scale: float | None = None, softcap: float | None = None) -> None:
        """Drop what the policy does not keep, judged by the last attended queries."""
        if self._used is None or self._keys is None:
            return
        if self._prompt is None:
            self._prompt = self._own
        held = self._held(self._keys.shape[-1] ** -0.5 if scale is None else scale, softcap)
        keep = self.policy.keep(held)
        mass = None if held.mass is None else take_rows(held.mass[..., None], keep)[..., 0]
        there = keep >= 0
        position = held.position.gather(2, keep.clamp(min=0).long())
        k = take_rows(held.k, keep)
        if self._rope is not None:
            k = self._renumbered(k, keep, there)
        self._fill(k, take_rows(held.v, keep), position, mass, there)
        self._asked = False
        if int(there.sum()) < int((held.position >= 0).sum()):
            self._floor = self._tokens

    def _renumbered(self, k: Tensor, keep: Tensor, there: Tensor) -> Tensor:
        """Rotate the kept keys to consecutive positions that end at the fullest head's count, `end`.

        So in every head the last key is right before the next token, however many keys the head holds.
        """
        assert self._used is not None and self._rope is not None
        used = there.sum(-1)
        end = int(used.max())
        rank = there.cumsum(-1) - 1
        back = (self._end - self._used)[..., None] + keep - ((end - used)[..., None] + rank)
        turns = turned(k.flatten(0, 1)[:, None], (back * there).flatten(0, 1), [self._rope])
        if self._queries is not None:
            back = torch.full((1, self._queries.shape[2]), self._end - end, device=k.device)
            self._queries = turned(self._queries, back, [self._rope])
        self._end = end
        return turns.view(k.shape)

    # ------------------------------------------------------------ the pool

    def _check(self, k: Tensor, v: Tensor) -> None:
        shape = None if self._used is None else self._used.shape
        old = [
            None if x is None or shape is None else x.expand(*shape, -1, -1)
            for x in (self._keys, self._values)
        ]
        check_new(k, v, *old)

    def _seen(self, used: Tensor) -> Tensor:
        """Spans of its slice that each head attends to with `used [B,Hkv,n]` keys held: `[B,Hkv,n,S,2]`."""
        assert self._own is not None
        prompt = self._own if self._prompt is None else self._prompt
        most = self.policy.most(self._own, prompt, used.shape[1])
        if isinstance(most, Tensor):
            most = most[..., None]
        return torch.stack([torch.stack(x, -1) for x in self.policy.seen(used, most)], -2)

    def _see(self, q: Tensor) -> None:
        """Remember the last queries, as many as the policy wants."""
        want = self.policy.queries
        if want:
            q = q[:, :, -want:]
            old = self._queries
            self._queries = q.clone() if old is None else torch.cat([old, q], 2)[:, :, -want:]

    def _held(self, scale: float, softcap: float | None) -> Held:
        """Gather the held keys, padded per head; position -1 marks padding."""
        assert self._used is not None and self._start is not None and self._position is not None
        assert self._keys is not None and self._values is not None and self._own is not None
        place = torch.arange(int(self._used.max()), device=self._used.device)
        there = place < self._used[..., None]
        at = torch.where(there, self._start[..., None] + place, 0)
        k, v = (torch.where(there[..., None], x[0, 0][at], 0) for x in (self._keys, self._values))
        position = torch.where(there, self._position[at], -1)
        q = self._queries
        if q is None:
            q = k.new_zeros(k.shape[0], k.shape[1], 0, k.shape[3])
        mass = None if self._mass is None else torch.where(there, self._mass[at], 0)
        prompt = self._own if self._prompt is None else self._prompt
        return Held(k, v, position, q, mass, self._tokens, self._own, prompt, scale, softcap)

    def _put(self, k: Tensor, v: Tensor, real: Tensor | None = None, mass: Tensor | None = None) -> None:
        """Write new tokens behind those of each head; padding is not written."""
        B, H, n, _ = k.shape
        position = torch.arange(self._tokens, self._tokens + n, device=k.device).expand(B, H, n)
        there = torch.ones_like(position, dtype=torch.bool) if real is None else real[:, None].expand(B, H, n)
        if self._used is None:
            self._fill(k, v, position, mass, there)
        else:
            if self._spare < n:
                old = self._held(1.0, None)
                self._fill(old.k, old.v, old.position, old.mass, old.position >= 0, n)
            assert self._start is not None and self._keys is not None and self._values is not None
            assert self._position is not None
            slot = ((self._start + self._used)[..., None] + there.cumsum(-1) - 1)[there]
            self._keys[0, 0, slot], self._values[0, 0, slot] = k[there], v[there]
            self._position[slot] = position[there].int()
            if self._mass is not None:
                self._mass[slot] = 0.0 if mass is None else mass[there]
            self._used = self._used + there.sum(-1)
            self._spare -= n
        self._tokens += n
        self._end += n
        own = there[:, 0].sum(-1)
        self._own = own if self._own is None else self._own + own

    def _fill(
        self, k: Tensor, v: Tensor, position: Tensor, mass: Tensor | None, there: Tensor, more: int = 0
    ) -> None:
        """Build a new pool of these keys; each head's slice has capacity for `slack + more` tokens beyond."""
        used, self._spare = there.sum(-1), self.slack + more
        room = used + self._spare
        start, places = begins(room), int(room.sum())
        slot = (start[..., None] + there.cumsum(-1) - 1)[there]
        pools = []
        for x in (k, v):
            pools.append(x.new_empty(1, 1, places, x.shape[3]))
            pools[-1][0, 0, slot] = x[there]
        self._keys, self._values = pools
        self._position = torch.full((places,), -1, dtype=torch.int32, device=k.device)
        self._position[slot] = position[there].int()
        if mass is not None:
            self._mass = torch.zeros(places, device=k.device)
            self._mass[slot] = mass[there].float()
        self._start, self._used = start, used

    # ------------------------------------------------------------ other sequences, fewer tokens

    def select_rows(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        if self._used is None:
            return
        held = self._held(1.0, None)
        at = rows.to(self._used.device)
        k, v, position = (x[at] for x in (held.k, held.v, held.position))
        for name in ("_queries", "_own", "_prompt"):
            x = getattr(self, name)
            setattr(self, name, None if x is None else x[at])
        self._fill(k, v, position, None if held.mass is None else held.mass[at], position >= 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Call `select_rows` to draw several samples from one prompt."""
        if self._used is not None:
            self.select_rows(torch.arange(len(self._used)).repeat_interleave(repeats))

    def crop(self, n: int) -> None:
        """Drop tokens at the end: keep the first n, or, if n < 0, drop the last -n.

        Raises
        ------
        SparseFlashError
            If the policy has evicted keys since token n: evicted keys cannot come back.
        """
        left = self._left(n)
        if left < self._floor:
            raise SparseFlashError(
                f"crop to {left} tokens: the policy has let go of keys at {self._floor} tokens, and what it "
                "would have kept at fewer is gone. Copy the cache before (copy.deepcopy), or give it slack"
            )
        if self._used is not None and self._position is not None and self._start is not None:
            held = self._held(1.0, None)
            used = ((held.position >= 0) & (held.position < left)).sum(-1)
            if self._own is not None:  # no eviction since: every head still holds all cropped tokens
                self._own = self._own - (self._used - used)[:, 0]
            self._used = used
        if self._queries is not None and left < self._tokens:
            self._queries = self._queries[:, :, : max(self._queries.shape[2] - (self._tokens - left), 0)]
        self._spare += self._tokens - left
        self._end -= self._tokens - left
        self._tokens = left

    # ------------------------------------------------------------ as Transformers calls it

    @property
    def is_initialized(self) -> bool:
        """Whether anything was appended."""
        return self._used is not None
