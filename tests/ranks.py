"""Processes that are the ranks of a group: started once, they run many cases. Functions below run in all.

with Ranks(4) as ranks:
    results = ranks(attend, world=3, seed=1, ...)      # one a rank
"""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before any group is made: its functions keep the one that they meet
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import plans
import sparseflash as sf
from sparseflash.distributed import peers, segments

STARTS = 120.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _work(rank: int, world: int, port: int, jobs: Any, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    groups = {n: dist.new_group(range(n)) for n in range(1, world + 1)}
    results.put((rank, None, None))
    while (job := jobs.get()) is not None:
        run, size, options = job
        try:
            found = run(groups[size], **options) if rank < size else None
            results.put((rank, found, None))
        except BaseException as error:
            results.put(
                (rank, error if isinstance(error, sf.SparseFlashError) else None, traceback.format_exc())
            )
    results.put((rank, None, None))  # all have done all before anybody leaves
    jobs.get()
    dist.destroy_process_group()


class Ranks:
    """So many processes; a call runs a function of this module in the first `world` of them."""

    def __init__(self, world: int) -> None:
        context = mp.get_context("forkserver")  # which imports torch once, not in each
        context.set_forkserver_preload(["torch", "torch.distributed.nn", "torch.testing", "numpy"])
        self.world, port = world, free_port()
        self.jobs = [context.Queue() for _ in range(world)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_work, args=(r, world, port, self.jobs[r], self.results), daemon=True)
            for r in range(world)
        ]
        for process in self.processes:
            process.start()
        self._collect(STARTS)

    def _collect(self, seconds: float, missing: tuple[int, ...] = ()) -> list[tuple[Any, str | None]]:
        found: dict[int, tuple[Any, str | None]] = {}
        for _ in range(self.world - len(missing)):
            rank, result, error = self.results.get(timeout=seconds)
            found[rank] = result, error
        return [found.get(rank, (None, "no answer")) for rank in range(self.world)]

    def start(self, run: Callable[..., Any], *, world: int, **options: Any) -> None:
        """Begin a function in all."""
        for jobs in self.jobs:
            jobs.put((run, world, options))

    def __call__(
        self, run: Callable[..., Any], *, world: int, seconds: float = 90.0, **options: Any
    ) -> list[Any]:
        """What a function gives on each rank."""
        self.start(run, world=world, **options)
        found = self._collect(seconds)
        for rank, (_, error) in enumerate(found):
            assert error is None, f"rank {rank}:\n{error}"
        return [result for result, _ in found[:world]]

    def close(self) -> None:
        """End the processes."""
        for jobs in self.jobs:
            jobs.put(None)
        try:
            self._collect(10)
        except queue.Empty:
            pass
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


# ---------------------------------------------------------------- inputs


def inputs(
    seed: int, plan: Any, dtype: torch.dtype, *, heads: int, kv_heads: int, D: int, extras: bool
) -> dict:
    """Seeded q, k, v, slopes and, with `extras`, a bias of keys and sinks."""
    one = plan[0] if isinstance(plan, tuple) else plan
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    made = {
        "q": draw(2, heads, one.Tq, D).to(dtype),
        "k": draw(2, kv_heads, one.Tk, D).to(dtype),
        "v": draw(2, kv_heads, one.Tk, D).to(dtype),
        "dout": draw(2, heads, one.Tq, D).to(dtype),
        "dlse": draw(2, heads, one.Tq),
    }
    if extras:
        made |= {"key_bias": draw(1, kv_heads, one.Tk), "sink_logits": draw(heads)}
    return made


SLOPES = torch.tensor([0.5, 0.25, 0.05, 0.0])


