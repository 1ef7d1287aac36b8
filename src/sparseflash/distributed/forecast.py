"""Simulate a context-parallel step from the plan, measured kernel costs and link speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..ops._arguments import AnyPlan, as_plans
from ..ops.costs import TERMS, Costs, features
from ..plan import Plan
from ..plan.figures import visited_area
from .layouts import Layout, areas, readers
from .pairs import Pairs

EXACT = 8
"""Up to this many ranks, each pair's lists are built; beyond, cost is prorated by visited area."""


@dataclass(frozen=True)
class Links:
    """Link speeds.

    Attributes
    ----------
    inner, outer : float
        Bytes per second between ranks of a node, and between nodes.
    latency : float
        Fixed seconds per message.
    node : int
        Ranks per node; 0: all ranks are in one node.
    busy : float
        Share of a message's duration for which the processors of both ends work on it: 0 where other engines
        copy (cards), about 1 where ranks are processes of one machine.
    memory : float
        Bytes per second that a rank reads and writes where it merges partial results and sums gradients.
    """

    inner: float = 4e11
    outer: float = 5e10
    latency: float = 1e-5
    node: int = 0
    busy: float = 0.0
    memory: float = 2e12

    def seconds(self, sender: int, receiver: int, size: float) -> float:
        """Duration of a message."""
        far = self.node and sender // self.node != receiver // self.node
        return self.latency + size / (self.outer if far else self.inner) if size else 0.0


@dataclass(frozen=True)
class Forecast:
    """Predicted cost of one forward and backward.

    Attributes
    ----------
    seconds, computing : float
        Time until the last rank finishes, and the compute time of the slowest rank, with
        what messages and merging cost its processor.
    balance, critical : float
        Load of the most loaded rank over the mean, in visited area; and the sum over ring steps of the
        largest load in each step, over the mean.
    sent : list of float
        Bytes sent by each rank.
    """

    seconds: float
    computing: float
    balance: float
    critical: float
    sent: Sequence[float]


