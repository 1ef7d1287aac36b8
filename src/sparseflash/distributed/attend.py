"""Attention over sharded tokens: each rank's queries attend to the keys of all ranks, one shard at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.dispatch import choose
from ..backends.numerics import (
    NEVER,
    Numbers,
    Softmax,
    absorb,
    bias_gradient,
    combined,
    of_sinks,
    state_dtype,
    unit_of,
)
from ..common.errors import SparseFlashError
from ..methods.base import Method
from ..ops._arguments import (
    AnyPlan,
    as_backend,
    as_dropout,
    as_dtype,
    as_scale,
    as_softcap,
    autocast,
    check_bias,
    check_inputs,
    check_pairs,
    check_sink,
    check_unknown,
)
from ..ops.attention import attention as whole
from ..ops.attention import sink_gradient, softmax
from ..plan import Plan
from .context import ContextParallel, current
from .options import Options
from .pairs import of_heads
from .transports import Keys, swapped


class Job(NamedTuple):
    """What all shards of one call share."""

    cp: ContextParallel
    transport: Any
    options: Softmax
    call: int
    seed: Tensor | None
    alibi_slopes: Tensor | None

    def over(
        self, phase: str, keys: Keys, compute: Callable[..., Keys | None], wide: Any = None, held: Any = None
    ) -> Any:
        """Call `compute(rows, k, v, plan, **how)` for each plan over the keys of each rank."""
        steps = itertools.count()
        self.cp.at(f"{phase} of call {self.call}, step 0")

        def of_rank(origin: int, keys: Keys) -> Keys | None:
            self.cp.at(f"{phase} of call {self.call}, step {next(steps)}")
            how: dict[str, Any] = {"key_bias": keys[2] if len(keys) > 2 else None}
            how |= {"seed": self.seed, "alibi_slopes": self.alibi_slopes}
            rows = self.transport.rows(origin)
            if self.seed is not None:
                how["numbers"] = Numbers(self.cp.positions[rows], self.transport.tokens(origin))
            total: Keys | None = None
            for plan in self.transport.plans(origin):
                given = compute(rows, *keys[:2], plan, **how)
                total = given if total is None or given is None else tuple(map(torch.add, total, given))
            return total

        return self.transport.run(keys, of_rank, wide, held)


class _Attend(torch.autograd.Function):
    """One softmax over the keys of all ranks; backward moves the keys through the transport again."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        sink_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        options, state = job.options, state_dtype(q)
        unit = unit_of(options.scale, options.softcap, key_bias, job.alibi_slopes)
        run = choose("forward", options.backend, q, k, v).forward
        out = norm = None  # so far: in full precision, and fp64

        def attend(rows: slice, k: Tensor, v: Tensor, plan: Plan, **how: Any) -> None:
            nonlocal out, norm
            given = q[:, :, rows]
            part, _, its = run(given, k, v, plan, options, out_dtype=state, normed=True, **how)
            if out is None and given.shape == q.shape:
                out, norm = part, its.double()
                return
            if out is None:
                out, norm = _unseen(q, v.shape[-1], state)
            absorb(out[:, :, rows], norm[..., rows], part, its, unit)

        held = job.over("forward", _keys(k, v, key_bias), attend)[1]
        if out is None:  # no key is visible
            out, norm = _unseen(q, v.shape[-1], state)
        if sink_logits is not None:
            sinks = of_sinks(sink_logits, q.shape[:3], unit, state)
            out, norm = combined([out], [norm, sinks], unit, state)
        out, norm = out.to(options.dtype or q.dtype), norm.to(state)
        top, rest = norm.double()
        lse = (top * unit + rest).to(state)
        ctx.job, ctx.unit = job, unit
        ctx.held = None if held is None else {origin: len(found) for origin, found in held.items()}
        received = [x for found in (held or {}).values() for x in found]
        ctx.save_for_backward(q, k, v, key_bias, sink_logits, out, norm, *received)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        job, (q, k, v, key_bias, sink_logits, out, norm, *received) = ctx.job, ctx.saved_tensors
        left = iter(received)
        held = ctx.held and {origin: tuple(itertools.islice(left, n)) for origin, n in ctx.held.items()}
        options, state = job.options._replace(dtype=None), state_dtype(q)
        dout = torch.zeros_like(out) if dout is None else dout
        delta = (dout.to(state) * out.to(state)).sum(-1)
        slope = dout.to(q.dtype)
        run = choose("backward", options.backend, q, k, v).backward
        dq = _Rows(q.shape[2])

        def pull(rows: slice, k: Tensor, v: Tensor, plan: Plan, **how: Any) -> Keys:
            own = (None if x is None else x[..., rows].contiguous() for x in (norm, dlse))
            given = slope[:, :, rows], q[:, :, rows], k, v, None, *own, plan, options
            part = delta[..., rows].contiguous()
            mine, dk, dv, dbias = run(*given, delta=part, grad_dtype=state, **how)
            dq.add(rows, mine)
            return (dk, dv) if dbias is None else (dk, dv, bias_gradient(dbias, how["key_bias"]))

        total = job.over("backward", _keys(k, v, key_bias), pull, state, held)[0]
        dsink = None
        if sink_logits is not None:
            dsink = sink_gradient(dout, dlse, out, norm, sink_logits, ctx.unit).to(sink_logits.dtype)
        dbias = total[2].to(key_bias.dtype) if key_bias is not None else None
        return None, dq.whole(q).to(q.dtype), total[0].to(k.dtype), total[1].to(v.dtype), dbias, dsink