def plan_of(seed: int, kind: str, *, Tq: int | None = None, Tk: int | None = None) -> tuple[Any, Tensor, str]:
    """A plan of a kind of the generator, or several in one softmax; its mask, and its line."""
    if kind == "several":
        g = torch.Generator().manual_seed(seed)
        T = Tq or 200
        near = sf.Plan.dense(T, T, causal=True, window=(15, 0), tile=32)
        bucket = torch.randint(4, (1, 2, T), generator=g)
        both = sf.Plan.from_buckets(bucket, bucket, tile=32) | near
        return both, both.to_dense(), f"several of {T}"
    if kind == "free":
        all_ = sf.Plan.dense(150, 150)
        return all_, all_.to_dense(), "no rules"
    found = plans.example(seed, kind, batch=2, heads=4, Tq=Tq, Tk=Tk)
    return found.plan, found.mask, found.line


def attend(
    group: Any,
    *,
    seed: int,
    kind: str,
    layout: Any = "auto",
    transport: str = "auto",
    extras: bool = False,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    D: int = 16,
    shape: tuple[int, int] = (None, None),
    nodes: int = 1,
    repeats: int = 1,
    drop: float = 0.0,
) -> dict[str, Any]:
    """Attention and all gradients, of all tokens (of sinks: this rank's share); and what is visited."""
    plan, _, _ = plan_of(seed, kind, Tq=shape[0], Tk=shape[1])
    given = inputs(seed, plan, dtype, heads=4, kv_heads=kv_heads, D=D, extras=extras)
    place = group if nodes == 1 else _nodes(group, nodes)
    found: dict[str, Any] = {}
    for n in range(repeats):
        peers.SMALL = 0 if (seed + n) % 2 else segments.SMALL  # through memory, or the process group: on all
        with sf.distributed.context_parallel(
            place, plan, layout=layout, transport=transport, timeout=40
        ) as cp:
            axes = {"q": "q", "dout": "q", "dlse": "q", "k": "k", "v": "k", "key_bias": "k"}
            own = {}
            for name, x in given.items():
                side = {"q": cp.layout, "k": cp.key_layout}.get(axes.get(name, ""))
                own[name] = x if side is None else x.index_select(2, side.ranks[cp.rank])
            leaves = {name: x.requires_grad_() for name, x in own.items() if name not in ("dout", "dlse")}
            options = {name: own[name] for name in ("key_bias", "sink_logits") if name in own}
            if drop:
                options |= {"dropout_p": drop, "dropout_seed": seed, "alibi_slopes": SLOPES}
            out, lse = sf.distributed.attention(own["q"], own["k"], own["v"], return_lse=True, **options)
            seen = lse > -torch.inf
            total = (out.float() * own["dout"].float()).sum() + torch.where(seen, lse * own["dlse"], 0).sum()
            gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
            now = {"out": out.detach(), "lse": lse.detach()}
            now |= {f"d{n.removeprefix('key_').removesuffix('_logits')}": x for n, x in gradients.items()}
            if n:
                same = all(torch.equal(now[name], found[name]) for name in now)
                assert same, "another result for the same call"
            found |= now
            if cp.peers is not None and hasattr(os, "memfd_create"):
                assert len(cp.peers.lines) == cp.world - 1, "no shared memory between these processes"
        peers.SMALL = segments.SMALL
        where = {"q": cp.layout.ranks[cp.rank], "k": cp.key_layout.ranks[cp.rank]}
    made = cp.transport_of(cp.plan) if cp.world > 1 and transport != "ulysses" else None
    pairs = 0
    if made is not None:
        from sparseflash.plan.figures import visible_pairs

        pairs = sum(visible_pairs(p) / _lists(p) for o in range(cp.world) for p in made.plans(o))
    return {
        **{n: x.numpy() if x.dtype != torch.bfloat16 else x for n, x in found.items()},
        "where": where,
        "pairs": pairs,
        "transport": type(made).__name__,
        "layout": cp.layout.name,
    }


def _lists(plan: sf.Plan) -> int:
    batch, heads = plan.extent()
    return batch * heads


_meshes: dict[Any, Any] = {}