def simulate(
    plan: AnyPlan,
    layout: Layout,
    *,
    transport: str,
    costs: Costs,
    heads: int,
    kv_heads: int,
    D: int,
    links: Links | None = None,
    dtype: str = "bf16",
) -> Forecast:
    """Predict forward and backward time of one layer's attention for one sequence.

    Parameters
    ----------
    plan : Plan or tuple of Plan
        Plan over all tokens.
    layout : Layout
        Placement of the tokens.
    transport : str
        "ring", "double ring" (a ring inside each node and one over nodes) or "groupcast".
    costs : Costs
        Costs of one rank's machine, with "forward" and "both" of the dtype.
    heads, kv_heads, D : int
        Number of query heads, of key heads, and their dimension.
    links : Links, optional
        Link speeds; by default those of GPUs in one node.

    Examples
    --------
    >>> import sparseflash as sf
    >>> from sparseflash.ops.costs import Costs
    >>> from sparseflash.distributed import Layout, simulate
    >>> made_up = [1e-5, 1e-4, 1e-4, 1e-4, 1e-5, 1e-4, 1e-4, 1e-6]
    >>> costs = Costs("a machine", {"forward bf16": made_up, "both bf16": [3 * x for x in made_up]}, {})
    >>> plan = sf.Plan.dense(2048, 2048, causal=True)
    >>> of = dict(transport="ring", costs=costs, heads=4, kv_heads=4, D=64)
    >>> said = [simulate(plan, Layout.of(name, 2048, 4), **of) for name in ("contiguous", "zigzag")]
    >>> [round(x.balance, 2) for x in said], said[0].seconds > 1.3 * said[1].seconds
    ([1.71, 1.0], True)
    """
    links, plans = links or Links(), as_plans(plan)
    known = ("ring", "double ring", "groupcast")
    require((transport in known, f"transport={transport!r}: expected one of {', '.join(known)}"))
    for direction in ("forward", "both"):
        if f"{direction} {dtype}" not in costs.ours:
            raise SparseFlashError(f"costs have no {direction} {dtype}: expected forward and both")
    world, cast = layout.world, transport == "groupcast"
    forward = costs.ours[f"forward {dtype}"]
    backward = [b - f for b, f in zip(costs.ours[f"both {dtype}"], forward)]
    find = _pieces if world <= EXACT else _shares
    area, points, rows = find(plans, layout, heads, kv_heads, D, cast)
    ahead, back = (points @ torch.tensor(c, dtype=torch.float64) for c in (forward, backward))
    # reads what own keys and others' gave, writes the merged: out in the forward, dq in the backward
    merging = 3 * 4 * heads * D * (rows * (1 - torch.eye(world))) / links.memory
    ahead, back = ahead + merging, back + merging
    width = 2 * kv_heads * D * (2 if dtype == "bf16" else 4)  # bytes of keys and values per token
    grads = 2 * kv_heads * D * 4
    steps = torch.stack([torch.diagonal(area.roll(n, 1)) for n in range(world)])
    mean = float(area.sum()) / world or 1.0
    ranks = torch.arange(world)
    if cast:
        read = readers(plans, layout)[:, torch.cat(layout.ranks)].double()
        read = torch.stack([part.sum(1) for part in read.split(layout.sizes, 1)], 1)
        read[ranks, ranks] = 0
        again = float(read.sum(1).max()) > max(layout.sizes)  # else keys are held until the backward
        taken, home = read * width, read * grads
        back[ranks, ranks] += 3 * home.sum(0) / links.memory
        moved = [(ahead, taken), (back, home + taken if again else home)]
        for times, size in moved:
            times[ranks, ranks] += links.busy * (size.sum(0) + size.sum(1)) / 2 / links.inner
        ends = [_cast(ahead, taken, None, links), _cast(back, taken if again else None, home, links)]
        sent = read.sum(0) * width * (2 if again else 1) + read.sum(1) * grads
    else:
        size = torch.tensor(layout.sizes, dtype=torch.float64)
        node = links.node if transport == "double ring" and links.node else world
        others = size.sum() - size
        for times, each in ((ahead, width), (back, width + grads)):
            times[ranks, ranks] += links.busy * others * each / links.inner
        back[ranks, ranks] += 3 * others * grads / links.memory
        ends = [
            _rings(times, size * width, size * home, links, node)
            for times, home in ((ahead, 0), (back, grads))
        ]
        sent = torch.tensor([_passed(size, rank, node, 2 * width, grads) for rank in range(world)])
    return Forecast(
        sum(ends),
        float((ahead + back).sum(1).max()),
        float(area.sum(1).max()) / mean,
        float(steps.amax(1).sum()) / mean,
        sent.tolist(),
    )


