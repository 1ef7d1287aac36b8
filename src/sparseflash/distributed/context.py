"""`context_parallel`: the ranks, layout and plan shared by calls of `sf.distributed.attention`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.numerics import Softmax
from ..common.errors import RankError, SparseFlashError, require
from ..methods import heads
from ..methods.base import Method
from ..ops._arguments import AnyPlan, as_plans, describe
from ..plan import Plan
from .layouts import Layout, balance
from .pairs import Memory, Pairs
from .peers import Peers
from .select import selected
from .transports import GroupCast, Ring

TRANSPORTS = ("auto", "ring", "groupcast", "ulysses")
_now: ContextVar[ContextParallel | None] = ContextVar("sparseflash_context_parallel", default=None)


def current() -> ContextParallel:
    """The innermost active `context_parallel`.

    Raises
    ------
    SparseFlashError
        If there is none.
    """
    cp = _now.get()
    if cp is None:
        raise SparseFlashError(
            "sf.distributed.attention outside of a context: call it in "
            "`with sf.distributed.context_parallel(group, plan) as cp:`"
        )
    return cp


def context_parallel(
    group: Any,
    plan: AnyPlan | Method | None = None,
    *,
    layout: str | Layout = "auto",
    transport: str = "auto",
    length: int | None = None,
    timeout: float = 300.0,
) -> ContextParallel:
    """Shard the tokens of a sequence over ranks, under one plan or method.

    Parameters
    ----------
    group : DeviceMesh, ProcessGroup, tuple of two of these, or None
        A mesh of one dimension (`mesh["cp"]`) or a process group; None is the default group, or a single
        process without torch.distributed. A pair (outer, inner), or a mesh of two dimensions: a ring inside
        each inner group, and a ring over the outer groups around it; rank = outer rank * inner world + inner
        rank.
    plan : Plan, tuple of Plan, or a method, optional
        Plan over all tokens. With a method, each call selects its plan from the queries and keys of all
        ranks.
    layout : str or Layout
        "contiguous", "zigzag", "striped", "chunks" (see `Layout.of`), or "auto": what `balance` chooses for
        the plan. For a method whose plan depends on token contents: the method's `layout` ("striped" for
        MTraining), or "zigzag".
    transport : str
        "ring": shards of keys rotate; memory grows by one shard. "groupcast": a rank receives only the keys
        that its plan reads (for a window, those of one neighbour). "ulysses": each rank gets all tokens of a
        share of the heads. "auto": group-cast if no rank receives more than a
        shard, or if it sends at most half as many keys as the ring.
    length : int, optional
        Number of tokens, if no plan tells.
    timeout : float
        Seconds after which a silent rank is an error on every other rank.

    Returns
    -------
    ContextParallel
        A context manager; reusable and reentrant.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> plan = sf.Plan.dense(1000, 1000, causal=True, window=(99, 0))
    >>> with sf.distributed.context_parallel(None, plan, layout="zigzag") as cp:
    ...     cp.positions.shape, cp.layout
    (torch.Size([1000]), Layout('zigzag', T=1000, world=1))
    """
    return ContextParallel(group, plan, layout, transport, length, timeout)


class ContextParallel:
    """The context manager that `context_parallel` returns.

    Attributes
    ----------
    rank, world : int
        This rank, and the number of ranks.
    layout, key_layout : Layout
        Placement of queries and of keys; the same layout if their numbers are equal.
    """

    def __init__(
        self,
        group: Any,
        plan: AnyPlan | Method | None,
        layout: str | Layout,
        transport: str,
        length: int | None,
        timeout: float,
    ) -> None:
        require(
            (transport in TRANSPORTS, f"transport={transport!r}: expected one of {', '.join(TRANSPORTS)}"),
            (
                isinstance(timeout, (int, float)) and timeout > 0,
                f"timeout={timeout!r}: expected seconds, a positive number",
            ),
        )
        self.peers, self.outer, self.inner = _peers(group, float(timeout))
        self.rank = 0 if self.peers is None else self.peers.rank
        self.world = 1 if self.peers is None else self.peers.world
        self.method = plan if isinstance(plan, Method) else None
        self.plan = None if plan is None or self.method is not None else as_plans(plan)
        self.transport, self.asked, self.length = transport, layout, length
        self.heads_move = transport == "ulysses"
        self.calls = 0
        self._layouts: tuple[Layout, Layout] | None = None
        self._pairs: Memory[Any] = Memory()
        self._codes: Memory[str] = Memory()
        self._tokens: list[Token[ContextParallel | None]] = []
        if self.plan is not None:
            self._lay_out(self.plan[0].Tq, self.plan[0].Tk)
        elif length is not None or isinstance(layout, Layout):
            T = layout.T if isinstance(layout, Layout) else length
            assert T is not None
            self._lay_out(T, T)

    def __enter__(self) -> ContextParallel:
        self._tokens.append(_now.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _now.reset(self._tokens.pop())

    # ---------------------------------------------------------------- tokens

    def _lay_out(self, Tq: int, Tk: int) -> None:
        asked = self.asked
        if isinstance(asked, Layout):
            require(
                (asked.world == self.world, f"{asked!r} for {self.world} ranks: expected as many"),
                (asked.T == Tq, f"{asked!r} for {Tq} tokens: expected as many"),
            )
            queries = asked
        elif asked == "auto":
            queries = self._balanced(Tq)
        else:
            queries = Layout.of(asked, Tq, self.world)
        other = (
            queries.name if queries.name in ("contiguous", "zigzag", "striped", "chunks") else "contiguous"
        )
        keys = queries if Tk == Tq else Layout.of(other, Tk, self.world)
        self._layouts = queries, keys
        self._layout_code = f"{queries.name} {_digest([x.place for x in self._layouts])}"

    def _balanced(self, T: int) -> Layout:
        if self.world == 1:
            return Layout.of("contiguous", T, 1)
        if self.plan is not None:
            return balance(tuple(plan.to("cpu") for plan in self.plan), self.world)
        method = self.method
        if method is not None and type(method).by_shape and heads.apart(method) is None:
            q = torch.empty(1).expand(1, 1, T, 1)
            return balance(method.select(q, q).plan, self.world)
        return Layout.of(getattr(method, "layout", "zigzag"), T, self.world)

    @property
    def layout(self) -> Layout:
        """Placement of the query tokens."""
        return self._laid_out()[0]

    @property
    def key_layout(self) -> Layout:
        """Placement of the keys."""
        return self._laid_out()[1]

    def _laid_out(self) -> tuple[Layout, Layout]:
        if self._layouts is None:
            raise SparseFlashError(
                "how many tokens there are is not known yet: give length= to context_parallel, or shard first"
            )
        return self._layouts

    @property
    def positions(self) -> Tensor:
        """Position in the whole sequence of each of this rank's tokens, int64 [n]: for RoPE and labels."""
        return self.layout.ranks[self.rank]

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Take this rank's part of a tensor with all tokens along `dim`: q, k, ids, labels, positions."""
        T = x.shape[dim]
        if self._layouts is None:
            self._lay_out(T, T)
        return x.index_select(dim, self._of(T).ranks[self.rank].to(x.device))

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """Gather all tokens of a tensor that is sharded along `dim`; the result is equal on every rank.

        Assumes that every rank computes the same from the result: the gradient of `x` is this rank's slice of
        the result's gradient, and nothing is summed over ranks.
        """
        if self.peers is None:
            return x
        sizes = (self.layout.sizes, self.key_layout.sizes)
        layout = self.layout if x.shape[dim] == sizes[0][self.rank] else self.key_layout
        require(
            (
                x.shape[dim] == layout.sizes[self.rank],
                f"{describe(x)} along dimension {dim}: expected the {layout.sizes[self.rank]} tokens of this "
                "rank",
            )
        )
        gathered: Tensor = _Unshard.apply(self, x, dim, layout)
        return gathered

    def _of(self, T: int) -> Layout:
        for layout in self._laid_out():
            if layout.T == T:
                return layout
        raise SparseFlashError(f"{T} tokens, but the layout is of {self.layout.T}: expected all tokens")

    # ---------------------------------------------------------------- calls

    def plans(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan | Method | None, ctx: Mapping[str, Any]
    ) -> tuple[Plan, ...]:
        """The plans of a call over all tokens, selected by a method if there is one."""
        method = plan if isinstance(plan, Method) else self.method if plan is None else None
        if method is not None:
            plans = as_plans(selected(self, method, q, k, v, ctx))
        elif plan is not None:
            plans = as_plans(plan)
        elif self.plan is not None:
            plans = self.plan
        else:
            raise SparseFlashError("no plan: give one to context_parallel, or to the call")
        if self._layouts is None:
            self._lay_out(plans[0].Tq, plans[0].Tk)
        for one in plans:
            require(
                (
                    (one.Tq, one.Tk) == (self.layout.T, self.key_layout.T),
                    f"a plan of {one.Tq} x {one.Tk} tokens under {self.layout!r}: expected one of all tokens",
                ),
                (
                    (q.shape[2], k.shape[2])
                    == (self.layout.sizes[self.rank], self.key_layout.sizes[self.rank]),
                    f"q and k hold {q.shape[2]} and {k.shape[2]} tokens: expected the "
                    f"{self.layout.sizes[self.rank]} and {self.key_layout.sizes[self.rank]} of rank "
                    f"{self.rank}; cp.shard(x, dim=2) gives them",
                ),
            )
        return plans

    def begin(
        self,
        plans: Sequence[Plan],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Softmax,
        seed: Tensor | None,
        *,
        key_bias: Tensor | None,
        sink_logits: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> int:
        """Check that all ranks make the same call, before any rank waits for another; gives the call number.

        Raises
        ------
        RankError
            If ranks differ, naming the first difference.
        """
        self.calls += 1
        if self.peers is None:
            return self.calls
        self.at(f"comparing plans of call {self.calls}")
        if q.device.type == "cpu":
            for peers in (self.peers, self.inner, self.outer):
                if peers is not None:
                    peers.meet()
        said = {
            "number of the call": self.calls,
            "plan": self._codes.of(plans, lambda: _code(plans)),
            "layout": self._layout_code,
            "shape of q, k, v (but for tokens)": [[*x.shape[:2], x.shape[3]] for x in (q, k, v)],
            "dtype": str(q.dtype),
            "key_bias": None if key_bias is None else [*key_bias.shape[:2], str(key_bias.dtype)],
            "sink_logits": sink_logits is not None,
            "options": options[:2],
            "alibi_slopes": None if alibi_slopes is None else _digest([alibi_slopes]),
            "dropout": (options.dropout, None if seed is None else int(seed)),
            "transport": self.transport,
            "gradients": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        }
        codes = [int.from_bytes(_hash(repr(x).encode())[:7], "little") for x in said.values()]
        everywhere = torch.stack(self.peers.gather(torch.tensor(codes, device=q.device))).cpu()
        differs = (everywhere != everywhere[0]).any(0)
        if bool(differs.any()):
            at = int(differs.nonzero()[0])
            name = list(said)[at]
            ranks = [self.peers.everywhere(r) for r in range(self.world)]
            others = [ranks[r] for r in range(self.world) if everywhere[r, at] != everywhere[0, at]]
            mine = f"rank {ranks[self.rank]} has {list(said.values())[at]!r}"
            raise RankError(
                f"ranks differ in the {name}: rank {', '.join(map(str, others))} is not as rank {ranks[0]} "
                f"({mine}): every rank gives the same plan, layout and options"
            )
        return self.calls

    def at(self, step: str) -> None:
        """Set the step that error messages name."""
        for peers in (self.peers, self.outer, self.inner):
            if peers is not None:
                peers.doing = step

    def transport_of(self, plans: Sequence[Plan]) -> Ring | GroupCast:
        """The transport of keys for calls over these plans, cached."""

        def make() -> Ring | GroupCast:
            pairs = Pairs(plans, self.rank, self.layout, self.key_layout)
            assert self.peers is not None and self.inner is not None
            sparse = self.transport == "groupcast" or (self.transport == "auto" and pairs.sparse())
            if sparse:
                return GroupCast(self.peers, self.key_layout, pairs)
            return Ring(self.inner, self.outer, self.key_layout, pairs)

        found: Ring | GroupCast = self._pairs.of(plans, make)
        return found


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cp: ContextParallel, x: Tensor, dim: int, layout: Layout) -> Tensor:
        ctx.given = layout.ranks[cp.rank], dim
        assert cp.peers is not None
        parts = cp.peers.gather(x.movedim(dim, 0).contiguous(), layout.sizes)
        return torch.cat(parts).index_select(0, layout.place.to(x.device)).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        tokens, dim = ctx.given
        return None, slope.index_select(dim, tokens.to(slope.device)), None, None


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _digest(tensors: Sequence[Tensor]) -> str:
    """Digest of integer tensors: shapes and values."""
    total = hashlib.blake2b(digest_size=16)
    for x in tensors:
        total.update(f"{list(x.shape)}".encode())
        total.update(bytes(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data))
    return total.hexdigest()


