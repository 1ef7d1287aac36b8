"""Pools of keys shared by a batch, and rules that differ from head to head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import EACH, EVERY, inputs, run
from sparseflash import Plan, PlanError


@EVERY
def test_a_paged_cache_is_a_plan(backend, dtype, seed):
    """Random pages, a shared prefix, free slots that hold NaN: out, lse and all gradients."""
    for n in range(4):
        d = plans._Draw(seed + n)
        example = plans.example(
            seed + n, "pool", batch=3, heads=4, Tq=d.pick((1, 4, 33)), Tk=d.pick((1, 100, 257))
        )
        q, k, v, dout, dlse = inputs(
            d.torch, example.plan.Tq, example.plan.Tk, B=3, Hkv=d.pick((1, 2, 4)), dtype=dtype
        )
        k, v = k[:1].clone(), v[:1].clone()
        free = ~example.mask.any(0).any(0).any(0)
        poisoned = [x.masked_fill(free[:, None], torch.nan) for x in (k, v)]
        got = run(q, *poisoned, example.plan, backend=backend, dout=dout, dlse=dlse)
        assert got["dk"].shape == k.shape and got["dv"].shape == v.shape
        tolerance.compare(got, q, k, v, example.mask, dout=dout, dlse=dlse, note=example.line)


@EACH
def test_a_pool_gives_what_each_sequence_gives_alone(backend, seed, generator):
    example = plans.example(seed, "pool", batch=3, heads=4, Tq=9, Tk=200, tile=5, unit=16)
    q, k, v, dout, dlse = inputs(generator, 9, 200, B=3)
    k, v = k[:1], v[:1]
    together = run(q, k, v, example.plan, backend=backend, dout=dout, dlse=dlse)
    shared = torch.zeros_like(k), torch.zeros_like(v)
    for b in range(3):
        one = slice(b, b + 1)
        plan = Plan.from_mask(example.mask[one], tile=5, unit=16)
        alone = run(q[one], k, v, plan, backend=backend, dout=dout[one], dlse=dlse[one])
        for name in ("out", "lse", "dq"):
            torch.testing.assert_close(together[name][one], alone[name], atol=1e-5, rtol=1e-4)
        for total, name in zip(shared, ("dk", "dv")):
            total += alone[name]
    for total, name in zip(shared, ("dk", "dv")):
        torch.testing.assert_close(together[name], total, atol=1e-5, rtol=1e-4)


@EACH
def test_a_pool_may_stand_in_a_tuple_with_another_plan(backend, generator):
    """A shared prefix for all sequences, and what each of them has of its own, in one softmax."""
    q, k, v, dout, dlse = inputs(generator, 4, 96, B=2)
    k, v = k[:1], v[:1]
    prefix = Plan.from_spans(torch.tensor([[[[[0, 32]]]]]), Tq=4, Tk=96)
    own = Plan.from_keys(torch.tensor([[[[2, 3]]], [[[4, 5]]]]), Tq=4, Tk=96, tile=128, unit=16)
    mask = torch.zeros(2, 1, 4, 96, dtype=torch.bool)
    mask[..., :32] = mask[0, ..., 32:64] = mask[1, ..., 64:] = True
    got = run(q, k, v, (prefix, own), backend=backend, dout=dout, dlse=dlse)
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


@EACH
def test_the_offset_of_a_static_cache_is_a_tensor_that_may_change(backend, generator):
    q, k, v, _, _ = inputs(generator, 1, 64, B=2)
    offset = torch.tensor([3, 40], dtype=torch.int32)
    plan = replace(
        Plan.dense(1, 64), causal=True, q_offset=offset, span_full=torch.zeros(1, 1, 1, dtype=torch.int32)
    )
    for step in range(3):
        got = run(q, k, v, plan, backend=backend)
        mask = torch.arange(64) <= (torch.tensor([3, 40]) + step).view(2, 1, 1, 1)
        tolerance.compare(got, q, k, v, mask)
        offset += 1


@EVERY
def test_every_head_has_a_window_and_a_sink_of_its_own(backend, dtype, generator):
    window, sink = torch.tensor([0, 7, 33, -1]), torch.tensor([0, 2])
    plan = Plan.dense(129, 129, causal=True, window=(window, 0), sink_tokens=sink, tile=32)
    each = [
        Plan.dense(129, 129, causal=True, window=(int(w), 0), sink_tokens=s, tile=32).to_dense()
        for w, s in zip(window.tolist(), (0, 0, 2, 2))
    ]
    mask = torch.cat(each, 1)
    assert torch.equal(plan.check().to_dense(), mask) and plan.density == 1.0
    q, k, v, dout, dlse = inputs(generator, 129, dtype=dtype)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


@pytest.mark.parametrize(
    "window, sink, said",
    [
        ((torch.ones(2, 2, dtype=torch.int32), 0), 0, "expected integers .H."),
        ((torch.ones(2), 0), 0, "expected integers .H."),
        ((torch.ones(0, dtype=torch.int32), 0), 0, "expected integers .H."),
        ((torch.ones(2, dtype=torch.int32), 0.5), 0, "expected a count"),
        ((torch.ones(2, dtype=torch.int32), -3), 0, "expected a count"),
        ((torch.ones(2, dtype=torch.int32), 0), 1.5, "expected a"),
        ((torch.ones(2, dtype=torch.int32),), 0, "expected .left, right."),
        (torch.ones(2, dtype=torch.int32), 0, "expected .left, right."),
    ],
    ids=str,
)
def test_rules_per_head_that_make_no_sense_are_refused(window, sink, said):
    with pytest.raises(PlanError, match=said):
        Plan.dense(8, 8, window=window, sink_tokens=sink)


def test_rules_for_more_heads_than_there_are_queries_for_are_refused(generator):
    q, k, v, _, _ = inputs(generator, 8)
    plan = Plan.dense(8, 8, window=(torch.tensor([1, 2, 3]), 0))
    with pytest.raises(PlanError, match="head"):
        sf.attention(q, k, v, plan)


def test_a_pool_of_another_batch_size_is_refused(generator):
    q, k, v, _, _ = inputs(generator, 8, B=3)
    with pytest.raises(sf.SparseFlashError, match="or 1 .a pool."):
        sf.attention(q, k[:2], v[:2])
    with pytest.raises(sf.SparseFlashError, match="or 1 .a pool."):
        sf.attention(q, k[:1], v)
