"""Attention over ranks: balance and what is sent, exact; a step of two processes; more of both, forecast."""

from __future__ import annotations

import functools
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sparseflash as sf
from sparseflash import Plan
from sparseflash.bench.results import Row
from sparseflash.distributed import Layout, Links, balance, readers, simulate
from sparseflash.distributed.pairs import Pairs
from sparseflash.distributed.peers import Peers
from sparseflash.distributed.segments import Room
from sparseflash.ops.costs import Costs, features, fit, machine
from sparseflash.plan.figures import visited_area

LAYOUTS = ("contiguous", "zigzag", "striped", "auto")
PARTS = ("balance", "step", "forecast")


def plans(T: int) -> dict[str, Callable[[], Plan]]:
    """Plans of one head, by name."""
    g = torch.Generator().manual_seed(0)
    cuts = torch.randint(1, T, (max(T // 1000, 1),), generator=g).sort().values
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([T])])
    bucket = torch.randint(8, (1, 1, T), generator=g)
    keep = torch.rand(1, 1, T, generator=g) < 0.5

    def blocks() -> Plan:
        size = 128 if T <= 65536 else 512
        some = torch.rand(1, 1, T // size, T // size, generator=g) < 0.25
        return Plan.from_blocks(some, Tq=T, Tk=T, tile=size, unit=size, causal=True)

    return {
        "dense causal": lambda: Plan.dense(T, T, causal=True),
        "window + sink": lambda: Plan.dense(T, T, causal=True, window=(1023, 0), sink_tokens=4),
        "window": lambda: Plan.dense(T, T, causal=True, window=(1023, 0)),
        "documents": lambda: Plan.from_documents(edges),
        "hash 8": lambda: Plan.from_buckets(bucket, bucket),
        "qk-sparse, half": lambda: Plan.from_keep(keep, keep),
        "blocks 25 %": blocks,
        "star, 4 blocks": lambda: (
            sf.methods.StarAttention(block=T // 4, anchor=T // 16)
            .select(*[torch.empty(1).expand(1, 1, T, 1)] * 2)
            .plan
        ),
    }


def _balance(T: int, worlds: Sequence[int], on_run: Callable[[str], None]) -> Iterator[Row]:
    """Exact: what the lists that ranks are given visit, and which keys they read of others."""
    for name, make in plans(T).items():
        plan = make()
        for world in worlds:
            for asked in LAYOUTS:
                on_run(f"{name}, {world} ranks, {asked}")
                layout = balance(plan, world) if asked == "auto" else Layout.of(asked, T, world)
                visits = torch.zeros(world, world, dtype=torch.float64)
                for rank in range(world):
                    pairs = Pairs([plan], rank, layout, layout)
                    for origin in range(world):
                        visits[rank, origin] = sum(visited_area(part) for part in pairs.of(origin))
                mean = float(visits.sum()) / world
                steps = torch.stack([torch.diagonal(visits.roll(n, 1)) for n in range(world)])
                own = torch.arange(world)[:, None] == layout.owner
                read = (readers(plan, layout) & ~own).sum(1)
                yield {
                    "bench": "ranks", "part": "balance", "case": name, "T": T, "ranks": world,
                    "layout": asked, "chosen": layout.name,
                    "balance": float(visits.sum(1).max()) / mean,
                    "critical": float(steps.amax(1).sum()) / mean,
                    "over_one": float(visits.sum()) / visited_area(plan),
                    "keys_sent": int(read.max()), "keys_ring": T - min(layout.sizes),
                }  # fmt: skip


def _keep_memory() -> None:
    """Let this process keep memory that tensors leave, as glibc does once one of this size has been freed.

    A training process has freed such a tensor long ago; in a new one, each step of a rank would ask the
    system for its pages again, while one process, whose tensors are larger, would not.
    """
    torch.zeros(31 << 20, dtype=torch.uint8)


def _times(run: Callable[[], Any], rounds: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    run()
    taken = []
    for _ in range(rounds):
        before()
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return taken


HEADS, DIM = 2, 64


def _inputs(T: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return list(torch.randn(4, 1, HEADS, T, DIM, generator=g))


def _of_one(plan: Any, q: Any, k: Any, v: Any, dout: Any, *, both: bool) -> None:
    leaves = [x.detach().requires_grad_(both) for x in (q, k, v)]
    out = sf.attention(*leaves, plan)
    if both:
        torch.autograd.grad(out, leaves, dout)


def _measured(T: int, rounds: int) -> tuple[dict[str, list[float]], Links]:
    """Costs of kernels on shards of the plans, and of messages, while all ranks do the same.

    Ranks on one machine share its memory and its clock: what a kernel takes alone says little of a step.
    """
    world, peer = dist.get_world_size(), (dist.get_rank() + 1) % dist.get_world_size()

    def together(run: Callable[[], Any]) -> float:
        seconds = torch.tensor([statistics.median(_times(run, rounds, dist.barrier))], dtype=torch.float64)
        dist.all_reduce(seconds)
        return float(seconds) / world

    q, k, v, dout = _inputs(T)
    ours = {}
    for direction in ("forward", "both"):
        points, seconds = [], []
        for make in plans(T).values():
            for n in (T, T // 2, T // 4):
                plan = make().restrict(torch.arange(n), torch.arange(n))
                given = [x[:, :, :n] for x in (q, k, v, dout)]
                points.append(features(plan, given[0], given[1]))
                seconds.append(together(functools.partial(_of_one, plan, *given, both=direction == "both")))
        ours[f"{direction} fp32"] = fit(points, seconds)

    peers = Peers(None, 60.0)
    peers.meet()

    def swap(out: torch.Tensor) -> None:
        peers.start([(peer, out)], [(peer, Room(tuple(out.shape), out.dtype, out.device))]).wait()

    sizes = [1 << 10, 1 << 20, 1 << 23]
    messages = [torch.zeros(n, dtype=torch.uint8) for n in sizes]
    taken = [together(functools.partial(swap, message)) for message in messages]
    before, begin = os.times(), time.perf_counter()
    for _ in range(8):
        swap(messages[-1])
    after, wall = os.times(), time.perf_counter() - begin
    working = torch.tensor([sum(after[:2]) - sum(before[:2]), wall], dtype=torch.float64)
    dist.all_reduce(working)  # of both ranks, with threads for messages
    out, part = torch.zeros(2, 1 << 20)
    passes = 3 * out.numel() * out.element_size() / together(lambda: out.add_(part))
    inner = sizes[-1] / (taken[-1] - taken[0])
    return ours, Links(inner=inner, latency=taken[0], busy=float(working[0] / working[1]), memory=passes)


def _rank(rank: int, port: int, T: int, rounds: int, jobs: Any, results: Any) -> None:
    """Measure costs, then steps of the plans that `jobs` names; None ends it."""
    torch.set_num_threads(1)
    _keep_memory()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = _measured(T, rounds)
    if rank == 0:
        results.put(found)
    q, k, v, dout = _inputs(T)
    known: dict[str, Any] = {}
    while (name := jobs.get()) is not None:
        if name not in known:
            cp = sf.distributed.context_parallel(None, plans(T)[name]())
            known[name] = cp, [cp.shard(x, 2) for x in (q, k, v, dout)]
        cp, own = known[name]
        with cp:

            def run(own: Sequence[Any] = own) -> None:
                leaves = [x.detach().requires_grad_() for x in own[:3]]
                torch.autograd.grad(sf.distributed.attention(*leaves), leaves, own[3])
                dist.barrier()

            seconds = _times(run, rounds, dist.barrier)
        if rank == 0:
            results.put((cp.layout.name, type(cp.transport_of(cp.plan)).__name__.lower(), seconds))
    dist.barrier()
    dist.destroy_process_group()


class _Two:
    """Two processes of one thread each, which measure costs first, then a step of each plan asked for."""

    def __init__(self, T: int, rounds: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        self.results, self.jobs = context.Queue(), [context.Queue() for _ in range(2)]
        self.processes = [
            context.Process(target=_rank, args=(r, port, T, rounds, self.jobs[r], self.results), daemon=True)
            for r in range(2)
        ]
        for process in self.processes:
            process.start()
        ours, self.links = self.results.get(timeout=3600)
        self.costs = Costs(machine(), ours, {})

    def step(self, name: str) -> tuple[str, str, list[float]]:
        """The layout and transport of a plan, and seconds of its steps."""
        for jobs in self.jobs:
            jobs.put(name)
        found: tuple[str, str, list[float]] = self.results.get(timeout=3600)
        return found

    def end(self) -> None:
        """End both."""
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join()


TURNS = 5
"""How often two processes and one take turns, so that a change of the machine's clock meets both."""


def _steps(T: int, rounds: int, two: _Two, on_run: Callable[[str], None]) -> Iterator[Row]:
    """Two processes: measured, forecast; and one process of two threads."""
    q, k, v, dout = _inputs(T)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    _keep_memory()
    for name, make in plans(T).items():
        on_run(f"a step of two processes, and of one with two threads: {name}")
        plan, ours, ones = make(), [], []
        for _ in range(TURNS):
            layout, transport, seconds = two.step(name)
            ours += seconds
            ones += _times(functools.partial(_of_one, plan, q, k, v, dout, both=True), rounds)
        taken, alone = statistics.median(ours), statistics.median(ones)
        said = simulate(
            plan, balance(plan, 2), transport=transport, costs=two.costs, heads=HEADS, kv_heads=HEADS, D=DIM,
            links=two.links, dtype="fp32",
        )  # fmt: skip
        yield {
            "bench": "ranks", "part": "step", "case": name, "T": T, "ranks": 2, "layout": layout,
            "transport": transport, "ms": taken * 1e3, "ms_forecast": said.seconds * 1e3,
            "ms_computing": said.computing * 1e3, "forecast_ratio": said.seconds / taken,
            "ms_one": alone * 1e3, "overhead": taken / alone - 1,
        }  # fmt: skip
    torch.set_num_threads(threads)


def _forecast(
    lengths: Sequence[int], worlds: Sequence[int], costs: Costs, on_run: Callable[[str], None]
) -> Iterator[Row]:
    """More ranks and longer sequences than there are here, at this machine's kernel times."""
    links = Links(inner=4e9, outer=1e9, latency=2e-4, node=8)
    for T in lengths:
        for name, make in plans(T).items():
            plan = make()
            for world in worlds:
                for asked in LAYOUTS:
                    on_run(f"{name}, {T} tokens, {world} ranks, {asked}")
                    layout = balance(plan, world) if asked == "auto" else Layout.of(asked, T, world)
                    for transport in ("ring", "double ring", "groupcast"):
                        said = simulate(
                            plan, layout, transport=transport, costs=costs, heads=HEADS, kv_heads=HEADS,
                            D=DIM, links=links, dtype="fp32",
                        )  # fmt: skip
                        yield {
                            "bench": "ranks", "part": "forecast", "case": name, "T": T, "ranks": world,
                            "layout": asked, "chosen": layout.name, "transport": transport,
                            "ms_forecast": said.seconds * 1e3, "ms_computing": said.computing * 1e3,
                            "balance": said.balance, "critical": said.critical,
                            "mb_sent": max(said.sent) / 1e6,
                        }  # fmt: skip


def measure(
    *,
    parts: Sequence[str] = PARTS,
    length: int = 16384,
    worlds: Sequence[int] = (2, 4, 8),
    lengths: Sequence[int] = (131072, 524288),
    many: Sequence[int] = (8, 64),
    rounds: int = 3,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Balance at `length` over `worlds`; steps of two processes there; forecasts at `lengths` over `many`."""
    if "balance" in parts:
        yield from _balance(length, worlds, on_run)
    if "step" in parts or "forecast" in parts:
        on_run("costs of kernels and messages, in two processes at once")
        two = _Two(length, rounds)
        if "step" in parts:
            yield from _steps(length, rounds, two, on_run)
        two.end()
        if "forecast" in parts:
            yield from _forecast(lengths, many, two.costs, on_run)