def _nodes(group: Any, nodes: int) -> tuple[Any, Any]:
    """Outer and inner groups of so many nodes."""
    world = dist.get_world_size(group)
    if (world, nodes) not in _meshes:
        _meshes[world, nodes] = init_device_mesh(
            "cpu", (nodes, world // nodes), mesh_dim_names=("node", "place")
        )
    mesh = _meshes[world, nodes]
    return mesh["node"], mesh["place"]


AXES = {"out": "q", "lse": "q", "dq": "q", "dk": "k", "dv": "k", "dbias": "k"}


def joined(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The results of all ranks as those of one: tokens where they belong, shares of sinks summed."""
    found: dict[str, Tensor] = {}
    for name in results[0]:
        if name in AXES:
            parts = [torch.as_tensor(r[name]) for r in results]
            order = torch.cat([torch.as_tensor(r["where"][AXES[name]]) for r in results])
            found[name] = torch.cat(parts, 2).index_select(2, order.argsort())
        elif name == "dsink":
            found[name] = torch.stack([torch.as_tensor(r[name]) for r in results]).sum(0)
    return found


def drawn(group: Any, *, plan: Any, layout: str, transport: str, nodes: int = 1) -> Any:
    """Which weights stay, of all pairs: keys have equal scores, and values of their own; [H,T,T]."""
    T, place = plan.Tq, group if nodes == 1 else _nodes(group, nodes)
    q, v = torch.zeros(1, 4, T, 16), torch.eye(T).expand(1, 4, T, T)
    with sf.distributed.context_parallel(place, plan, layout=layout, transport=transport, timeout=40) as cp:
        own = (cp.shard(x, 2) for x in (q, q, v))
        return (cp.unshard(sf.distributed.attention(*own, dropout_p=0.4, dropout_seed=11), 2) > 0)[0].numpy()


def seeded(group: Any) -> tuple[float, bool]:
    """Dropout without a seed, in ranks whose generators differ: how far from rank 0's; two are the same."""
    torch.manual_seed(dist.get_rank())
    g, plan = torch.Generator().manual_seed(2), sf.Plan.dense(90, 90, causal=True)
    q, k, v = torch.randn(3, 1, 4, 90, 16, generator=g)
    with sf.distributed.context_parallel(group, plan, timeout=40) as cp:
        own = [cp.shard(x, 2) for x in (q, k, v)]
        one, two = (cp.unshard(sf.distributed.attention(*own, dropout_p=0.5), 2) for _ in range(2))
    torch.manual_seed(0)  # as rank 0 drew
    want = sf.attention(q, k, v, plan, dropout_p=0.5)
    return float((one - want).abs().max()), bool(torch.equal(one, two))


def differ(group: Any, *, what: str) -> str:
    """The last rank gives something else than the others; what each is told."""
    last = dist.get_rank() == dist.get_world_size(group) - 1
    T, options = 96, {}
    plan = sf.Plan.dense(T, T, causal=True, window=(9 if what == "plan" and last else 8, 0))
    layout = "striped" if what == "layout" and last else "zigzag"
    if what == "options" and last:
        options["scale"] = 1.0
    if what == "dropout":
        options |= {"dropout_p": 0.1, "dropout_seed": int(last)}
    if what == "alibi_slopes" and last:
        options["alibi_slopes"] = SLOPES
    with sf.distributed.context_parallel(group, plan, layout=layout, timeout=20) as cp:
        heads = 2 if what == "shape" and last else 4
        q, k, v = (cp.shard(x, 2) for x in torch.randn(3, 1, heads, T, 16))
        try:
            sf.distributed.attention(q, k, v, **options)
        except sf.RankError as error:
            return str(error)
    return "nothing"


def lose(group: Any, *, how: str, seconds: float, transport: str, phase: str) -> str:
    """Rank 1 dies or stalls inside its second loss or gradient; what the others are told, and when."""
    T = 512
    plan = sf.Plan.dense(T, T, causal=True)
    rank, begin = dist.get_rank(), time.monotonic()
    with sf.distributed.context_parallel(group, plan, transport=transport, timeout=seconds) as cp:
        q, k, v = (cp.shard(x, 2).requires_grad_() for x in torch.randn(3, 1, 4, T, 16))

        def step() -> None:
            sf.distributed.attention(q, k, v).square().sum().backward()

        step()
        if rank == 1:
            made = cp.transport_of(cp.plan)
            plans_ = made.plans

            def fails(origin: int) -> Any:
                if cp.peers.doing.startswith(
                    f"{phase} of call 2, step {0 if transport == 'groupcast' else 2}"
                ):
                    if how == "dies":
                        os._exit(1)
                    time.sleep(seconds * 3)
                return plans_(origin)

            made.plans = fails
        try:
            for _ in range(3):  # a rank may have had all that it needed
                step()
        except sf.RankError as error:
            return f"{time.monotonic() - begin:.1f} {error}"
    return "nothing"


def chosen(group: Any, *, method: Any, transport: str = "auto") -> dict[str, Any]:
    """A method over sharded queries and keys, and over all of them: both results, of all tokens."""
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, 4, 500, 16, generator=g)
    with (
        sf.distributed.context_parallel(group, method, transport=transport, timeout=40) as cp,
        torch.no_grad(),
    ):
        own = (cp.shard(x, 2) for x in (q, k, v))
        out = cp.unshard(sf.distributed.attention(*own), 2)
    return {"out": out.numpy(), "whole": method(q, k, v).numpy(), "sum": float(out.sum())}


def through_memory(group: Any, *, transport: str) -> tuple[list[int], bool]:
    """Slots of the lines after some steps, and whether messages through the group give the same bits."""
    g = torch.Generator().manual_seed(7)
    q, k, v, dout = torch.randn(4, 1, 2, 2048, 32, generator=g)
    plan = sf.Plan.dense(2048, 2048, causal=True)
    found = []
    with sf.distributed.context_parallel(group, plan, transport=transport, timeout=40) as cp:
        own = [cp.shard(x, 2) for x in (q, k, v, dout)]
        for small in (*[segments.SMALL] * 6, 1 << 30):
            peers.SMALL = small
            leaves = [x.detach().requires_grad_() for x in own[:3]]
            out = sf.distributed.attention(*leaves)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, own[3])])
        peers.SMALL = segments.SMALL
        same = all(torch.equal(x, y) for one in found for x, y in zip(one, found[-1]))
        return [len(line.slots) for line in cp.peers.lines.values()], same


