"""Vertical-slash and lifetimes: what a tile lists is what its queries see, against loops over every pair."""

from __future__ import annotations

import heapq

import pytest
import torch
from torch import Tensor

import sparseflash as sf
import tolerance
from harness import EACH, inputs, run, unseen
from sparseflash import Plan, PlanError

SHAPES = [
    (65, 65, 16, 0),
    (40, 140, 16, 100),
    (40, 141, 16, torch.tensor([101, 64])),
    (1, 1, 64, 0),
    (0, 4, 8, 0),
    (4, 0, 8, 0),
    (30, 30, 8, -7),
    (20, 50, 8, 60),
]


def slashes(columns: Tensor, distances: Tensor, Tq: int, Tk: int, tile: int, offset: int) -> Tensor:
    """Of one head, pair by pair."""
    mask = torch.zeros(Tq, Tk, dtype=torch.bool)
    named, apart = set(columns.tolist()), set(distances.tolist()) - {-1}
    for i in range(Tq):
        first = i // tile * tile + offset
        for j in range(min(Tk, i + offset + 1)):
            mask[i, j] = j in named or any(first - d <= j < first - d + tile for d in apart)
    return mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 6), (0, 3), (4, 0), (0, 0), (30, 30)], ids=str)
def test_a_vertical_slash_plan_is_the_mask_that_loops_make(shape, sizes, generator):
    Tq, Tk, tile, offset = shape
    columns = torch.randint(-1, Tk + 1, (1, 2, sizes[0]), generator=generator).clamp(max=Tk - 1)
    distances = torch.randint(-1, Tk + 5, (2, 1, sizes[1]), generator=generator)

    def make() -> Plan:
        return Plan.from_slashes(columns, distances, Tq=Tq, Tk=Tk, tile=tile, q_offset=offset)

    mask = make().check().to_dense()
    for b in range(2):
        at = int(torch.as_tensor(offset).reshape(-1).expand(2)[b])
        for h in range(2):
            want = slashes(columns[0, h], distances[b, 0], Tq, Tk, tile, at)
            assert torch.equal(mask[b, h], want)
    with unseen():
        there = make()
    assert torch.equal(there.check().to_dense(), mask)


@EACH
def test_attention_over_a_vertical_slash_plan_equals_the_mask(backend, generator):
    q, k, v, dout, _ = inputs(generator, 70, 129, B=2, H=4, Hkv=2)
    columns = torch.randint(0, 129, (1, 4, 9), generator=generator)
    distances = torch.randint(0, 120, (1, 2, 5), generator=generator)
    plan = Plan.from_slashes(columns, distances, Tq=70, Tk=129, tile=16, q_offset=59)
    got = run(q, k, v, plan, backend=backend, dout=dout)
    tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout)


def test_slashes_of_a_static_capacity_say_what_they_dropped():
    columns, distances = torch.arange(0, 60, 3).view(1, 1, -1), torch.tensor([[[0, 40]]])
    for capacity, lost in ((3, True), (40, False)):
        plan = Plan.from_slashes(columns, distances, Tq=64, Tk=64, tile=8, capacity=capacity)
        assert bool(plan.overflow) == lost and int(plan.count.max()) <= capacity


@pytest.mark.parametrize(
    ("columns", "distances", "said"),
    [
        ([[[64]]], [[[0]]], "columns hold 64"),
        ([[[0]]], [[[-2]]], "distances hold -2"),
        ([[0]], [[[0]]], r"columns: shape \[1, 1\]"),
        ([[[0.5]]], [[[0]]], "columns has dtype torch.float32"),
        ([[[0]]] * 2, [[[0]]] * 3, "batch sizes 2 and 3"),
    ],
)
def test_slashes_that_do_not_fit_are_refused(columns, distances, said):
    with pytest.raises(PlanError, match=said):
        Plan.from_slashes(torch.tensor(columns), torch.tensor(distances), Tq=64, Tk=64)


@pytest.mark.parametrize("shape", [*SHAPES, (20, 600, 8, 60)], ids=str)
@pytest.mark.parametrize("lists", [(1, 1), (2, 2), (1, 3)], ids=str)
def test_a_key_is_seen_while_it_lives(shape, lists, generator):
    Tq, Tk, tile, offset = shape
    begin = torch.randint(-3, Tk + 5, (*lists, Tk), generator=generator)
    end = begin + torch.randint(-2, Tk + 3, (lists[0], 1, Tk), generator=generator)
    if Tk == 600:  # so many neighbours that live together that they are a range
        begin[..., 100:400], end[..., 100:400] = 2, 70
    end[..., -1:] = 2**62

    def make() -> Plan:
        return Plan.from_lifetimes(begin, end, Tq=Tq, q_offset=offset, tile=tile)

    plan = make().check()
    position = torch.arange(Tq)[:, None] + torch.as_tensor(offset).reshape(-1, 1, 1, 1)
    want = (begin[:, :, None] <= position) & (position < end[:, :, None])
    assert torch.equal(plan.to_dense().expand_as(want), want)
    assert Tk != 600 or len(plan.spans)
    with unseen():
        there = make()
    assert torch.equal(there.check().to_dense(), plan.to_dense())


@EACH
def test_attention_over_lifetimes_equals_the_mask(backend, generator):
    q, k, v, dout, _ = inputs(generator, 63, 129, B=2, H=4, Hkv=2)
    begin = torch.randint(0, 100, (1, 2, 129), generator=generator)
    plan = Plan.from_lifetimes(begin, begin + 30, Tq=63, tile=16, q_offset=torch.tensor([20, 66]))
    got = run(q, k, v, plan, backend=backend, dout=dout)
    tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout)


@pytest.mark.parametrize("kept", [0.05, 0.1, 0.25])
def test_scattered_survivors_are_the_only_ones_that_are_visited(kept, generator):
    """The w best keys so far, at each position: a key lives until w better ones have come."""
    T, best = 8192, []
    end = torch.full((1, 1, T), 2**31)
    for i, score in enumerate(torch.rand(T, generator=generator).tolist()):
        heapq.heappush(best, (score, i))
        if len(best) > int(kept * T / 2):  # half of the pairs are causal
            end[..., heapq.heappop(best)[1]] = i
    plan = Plan.from_expiry(end, tile=64)
    dense = Plan.dense(T, T, causal=True, tile=64)
    assert plan.work / dense.work <= 1.2 * plan.density
    if kept == 0.05:  # units that stand or fall together are all visited, for the few in them that live
        blocks = Plan.from_expiry(end, tile=64, unit=128)
        assert blocks.density == plan.density and blocks.work / dense.work > 0.9


def test_lives_that_do_not_fit_are_refused():
    one = torch.zeros(1, 1, 4, dtype=torch.int64)
    for begin, end, said in (
        (one, one[..., :3], "expected one Tk"),
        (one.float(), one, "begin has dtype"),
        (one[0], one, r"begin: shape \[1, 4\]"),
    ):
        with pytest.raises(PlanError, match=said):
            Plan.from_lifetimes(begin, end, Tq=4)
    with pytest.raises(sf.PlanError, match="Tq=-1"):
        Plan.from_lifetimes(one, one, Tq=-1)