class _Rows:
    """Sum of tensors [B,H,n,D], each of a range of rows: no copy where the first or second has all n."""

    def __init__(self, n: int) -> None:
        self.n, self.at = n, slice(0)
        self.total: Tensor | None = None

    def add(self, rows: slice, part: Tensor) -> None:
        """Add a part in place, either to the sum or the sum to it."""
        total = self.total
        if total is None:
            self.at, self.total = rows, part
        elif part.shape[2] == self.n:
            part[:, :, self.at].add_(total)
            self.at, self.total = rows, part
        else:
            self.whole(part)[:, :, rows].add_(part)

    def whole(self, like: Tensor) -> Tensor:
        """The sum, of all rows; zero where nothing was added."""
        if self.total is None:
            self.total = like.new_zeros(*like.shape[:2], self.n, like.shape[3])
        elif self.total.shape[2] != self.n:
            part, self.total = self.total, None
            self.whole(part)[:, :, self.at].copy_(part)
        return self.total


def _unseen(q: Tensor, Dv: int, state: torch.dtype) -> tuple[Tensor, Tensor]:
    """Out and norm of queries that have seen nothing yet."""
    norm = q.new_zeros(2, *q.shape[:3], dtype=torch.float64)
    norm[0] = NEVER
    return q.new_zeros(*q.shape[:3], Dv, dtype=state), norm


def _keys(k: Tensor, v: Tensor, key_bias: Tensor | None) -> Keys:
    return (k, v) if key_bias is None else (k, v, key_bias)


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan | Method | None = None, **options: Unpack[Options]
) -> Any:
    """Exact attention of this rank's queries to the keys of all ranks, with gradients.

    Call it on every rank of a `context_parallel`, with the shards of `cp.shard`. The result equals that of
    `sparseflash.attention` over all tokens, for this rank's queries. The gradient of a parameter that is
    replicated on every rank (`sink_logits`, and weights of other layers) is this rank's share: sum it over
    ranks.

    Parameters
    ----------
    q, k, v : Tensor
        This rank's tokens, `[B,Hq,n,D]`, `[B,Hkv,n,D]`, `[B,Hkv,n,Dv]`; or DTensors of all tokens with
        `Shard(2)`, under layout "chunks".
    plan : Plan, tuple of Plan, or a method, optional
        Plan over all tokens, equal on every rank; by default that of the context, or its method's selection.
    scale, softcap, sink_logits, alibi_slopes, out_dtype, backend
        As in `sparseflash.attention`. ALiBi's distances are those of the plan's positions, over all tokens.
    dropout_p, dropout_seed
        As there: a seed drops the weights that it drops in one process, whatever the layout. If there is
        none, rank 0 draws one.
    key_bias : Tensor, optional
        `[B|1, H, n]` of this rank's keys, differentiable.
    ctx : mapping, optional
        Values that the method can read besides q and k.
    return_lse : bool
        Also return the log-sum-exp `[B,Hq,n]`, differentiable.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        out `[B,Hq,n,Dv]`, and lse.

    Raises
    ------
    RankError
        If another rank has another plan, other shapes or options, or died, or is silent for longer than the
        timeout; the message names the rank and the step.

    Examples
    --------
    On one rank it equals `sparseflash.attention`; `docs/distributed.md` has an example on two.

    >>> import torch, sparseflash as sf
    >>> q, k, v = torch.randn(3, 1, 2, 300, 32)
    >>> plan = sf.Plan.dense(300, 300, causal=True)
    >>> with sf.distributed.context_parallel(None, plan) as cp:
    ...     out = sf.distributed.attention(*(cp.shard(x, 2) for x in (q, k, v)))
    >>> torch.allclose(cp.unshard(out, 2), sf.attention(q, k, v, plan), atol=1e-5)
    True
    """
    cp = current()
    if not isinstance(q, Tensor) or hasattr(q, "to_local"):
        return _of_dtensors(cp, q, k, v, plan, options)
    return _local(cp, q, k, v, plan, **options)


