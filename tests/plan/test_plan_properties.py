"""Thousands of small plans against boolean masks worked out by formulas of their own."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import plans
from sparseflash import Plan

SIZE = st.integers(0, 24)
TILE = st.sampled_from([1, 2, 3, 5, 8, 16, 128])
UNIT = st.sampled_from([1, 2, 4, 16, 64, 128])
SIDE = st.one_of(st.none(), st.integers(0, 26))
WINDOW = st.one_of(st.none(), st.tuples(SIDE, SIDE))
SEED = st.integers(0, 2**32 - 1)
MANY = settings(max_examples=120)


def _whole(mask, plan):
    """The mask in the plan's own extent."""
    batch, heads = plan.extent()
    return mask[:, torch.arange(heads) * mask.shape[1] // heads].expand(batch, -1, -1, -1)


def _holds(plan, mask):
    """The plan means the mask, its lists are sound, and its own figures agree with it."""
    assert torch.equal(plan.check().to_dense(), _whole(mask, plan))
    assert plan.work >= 0
    if plan.Tq * plan.Tk:
        batch, heads = plan.extent()
        assert plan.work >= float(_whole(mask, plan).sum()) / (plan.Tq * plan.Tk * batch * heads) - 1e-9
    ready = plan.prepare()
    for keys, lists in ((ready.span_keys, plan.span_count), (ready.unit_keys, plan.count)):
        if keys is not None:
            assert int(keys.count.sum()) == len(keys.index) and bool((keys.full <= keys.count).all())
            assert len(keys.index) >= int((lists > 0).sum()) - plan.tiles * lists.shape[0] * lists.shape[1]


@MANY
@given(
    Tq=SIZE,
    Tk=SIZE,
    tile=TILE,
    causal=st.booleans(),
    window=WINDOW,
    sink=st.integers(0, 9),
    offset=st.integers(-26, 26),
    as_tensor=st.booleans(),
)
def test_dense_plans_are_their_rules(Tq, Tk, tile, causal, window, sink, offset, as_tensor):
    shift = torch.tensor([offset, offset + 3]) if as_tensor else offset
    plan = Plan.dense(Tq, Tk, causal=causal, window=window, sink_tokens=sink, q_offset=shift, tile=tile)
    q = torch.arange(Tq)[:, None] + torch.as_tensor(shift).reshape(-1, 1, 1, 1)
    _holds(plan, plans.rules(q, torch.arange(Tk)[None], causal=causal, window=window, sink=sink))
    assert plan.density == 1.0


def _coins(seed, p, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


@MANY
@given(
    Tq=SIZE,
    Tk=SIZE,
    tile=TILE,
    causal=st.booleans(),
    self_too=st.booleans(),
    seed=SEED,
    p=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    axes=st.sampled_from([(1, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 4), (3, 4, 2)]),
)
def test_kept_tokens_see_kept_tokens(Tq, Tk, tile, causal, self_too, seed, p, axes):
    batch, a, b = axes
    q, k = _coins(seed, p, batch, a, Tq), _coins(seed + 1, p, 1, b, Tk)
    plan = Plan.from_keep(q, k, causal=causal, include_self=self_too, tile=tile)
    heads = max(a, b)
    both = plans._spread(q, heads)[..., :, None] & plans._spread(k, heads)[..., None, :]
    positions = torch.arange(Tq)[:, None], torch.arange(Tk)[None]
    _holds(plan, both & plans.rules(*positions, causal=causal, include_self=self_too))


@MANY
@given(
    Tq=SIZE,
    Tk=SIZE,
    tile=TILE,
    causal=st.booleans(),
    self_too=st.booleans(),
    seed=SEED,
    low=st.sampled_from([-(2**63), -(2**31), -2, 0, 2**31 - 1, 2**62]),
    n=st.integers(1, 9),
    axes=st.sampled_from([(1, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 4), (3, 4, 2)]),
    far=st.booleans(),
)
def test_queries_see_the_keys_of_their_bucket(Tq, Tk, tile, causal, self_too, seed, low, n, axes, far):
    batch, a, b = axes
    generator = torch.Generator().manual_seed(seed)
    ids = low + torch.arange(n)
    if far and low < 0:
        ids[-1] = 2**63 - 1
    q, k = (ids[torch.randint(0, n, shape, generator=generator)] for shape in ((batch, a, Tq), (1, b, Tk)))
    plan = Plan.from_buckets(q, k, causal=causal, include_self=self_too, tile=tile)
    heads = max(a, b)
    same = plans._spread(q, heads)[..., :, None] == plans._spread(k, heads)[..., None, :]
    positions = torch.arange(Tq)[:, None], torch.arange(Tk)[None]
    _holds(plan, same & plans.rules(*positions, causal=causal, include_self=self_too))


@MANY
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=7),
    alike=st.booleans(),
    spare=st.integers(0, 3),
    tile=TILE,
    causal=st.booleans(),
    itself=st.booleans(),
    window=WINDOW,
)
def test_documents_see_themselves(lengths, alike, spare, tile, causal, itself, window):
    itself = itself or not causal
    q, k = ([sum(pair[i] for pair in lengths[:n]) for n in range(len(lengths) + 1)] for i in (0, not alike))
    rules = {"causal": causal, "include_self": itself, "window": window}
    given_k = None if alike else torch.tensor(k)
    plan = Plan.from_documents(
        torch.tensor(q), given_k, Tq=q[-1] + spare, Tk=k[-1] + spare, tile=tile, **rules
    )
    mask = plans.documents(q, k, **rules)
    _holds(plan, torch.nn.functional.pad(mask, (0, spare, 0, spare))[None, None])