def _passed(size: Tensor, rank: int, node: int, width: int, grads: int) -> float:
    """Bytes that a rank sends in the rings of a forward and a backward (`Ring.run`)."""
    i, nodes = rank % node, len(size) // node
    total = 0.0
    for s in range(nodes):
        of = (rank // node - s) % nodes * node
        own, last = size[of : of + node].sum(), size[of + (i + 1) % node]
        total += float(own - last) * width + float(own - size[of + i]) * grads
        total += float(size[of + i]) * ((width if s + 1 < nodes else 0) + (grads if nodes > 1 else 0))
    return total


def _pieces(
    plans: Sequence[Plan], layout: Layout, heads: int, kv_heads: int, D: int, cast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Area visited by each rank in the keys of each, cost features of these calls, and their queries."""
    world = layout.world
    rows = torch.zeros(world, world, dtype=torch.float64)
    area = torch.zeros(world, world, dtype=torch.float64)
    points = torch.zeros(world, world, len(TERMS), dtype=torch.float64)
    for rank in range(world):
        pairs = Pairs(plans, rank, layout, layout)
        for origin in range(world):
            if own := pairs.of(origin, read=cast and origin != rank):
                q = _like(heads, own[0].Tq, D)
                rows[rank, origin] = own[0].Tq
                points[rank, origin] = torch.tensor(features(own, q, _like(kv_heads, own[0].Tk, D)))
                area[rank, origin] = sum(visited_area(one) for one in own)
    return area, points, rows


def _shares(
    plans: Sequence[Plan], layout: Layout, heads: int, kv_heads: int, D: int, cast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for many ranks: the costs of one process, prorated by area."""
    area = areas(plans, layout)
    given = features(plans, _like(heads, layout.T, D), _like(kv_heads, layout.T, D))
    whole = torch.tensor(given, dtype=torch.float64)
    found = (area / area.sum().clamp(min=1))[..., None] * whole  # pairs, dots, tests, gathered, entries
    some = (area > 0).double()
    n = torch.tensor(layout.sizes, dtype=torch.float64) / layout.T
    found[..., 0] = some
    for term in (1, 2):  # rows are read again for each pair of ranks with work
        found[..., term] = some * whole[term] * (n[:, None] + n[None]) / 2
    return area, found, some * n[:, None] * layout.T


def _like(heads: int, n: int, D: int) -> Tensor:
    return torch.empty(1, heads, n, D, device="meta")


def _cast(times: Tensor, taken: Tensor | None, home: Tensor | None, links: Links) -> float:
    """Simulate a group-cast: keys (`taken`) arrive while a rank attends to its own; gradients (`home`) leave.

    Without `taken` keys are held from the forward: a rank then attends to these first, and its gradients are
    on their way while it attends to its own.
    """
    world = len(times)
    own = torch.diagonal(times).tolist()
    others = (times.sum(1) - torch.diagonal(times)).tolist()

    def messages(rank: int, size: Tensor) -> tuple[float, float]:
        arrives = sum(links.seconds(other, rank, float(size[rank, other])) for other in range(world))
        return arrives, sum(links.seconds(rank, other, float(size[other, rank])) for other in range(world))

    if taken is not None:
        ends = [max(own[r], *messages(r, taken)) + others[r] for r in range(world)]
        leaves = ends
    else:
        ends, leaves = [own[r] + others[r] for r in range(world)], others
    if home is None:
        return max(ends)
    back = [
        max(leaves[other] for other in range(world) if other == rank or float(home[other, rank]))
        + sum(links.seconds(other, rank, float(home[other, rank])) for other in range(world))
        for rank in range(world)
    ]
    return max(*ends, *back)


def _rings(times: Tensor, size: Tensor, home: Tensor, links: Links, node: int) -> float:
    """Simulate nested rings: a rank continues once it has computed and the next shard has arrived.

    A link sends one message after another; keys go before gradients.
    """
    world = len(times)
    nodes = world // node
    start, ready = [0.0] * world, [0.0] * world  # ready: when the last step's gradients arrive
    free: dict[tuple[int, int], float] = {}

    def arrives(sender: int, receiver: int, since: float, size: float) -> float:
        """Arrival time of a message sent at `since` or later, when the link is free."""
        if not size:
            return since
        end = max(since, free.get((sender, receiver), 0.0)) + links.seconds(sender, receiver, size)
        free[sender, receiver] = end
        return end

    def before(rank: int, far: bool) -> int:
        at, of = rank % node, rank // node
        return (of - 1) % nodes * node + at if far else of * node + (at - 1) % node

    for s in range(nodes):
        others = [before(rank, True) for rank in range(world)]
        far = [
            arrives(other, rank, start[other], float(size[other])) if s + 1 < nodes else 0.0
            for rank, other in enumerate(others)
        ]
        for t in range(node):
            held = [(r // node - s) % nodes * node + (r % node - t) % node for r in range(world)]
            ends = [max(start[r] + float(times[r, held[r]]), ready[r]) for r in range(world)]
            nearest = [before(rank, False) for rank in range(world)]
            came = [
                arrives(other, rank, start[other], float(size[held[other]])) if t + 1 < node else 0.0
                for rank, other in enumerate(nearest)
            ]
            start = [max(pair) for pair in zip(ends, came)]
            if t:  # the gradient of the first keys stays
                ready = [
                    arrives(other, rank, ends[other], float(home[held[other]])) if float(home.sum()) else 0.0
                    for rank, other in enumerate(nearest)
                ]
        if nodes > 1:
            start = [max(pair) for pair in zip(start, far)]
            if float(home.sum()):
                back = [arrives(o, r, max(start[o], ready[o]), float(home[o])) for r, o in enumerate(others)]
                ready = [max(pair) for pair in zip(ready, back)]
    return max(max(start), max(ready))
