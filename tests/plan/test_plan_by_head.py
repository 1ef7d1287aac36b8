"""`Plan.by_head`: plans of some heads beside plans of others, whatever they differ in."""

from __future__ import annotations

import pytest
import torch

import plans
import tolerance
from harness import MAIN, inputs, run
from sparseflash import Plan, PlanError

T = 130
EMPTY = torch.zeros(1, 1, 2, 5, dtype=torch.bool)


def causal(**how):
    return Plan.dense(T, T, causal=True, **how)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def heads_of(plan, n):
    """The mask [B,n,T,T] of a plan that n heads follow."""
    mask = plan.to_dense()
    return mask.repeat_interleave(n // mask.shape[1], 1)


def blocks(seed, tile=64, unit=32, **how):
    keep = torch.rand(1, 2, -(-T // tile), -(-T // unit), generator=drawn(seed)) < 0.5
    return Plan.from_blocks(keep, Tq=T, Tk=T, tile=tile, unit=unit, **how)


def buckets(seed):
    bucket = torch.randint(0, 5, (2, 2, T), generator=drawn(seed))
    return Plan.from_buckets(bucket, bucket, include_self=seed % 2 == 0)


def kept(seed):
    keep = torch.rand(2, 1, T, generator=drawn(seed)) < 0.4
    return Plan.from_keep(keep, keep)


def mask(seed):
    return Plan.from_mask(torch.rand(1, 2, T, T, generator=drawn(seed)) < 0.1)


MIXES = {
    "full and empty": lambda: [
        Plan.dense(T, T),
        Plan.from_blocks(EMPTY, Tq=T, Tk=T, tile=128, unit=32),
        causal(),
    ],
    "windows and sinks": lambda: [causal(window=(9, 0)), causal(window=(40, 0), sink_tokens=3), causal()],
    "two-sided beside causal": lambda: [Plan.dense(T, T, window=(5, 7)), causal(), Plan.dense(T, T)],
    "sinks beside what is not causal": lambda: [causal(window=(9, 0), sink_tokens=4), Plan.dense(T, T)],
    "orders of their own": lambda: [buckets(0), causal(window=(9, 0)), kept(1), buckets(2)],
    "no self pair": lambda: [buckets(1), causal(), causal(window=(9, 0), sink_tokens=2), Plan.dense(T, T)],
    "blocks, bits and ranges": lambda: [blocks(0), mask(1), causal(), blocks(2, causal=True)],
    "grids": lambda: [blocks(0, 64, 32), blocks(1, 32, 64), causal(tile=32), mask(2)],
    "offsets": lambda: [causal(q_offset=-7), causal(q_offset=torch.tensor([3, -2])), causal()],
    "segments and ends": lambda: [
        Plan.from_documents(torch.tensor([0, 50, T])),
        Plan.from_expiry(torch.arange(2, T + 2).view(1, 1, T), Tq=T),
        Plan.dense(T, T),
    ],
    "tables of heads": lambda: [
        Plan.dense(T, T, causal=True, window=(torch.tensor([5, 20]), 0), sink_tokens=torch.tensor([2, 0])),
        Plan.dense(T, T, window=(3, 3)),
    ],
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("times", [1, 2])
def test_every_head_sees_what_its_plan_lets_it_see(name, times):
    parts = MIXES[name]()
    counts = [p.extent()[1] * times for p in parts]
    batch = max(p.extent()[0] for p in parts)
    own = [heads_of(p, n).expand(batch, -1, -1, -1) for p, n in zip(parts, counts, strict=True)]
    want = torch.cat(own, 1)
    plan = Plan.by_head(parts, None if times == 1 else counts).check()
    found = plan.to_dense()
    assert torch.equal(found.repeat_interleave(want.shape[1] // found.shape[1], 1).expand_as(want), want)
    assert torch.equal(Plan.by_head([plan], [plan.extent()[1]]).to_dense(), found)


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_side_by_side(seed):
    kinds, g = tuple(plans.KINDS), drawn(seed)
    parts = []
    while len(parts) < 3:
        kind = kinds[int(torch.randint(len(kinds), (), generator=g))]
        one = plans.example(seed + len(parts), kind, batch=2, heads=2, Tq=70, Tk=90)
        if not one.pool and (one.plan.Tq, one.plan.Tk) == (70, 90):
            parts.append(one)
    joined = Plan.by_head([x.plan for x in parts], [2, 2, 2]).check()
    own = [x.mask.repeat_interleave(2 // x.mask.shape[1], 1).expand(2, -1, -1, -1) for x in parts]
    want = torch.cat(own, 1)
    found = joined.to_dense().repeat_interleave(6 // joined.extent()[1], 1).expand_as(want)
    assert torch.equal(found, want), [x.line for x in parts]


@MAIN
@pytest.mark.parametrize("name", MIXES)
def test_results_and_gradients_are_exact(name, backend, dtype, generator):
    parts = MIXES[name]()
    plan = Plan.by_head(parts, [2] * len(parts))
    q, k, v, dout, dlse = inputs(generator, T, H=2 * len(parts), Hkv=len(parts), D=16, dtype=dtype)
    seen = torch.cat([heads_of(p, 2).expand(2, -1, -1, -1) for p in parts], 1)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    tolerance.compare(got, q, k, v, seen, dout=dout, dlse=dlse)


def test_heads_by_number():
    near, far, two = causal(window=(9, 0)), Plan.dense(T, T), buckets(0)
    found = Plan.by_head([near, two, far], heads=[[1, 4], [0, 3], [2]]).check().to_dense()
    close, whole, own = near.to_dense()[:, 0], far.to_dense()[:, 0], two.to_dense()
    for h, want in enumerate((own[:, 0], close, whole, own[:, 1], close)):
        assert torch.equal(found[:, h], want.expand(2, -1, -1)), h


def test_positions_of_heads_that_differ_are_whole_and_equal_offsets_stay():
    one = Plan.by_head([causal(q_offset=-7), causal()])
    assert one.q_offset == 0 and one.q_pos[0, :, 0].tolist() == [-7, 0]
    same = Plan.by_head([causal(q_offset=3), causal(q_offset=3, window=(9, 0))])
    assert same.q_offset == 3 and same.q_pos is None


def test_lists_of_a_capacity_stay_so():
    """Then nothing has to be looked at on an accelerator: not where they lie, nor to transpose them."""
    parts = [causal(window=(9, 0)), buckets(0)]
    plan = Plan.by_head(parts, [2, 2])
    assert plan.span_room == max(p.span_room for p in parts)
    mixed = Plan.by_head(parts, [[0, 2], [1, 3]])
    assert mixed.span_room == plan.span_room
    assert torch.equal(mixed.prepare().to_dense()[:, [0, 2, 1, 3]], plan.to_dense())


def test_keys_in_order_are_shared_as_widely_as_before():
    """Sorted keys of a KV head serve its group: an order for each query head would sort K once for each."""
    plan = Plan.by_head([buckets(0), causal()], [4, 2])
    assert plan.k_order.shape[1] == 3 and plan.extent()[1] == 6


@pytest.mark.parametrize(
    ("given", "heads", "said"),
    [
        ([], None, "at least one"),
        ([Plan.dense(4, 4), 3], None, "list of plans"),
        ([Plan.dense(4, 4), Plan.dense(4, 5)], None, "one size"),
        ([Plan.dense(4, 4)], [1, 2], "1 plans, heads for 2"),
        ([Plan.dense(4, 4)], [0], "multiple"),
        ([mask(0)], [3], "multiple"),
        ([Plan.dense(4, 4)], [[1]], "once"),
        ([Plan.dense(4, 4), Plan.dense(4, 4)], [[0], 1], "alone"),
    ],
    ids=str,
)
def test_what_does_not_fit_has_its_message(given, heads, said):
    with pytest.raises(PlanError, match=said):
        Plan.by_head(given, heads)