def _local(
    cp: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan | Method | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    ctx: Mapping[str, Any] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **unsupported: Any,
) -> Any:
    if unsupported:
        check_unknown("distributed.attention", unsupported, _ELSEWHERE, Options.__annotations__)
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    if key_bias is not None:
        check_bias(key_bias, q, k)
    if sink_logits is not None:
        check_sink(sink_logits, q)
    check_pairs(alibi_slopes, None, q, k)
    share, seed = as_dropout(dropout_p, dropout_seed, q)
    plans = cp.plans(q, k, v, plan, ctx={"scale": scale, "softcap": softcap, **(ctx or {})})
    for one in plans:
        if q.shape[1] % one.extent()[1] or one.extent()[0] not in (1, q.shape[0]):
            raise SparseFlashError(f"a plan of {one.extent()} (batch, heads) is not for q {list(q.shape)}")
    options = Softmax(
        as_scale(scale, q.shape[-1]),
        as_softcap(softcap),
        as_backend(backend),
        as_dtype("out_dtype", out_dtype, q),
        share,
    )
    given = {"key_bias": key_bias, "sink_logits": sink_logits, "alibi_slopes": alibi_slopes}
    call = cp.begin(plans, q, k, v, options, seed if dropout_seed is not None else None, **given)
    if cp.peers is None:
        extra = {"scale": scale, "softcap": softcap, "out_dtype": out_dtype, "backend": backend, **given}
        drawn = {"dropout_p": share, "dropout_seed": seed}
        return whole(q, k, v, plans, return_lse=return_lse, **drawn, **extra)
    if seed is not None and dropout_seed is None:
        seed = cp.peers.gather(seed[None])[0][0]
    if cp.heads_move:
        out, lse = _over_heads(cp, q, k, v, plans, options, seed, **given)
    else:
        job = Job(cp, cp.transport_of(plans), options, call, seed, alibi_slopes)
        out, lse = _Attend.apply(job, q, k, v, key_bias, sink_logits)
    return (out, lse) if return_lse else out


_ELSEWHERE = {
    "causal": "causality belongs to the plan: Plan.dense(T, T, causal=True)",
    "q_offset": "positions belong to the plan: Plan.dense(..., q_offset=...)",
    "pair_bias": "a number for each pair of all tokens is on no rank; key_bias is one for each key",
    "skip_below": "what a rank may skip is not known before all ranks' keys are seen: leave it out",
    "return_block_max": "weights of a block are known after all ranks' keys are seen: leave it out",
    "return_skipped": "nothing is skipped over ranks: leave it out",
    "deterministic": "results over ranks are the same every time",
}


class _Swap(torch.autograd.Function):
    """Differentiable `swapped`; its gradient is the inverse exchange."""

    @staticmethod
    def forward(ctx: Any, cp: ContextParallel, x: Tensor, keys: bool, to_heads: bool) -> Tensor:
        ctx.given = cp, keys, to_heads
        return swapped(cp.peers, cp.key_layout if keys else cp.layout, x, to_heads=to_heads)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        cp, keys, to_heads = ctx.given
        return None, _Swap.apply(cp, slope, keys, not to_heads), None, None


def _over_heads(
    cp: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Any],
    options: Softmax,
    seed: Tensor | None,
    *,
    key_bias: Tensor | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Ulysses (arXiv 2309.14509): exchange tokens for heads over ranks, attend, and exchange back."""
    heads, world = q.shape[1], cp.world
    if heads % world or k.shape[1] % world:
        raise SparseFlashError(
            f"transport='ulysses' needs heads that {world} ranks can share; q has {heads}, k {k.shape[1]}: "
            "use 'ring' or 'groupcast'"
        )
    cp.at("moving heads")
    first, last = heads // world * cp.rank, heads // world * (cp.rank + 1)
    if key_bias is not None:
        wide = key_bias.repeat_interleave(heads // key_bias.shape[1], 1).expand(q.shape[0], -1, -1)
        key_bias = _Swap.apply(cp, wide[..., None], True, True)[..., 0]
    own = [None if x is None else x[..., first:last] for x in (sink_logits, alibi_slopes)]
    out, lse, _ = softmax(
        _Swap.apply(cp, q, False, True),
        _Swap.apply(cp, k, True, True),
        _Swap.apply(cp, v, True, True),
        key_bias,
        own[0],
        seed,
        own[1],
        None,
        tuple(of_heads(plan, first, last, heads) for plan in plans),
        options._replace(head=first),
    )
    return _Swap.apply(cp, out, False, False), _Swap.apply(cp, lse[..., None], False, False)[..., 0]


def _of_dtensors(
    cp: ContextParallel, q: Any, k: Any, v: Any, plan: AnyPlan | Method | None, options: Any
) -> Any:
    """Attend for DTensors: on their local shards, wrapped again as DTensors."""
    from torch.distributed.tensor import DTensor, Shard

    for x in (q, k, v):
        if not isinstance(x, DTensor) or tuple(x.placements) != (Shard(2),) or cp.layout.name != "chunks":
            given = f"{type(x).__name__} {getattr(x, 'placements', '')}"
            raise SparseFlashError(
                f"q, k, v: {given} under layout {cp.layout.name!r}: expected three tensors of this rank's "
                "tokens, or three DTensors with placements [Shard(2)] and layout='chunks'"
            )
    found = _local(cp, *(x.to_local() for x in (q, k, v)), plan, **options)
    several = found if isinstance(found, tuple) else (found,)
    shapes = [(*q.shape[:3], v.shape[-1]), q.shape[:3]]
    made = []
    for x, shape in zip(several, shapes):
        stride = torch.empty(shape, device="meta").stride()
        placed = DTensor.from_local(
            x, q.device_mesh, [Shard(2)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        made.append(placed)
    return tuple(made) if isinstance(found, tuple) else made[0]