@MANY
@given(
    Tq=SIZE,
    Tk=st.integers(0, 150),
    tile=TILE,
    unit=UNIT,
    seed=SEED,
    p=st.sampled_from([0.0, 0.03, 0.5, 0.99, 1.0]),
    axes=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3)]),
)
def test_masks_come_back_as_they_were(Tq, Tk, tile, unit, seed, p, axes):
    mask = _coins(seed, p, *axes, Tq, Tk)
    _holds(Plan.from_mask(mask, tile=tile, unit=unit), mask)


@settings(max_examples=200)
@given(
    seed=SEED,
    Tq=st.integers(0, 20),
    Tk=st.integers(0, 40),
    tile=TILE,
    unit=st.sampled_from([1, 3, 16, 33, 64]),
    batch=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 4, 6]),
)
def test_lists_made_by_hand_mean_what_the_definition_says(seed, Tq, Tk, tile, unit, batch, heads):
    example = plans.example(seed, "lists", batch=batch, heads=heads, Tq=Tq, Tk=Tk, tile=tile, unit=unit)
    _holds(example.plan, example.mask)


@MANY
@given(seed=SEED, kind=st.sampled_from(sorted(plans.KINDS)), data=st.data())
def test_a_pair_looked_up_alone_is_as_visible_as_in_the_mask(seed, kind, data):
    from sparseflash.plan.lookup import Lookup

    plan = plans.example(seed, kind, batch=2, heads=4, Tq=data.draw(SIZE), Tk=data.draw(SIZE)).plan
    batch, heads = plan.extent()
    b, h = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, heads - 1))
    q, k = (
        torch.tensor(data.draw(st.lists(st.integers(0, T - 1)) if T else st.just([])), dtype=torch.int64)
        for T in (plan.Tq, plan.Tk)
    )
    seen = Lookup(plan, plan.extent()[1])(torch.tensor(b), torch.tensor(h), q[:, None], k)
    assert torch.equal(seen, plan.to_dense()[b, h][q][:, k])


@pytest.mark.slow
@settings(max_examples=3000)
@given(seed=SEED, kind=st.sampled_from(sorted(plans.KINDS)))
def test_large_plans_of_every_kind_mean_their_masks(seed, kind):
    example = plans.example(seed, kind, batch=2, heads=4)
    _holds(example.plan, example.mask)