def two_machines(group: Any, *, transport: str) -> bool:
    """Whether four ranks of which only two pairs share memory get the bits of four that all do."""
    g = torch.Generator().manual_seed(8)
    q, k, v, dout = torch.randn(4, 1, 2, 300, 16, generator=g)
    plan = sf.Plan.dense(300, 300, causal=True)
    found = []
    with sf.distributed.context_parallel(group, plan, transport=transport, timeout=40) as cp:
        own, lines = [cp.shard(x, 2) for x in (q, k, v, dout)], None
        peers.SMALL = 0
        for _ in range(2):
            leaves = [x.detach().requires_grad_() for x in own[:3]]
            out = sf.distributed.attention(*leaves)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, own[3])])
            lines = dict(cp.peers.lines)
            peers._LINES[cp.peers.group] = {x: y for x, y in lines.items() if x // 2 == cp.rank // 2}
        peers.SMALL = segments.SMALL
        del peers._LINES[cp.peers.group]  # ranks meet again
    return len(lines) == 1 and all(torch.equal(x, y) for x, y in zip(*found))


def video(group: Any, *, methods: Sequence[Any], frames: int) -> tuple[float, float]:
    """How far a video model's velocities over ranks are from those of one process, and how large they are."""
    from benchmarks.experiments.video.model import VideoDiT

    torch.manual_seed(0)
    model = VideoDiT(frames, 24, 4, width=32, heads=2, layers=len(methods)).attend_by(methods)
    for weight in model.parameters():  # what begins at 0 would hide the layers
        torch.nn.init.normal_(weight, std=0.2)
    x, t = torch.randn(2, frames, 24, 24), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        want = model(x, t)
        cp = sf.distributed.context_parallel(
            group, length=model.places.shape[-2], layout="zigzag", timeout=40
        )
        found = model.over(cp)(x, t)
    return float((found - want).abs().max()), float(want.abs().max())


def as_dtensors(group: Any) -> float:
    """The largest error of attention over DTensors, forward and backward."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    g = torch.Generator().manual_seed(5)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 4, 301, 16, generator=g).unbind())
    plan = sf.Plan.dense(301, 301, causal=True, window=(70, 0))
    want = sf.attention(q, k, v, plan)
    slopes = torch.autograd.grad(want.square().sum(), (q, k, v))
    given = [distribute_tensor(x.detach(), mesh, [Shard(2)]).requires_grad_() for x in (q, k, v)]
    with sf.distributed.context_parallel(mesh["cp"], plan, layout="chunks", timeout=40):
        out = sf.distributed.attention(*given)
    found = torch.autograd.grad(out.square().sum(), given)
    pairs = [(out, want), *zip(found, slopes)]
    return max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)


def overlap(group: Any, *, method: Any, T: int, compare: bool = True) -> tuple[float, float]:
    """The share of pairs that a method selects over ranks and over all tokens alike; and what the rank sends
    for it, as a share of its q and k."""
    from sparseflash.distributed.select import selected

    g = torch.Generator().manual_seed(7)
    q, k = torch.randn(2, 1, 4, T, 64, generator=g)
    q, k = q + q[:, :, -1:], k[:, ::2]
    with sf.distributed.context_parallel(group, method, layout="striped", timeout=40) as cp:
        bytes_ = _counted(cp.peers)
        own = [cp.shard(x, 2) for x in (q, k)]
        plan = selected(cp, method, *own, own[1], {})
    share = 1.0
    if compare:
        one, other = (x.to_dense() for x in (plan, method.select(q, k).plan))
        share = float((one & other).sum() / (one | other).sum())
    return share, sum(bytes_) / sum(x.numel() * x.element_size() for x in own)


def _counted(peers: Any) -> list[int]:
    """Count what a rank gives to collectives, in bytes."""
    found: list[int] = []

    def counting(run: Any) -> Any:
        def counted(x: Tensor, *rest: Any) -> Any:
            found.append(x.numel() * x.element_size())
            return run(x, *rest)

        return counted

    peers.gather, peers.sum = counting(peers.gather), counting(peers.sum)
    return found


def sent(group: Any, *, plan: Any, layout: Any) -> int:
    """Keys that this rank gets from others."""
    with sf.distributed.context_parallel(group, plan, layout=layout, transport="groupcast", timeout=40) as cp:
        made = cp.transport_of(cp.plan)
    return sum(made.read.values())


def traffic(group: Any, *, plan: Any, layout: Any, transport: str, nodes: int = 1) -> tuple[int, list[int]]:
    """Bytes that this rank sends, of two heads, forward and backward; what it visits of each rank's keys."""
    from sparseflash.plan.figures import visited_area

    place = group if nodes == 1 else _nodes(group, nodes)
    with sf.distributed.context_parallel(place, plan, layout=layout, transport=transport, timeout=40) as cp:
        total = 0
        for peers in {id(x): x for x in (cp.peers, cp.inner, cp.outer) if x is not None}.values():

            def counted(send: Any, receive: Any, start: Any = peers.start) -> Any:
                nonlocal total
                total += sum(x.numel() * x.element_size() for _, x in send)
                return start(send, receive)

            peers.start = counted
        q, k, v = (cp.shard(x, 2).requires_grad_() for x in torch.randn(3, 1, 2, plan.Tq, 16))
        sf.distributed.attention(q, k, v).sum().backward()
        made = cp.transport_of(cp.plan)
        return total, [sum(visited_area(p) for p in made.plans(origin)) for origin in range(cp.world)]


def peak(group: Any, *, T: int, transport: str) -> int:
    """The most bytes that torch holds beside what was there before, in a forward and backward of T tokens."""
    plan = sf.Plan.dense(T, T, causal=True, window=None if transport == "ring" else (T // 64, 0))
    with sf.distributed.context_parallel(group, plan, transport=transport, timeout=40) as cp:
        own = [torch.randn(1, 2, len(cp.positions), 32) for _ in range(3)]

        def step() -> None:
            leaves = [x.requires_grad_() for x in own]
            torch.autograd.grad(sf.distributed.attention(*leaves).sum(), leaves)

        step()  # lists of the ranks are made once
        with torch.profiler.profile(profile_memory=True) as profiler:
            step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def generate(group: Any) -> float:
    """The largest error of a decoding step over a cache of which one rank has nothing."""
    g = torch.Generator().manual_seed(11)
    q, k, v = (torch.randn(2, 4, n, 16, generator=g) for n in (3, 50, 50))
    rank, edges = dist.get_rank(), [0, 20, 20, 37, 50]
    own = slice(edges[rank], edges[rank + 1])
    plan = sf.Plan.dense(3, 13, causal=True, q_offset=10) if rank == 3 else None
    cp = sf.distributed.context_parallel(group, timeout=40)
    out, lse = sf.distributed.decode(cp, q, k[:, :, own], v[:, :, own], plan, return_lse=True)
    want = sf.attention(q, k, v, sf.Plan.dense(3, 50, causal=True, q_offset=47), return_lse=True)
    return max(float((a - b).abs().max()) for a, b in zip((out, lse), want))


def fine_tune(
    group: Any,
    *,
    family: str,
    method: Any = None,
    nodes: int = 1,
    documents: bool = False,
    behind: int = 0,
    layout: str = "auto",
) -> tuple[float, float, int]:
    """A model of Transformers over ranks, beside data parallel where there are nodes, and on one process.

    The relative errors of the loss, and of the worst gradient; and the tokens of a rank.
    """
    from transformer_models import tiny

    T, model = 75, tiny(family).train()
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 97, (2, T), generator=g)
    labels = torch.where(torch.arange(T) % 9 == 4, -100, ids)
    given = {"input_ids": ids, "labels": labels, "use_cache": False}
    if documents:
        given["position_ids"] = torch.cat([torch.arange(n) for n in (20, 31, T - 51)])[None].expand(2, -1)
    if behind:
        given["attention_mask"] = (torch.arange(T) < T - behind).long().expand(2, -1)
        labels[:, T - behind :] = -100

    def learn(mean: bool, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(**given).loss
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        loss = loss.detach()
        if mean:
            for x in (loss, *found.values()):
                dist.all_reduce(x, group=group)
                x /= dist.get_world_size(group)
        return loss, found

    with nullcontext() if method is None else sf.transformers.sparse(model, prefill=method):
        want, slopes = learn(False, **given)
    place, rows = group, slice(None)
    if nodes > 1:
        data, place = _nodes(group, nodes)
        rows = slice(data.get_local_rank(), data.get_local_rank() + 1)
    with sf.transformers.context_parallel(model, place, method, layout=layout, timeout=40) as across:
        got, found = learn(True, **{n: x[rows] if isinstance(x, Tensor) else x for n, x in given.items()})
    worst = max(float((found[n] - x).abs().max() / x.abs().max().clamp(min=1e-6)) for n, x in slopes.items())
    assert not any(name.startswith("_sparseflash_across") for m in model.modules() for name in vars(m))
    return float((got - want).abs() / want), worst, len(across.cp.positions)


TEXT = b"to be or not to be, that is the question: whether tis nobler in the mind " * 40
SIZE = {"length": 160, "layers": 3, "width": 32, "heads": 2, "steps": 20, "lr": 3e-3, "eval_sequences": 2}


def train(
    group: Any,
    *,
    attention: str,
    options: dict,
    size: int,
    steps: int,
    folder: str,
    resume: bool,
    dropout: float = 0.0,
) -> list:
    """Losses of a small run whose sequences go over `size` processes, and those of the validation."""
    from sparseflash.train import Corpus, TrainConfig, Trainer, World

    groups = dist.get_world_size(group) // size
    config = TrainConfig(
        "", attention, options, batch=4 // groups, context_parallel=size, dropout=dropout, **SIZE
    )
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    trainer = Trainer(config, Corpus([TEXT]), world)
    if resume:
        trainer.load(Path(folder))
    losses = [trainer.step().loss for _ in range(steps)]
    held = trainer.validate()
    trainer.save(Path(folder))
    dist.barrier()
    return [*losses, held]