def _code(plans: Sequence[Plan]) -> str:
    """Digest of plans."""
    return " ".join(f"{plan._static()} {_digest(list(plan.tensors().values()))}" for plan in plans)


def _peers(group: Any, timeout: float) -> tuple[Peers | None, Peers | None, Peers | None]:
    """All ranks, and the outer and inner rings, of a group, a mesh, or a pair."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return None, None, None
    sides = _sides(group)
    if len(sides) == 1:
        peers = Peers(sides[0], timeout)
        return (None, None, None) if peers.world == 1 else (peers, None, peers)
    outer, inner = (Peers(side, timeout) for side in sides)
    every = _joint(outer, inner, timeout)
    return (None, None, None) if every.world == 1 else (every, outer, inner)


def _sides(group: Any) -> list[Any]:
    """The process groups of a mesh or pair, or the given group itself."""
    if isinstance(group, (tuple, list)):
        require((len(group) == 2, f"{len(group)} groups: expected one, or two (outer, inner)"))
        return [side for one in group for side in _sides(one)]
    if hasattr(group, "mesh_dim_names"):
        names = group.ndim
        require((names in (1, 2), f"a mesh of {names} dimensions: expected one, or two (outer, inner)"))
        return [group.get_group(n) for n in range(names)] if names > 1 else [group.get_group()]
    known = group is None or isinstance(group, dist.ProcessGroup)
    require(
        (known, f"group: {describe(group)}; expected a DeviceMesh, a ProcessGroup, two of these, or None")
    )
    return [group]


def _joint(outer: Peers, inner: Peers, timeout: float) -> Peers:
    """The ranks of all inner groups, in outer-major order."""
    every = Peers(None, timeout)
    ranks = inner.gather(torch.tensor([every.rank]))
    rows = outer.gather(torch.cat(ranks)[None])
    mine = torch.cat([row.flatten() for row in rows]).tolist()
    if mine == list(range(every.world)):
        return every
    require(
        (
            mine == sorted(mine),
            f"ranks {mine}, by outer and inner group: expected them to ascend, as a mesh has them",
        )
    )
    return Peers(dist.new_group(mine, use_local_synchronization=True), timeout)
