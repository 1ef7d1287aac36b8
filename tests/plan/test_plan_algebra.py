"""Set algebra on plans: exact over all kinds, orders, tiles, units, bits and rules; refusals; retile."""

from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import plans
import tolerance
from harness import EACH, inputs, run
from sparseflash import Plan, PlanError
from sparseflash.plan import algebra

SEED = st.integers(0, 2**32 - 1)
KIND = st.sampled_from(sorted(set(plans.KINDS) - {"documents"}))
LENGTH = st.sampled_from([0, 1, 9, 33, 64])


def _pair(seed, kinds, Tq, Tk):
    """Two plans over the same tokens, everything else their own, and their masks in one extent."""
    examples = [plans.example(seed + n, kind, batch=2, heads=4, Tq=Tq, Tk=Tk) for n, kind in enumerate(kinds)]
    masks = [x.mask for x in examples]
    heads = math.lcm(*(x.shape[1] for x in masks))
    masks = [plans._spread(x, heads) for x in masks]
    return [x.plan for x in examples], torch.broadcast_tensors(*masks), [x.line for x in examples]


def _dense(plan, heads):
    mask = plan.check().to_dense()
    return plans._spread(mask, heads)


def _equal(plan, mask, note):
    heads = math.lcm(mask.shape[1], plan.extent()[1])
    assert torch.equal(*torch.broadcast_tensors(_dense(plan, heads), plans._spread(mask, heads))), note


@settings(max_examples=40)
@given(seed=SEED, kinds=st.tuples(KIND, KIND), Tq=LENGTH, Tk=LENGTH)
def test_and_minus_or_are_those_of_the_masks(seed, kinds, Tq, Tk):
    (a, b), (x, y), note = _pair(seed, kinds, Tq, Tk)
    _equal(a & b, x & y, note)
    _equal(b & a, x & y, note)
    _equal(a - b, x & ~y, note)
    union = a | b
    parts = union if isinstance(union, tuple) else (union,)
    heads = math.lcm(*(p.extent()[1] for p in parts), x.shape[1])
    total = sum(_dense(p, heads).int() for p in parts)
    assert int(total.max() if total.numel() else 0) <= 1, f"parts overlap: {note}"
    assert torch.equal(*torch.broadcast_tensors(total > 0, plans._spread(x | y, heads))), note


@settings(max_examples=30)
@given(seed=SEED, causal=st.tuples(st.booleans(), st.booleans()), T=LENGTH, heads=st.sampled_from([1, 2]))
def test_units_of_one_grid(seed, causal, T, heads):
    """The short way: lists are joined entry by entry, rules by rules, and no bit is written."""
    generator = torch.Generator().manual_seed(seed)
    R, C = -(-T // 8), -(-T // 16)
    blocks = torch.rand(2, 1, heads, R, C, generator=generator) < 0.5
    options = {"Tq": T, "Tk": T, "tile": 8, "unit": 16}
    a, b = (Plan.from_blocks(x, causal=c, **options) for x, c in zip(blocks, causal))
    x, y = a.to_dense(), b.to_dense()
    _equal(a & b, x & y, "&")
    _equal(a - b, x & ~y, "-")
    assert (a & b).bits is None and (causal[0] != causal[1] or (a - b).bits is None)
    union = a | b
    parts = union if isinstance(union, tuple) else (union,)
    assert torch.equal(sum(_dense(p, heads).int() for p in parts), (x | y).int())


@settings(max_examples=20)
@given(seed=SEED, kind=KIND, Tq=LENGTH, Tk=LENGTH)
def test_a_plan_with_itself(seed, kind, Tq, Tk):
    example = plans.example(seed, kind, batch=2, heads=4, Tq=Tq, Tk=Tk)
    plan = example.plan
    _equal(plan & plan, example.mask, example.line)
    assert isinstance(plan | plan, Plan)
    assert not (plan - plan).check().to_dense().any()
    everything = Plan.dense(Tq, Tk)
    _equal(plan & everything, example.mask, example.line)
    _equal(everything - plan, ~example.mask, example.line)


@settings(max_examples=30)
@given(
    seed=SEED,
    kind=KIND,
    Tq=LENGTH,
    Tk=LENGTH,
    grids=st.lists(
        st.tuples(st.sampled_from([1, 3, 16, 48, 128]), st.sampled_from([1, 5, 16, 64, 128])),
        min_size=1,
        max_size=2,
    ),
)
def test_another_grid_is_the_same_set_there_and_back(seed, kind, Tq, Tk, grids):
    example = plans.example(seed, kind, batch=2, heads=4, Tq=Tq, Tk=Tk)
    plan = example.plan
    for tile, unit in [*grids, (plan.tile, plan.unit)]:
        plan = plan.retile(tile, unit)
        assert (plan.tile, plan.unit) == (tile, unit)
        _equal(plan, example.mask, f"{example.line} {grids}")


@EACH
@pytest.mark.parametrize(
    "kinds", [("buckets", "window"), ("blocks", "heads"), ("lists", "keep"), ("mask", "spans")]
)
def test_attention_over_a_union_is_attention_over_the_union_of_the_masks(backend, kinds, seed):
    (a, b), (x, y), note = _pair(seed, kinds, 64, 64)
    q, k, v, dout, dlse = inputs(torch.Generator().manual_seed(seed), 64)
    for plan, mask in ((a | b, x | y), (a & b, x & y), (a - b, x & ~y)):
        got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse)
        tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse, note=str(note))


def test_a_plan_that_is_only_rules_hands_them_over_and_needs_no_bits():
    bucket = torch.randint(0, 4, (1, 2, 300))
    hashed, window = Plan.from_buckets(bucket, bucket), Plan.dense(300, 300, causal=True, window=(40, 0))
    heads = Plan.dense(300, 300, window=(torch.tensor([20, 90]), 3))
    blocks = Plan.from_blocks(torch.rand(1, 2, 3, 3) < 0.5, Tq=300, Tk=300)
    for a in (hashed, blocks):
        for b in (window, heads):
            both = a & b
            assert both.bits is None and both.check().unit == a.unit
            _equal(both, *torch.broadcast_tensors(a.to_dense() & b.to_dense())[:1], "")
    holes = Plan.from_blocks(torch.eye(3, dtype=torch.bool)[None, None], Tq=300, Tk=300, causal=True)
    assert (hashed & holes).bits is not None  # lists that hide something are no rules


@pytest.mark.parametrize("n", [8, 9])
def test_ranges_stay_ranges_where_a_tile_has_few(n):
    """Each range of one plan meets each of the other: up to 64 pairs a tile, beyond which there are bits."""
    few, many = (torch.arange(m)[:, None] * 8 + torch.tensor([1, 6]) for m in (8, n))
    a, b = (Plan.from_spans(x.expand(1, 1, 3, -1, 2), Tq=48, Tk=96, tile=16) for x in (few, many + 1))
    both = a & b
    _equal(both, a.to_dense() & b.to_dense(), "")
    assert (both.bits is None) == (n == 8)


def test_what_is_made_of_a_plan_that_lacks_entries_says_so():
    index = torch.tensor([0, 1, 2]).view(1, 1, 1, 3)
    whole, lossy = (Plan.from_keys(index, Tq=4, Tk=12, tile=4, unit=4, capacity=n) for n in (3, 2))
    assert int(whole.overflow) == 0
    for made in (lossy, whole & lossy, lossy & whole, whole - lossy, Plan.by_head([lossy, whole])):
        with pytest.raises(PlanError, match="static capacity overflowed: .* raise the capacity"):
            made.check()
    Plan.by_head([whole, whole & whole]).check()
    with pytest.raises(PlanError, match=r"overflow \[2\]: expected one number"):
        dataclasses.replace(whole, overflow=torch.zeros(2, dtype=torch.int32))


def test_windows_of_heads_do_not_get_lost_where_two_meet():
    a = Plan.dense(32, 32, window=(torch.tensor([3, 9]), 2))
    b = Plan.dense(32, 32, window=(torch.tensor([5, 1]), 0))
    c = Plan.dense(32, 32, causal=True, window=(4, 0), sink_tokens=2)
    for x in (a, b, c):
        for y in (a, b, c):
            _equal(x & y, *torch.broadcast_tensors(x.to_dense() & y.to_dense())[:1], "")


@settings(max_examples=30)
@given(seed=SEED, kind=st.sampled_from(["window", "sink", "offset", "heads", "dense", "spans"]))
def test_pairs_counted_in_closed_form_are_those_of_the_mask(seed, kind):
    example = plans.example(seed, kind, batch=2, heads=4)
    from sparseflash.plan.figures import by_position, visible_pairs

    batch, heads = example.plan.extent()
    mask = plans._spread(example.mask, math.lcm(heads, example.mask.shape[1]))
    assert by_position(example.plan)
    share = math.lcm(heads, example.mask.shape[1]) // heads
    assert visible_pairs(example.plan) * share == int(mask.expand(batch, -1, -1, -1).sum())


def test_what_only_a_huge_bitmap_could_say_is_refused(monkeypatch):
    mask = torch.rand(1, 1, 256, 256) < 0.5
    a, b = Plan.from_mask(mask), Plan.from_mask(mask.roll(1, -1))
    monkeypatch.setattr(algebra, "LIMIT", 10_000)
    for make in (lambda: a & b, lambda: a - b, lambda: a | b, lambda: a.retile(64, 16)):
        with pytest.raises(PlanError, match=r"needs .* GiB of bits.*limit.*: use a tuple of disjoint plans"):
            make()
    window = Plan.dense(1 << 16, 1 << 16, causal=True, window=(99, 0))
    assert (window & Plan.dense(1 << 16, 1 << 16, causal=True)).bits is None  # rules need no bitmap


def test_what_does_not_combine_is_refused():
    plan = Plan.dense(8, 8)
    for make, said in (
        (lambda: plan & Plan.dense(8, 9), "8 x 8 and 8 x 9 tokens"),
        (lambda: plan - (plan, plan), "a tuple of plans: combine the plans of a tuple one by one"),
        (lambda: plan | torch.ones(8, 8), "not with a Tensor"),
        (lambda: plan.retile(0), "tile=0: expected a positive int"),
        (lambda: plan.retile(16, 1.5), "unit=1.5: expected a positive int"),
        (lambda: plan.retile(True), "tile=True"),
    ):
        with pytest.raises(PlanError, match=said):
            make()
    two, three = (Plan.dense(8, 8, causal=True, q_offset=torch.zeros(n, dtype=torch.int32)) for n in (2, 3))
    with pytest.raises(PlanError, match="batch size 2 and 3 do not combine"):
        two & three


def test_an_explanation_names_rows_tiles_density_work_and_memory():
    text = Plan.dense(300, 300, causal=True, window=(99, 0)).explain()
    for word in ("300 queries x 300 keys", "tiles", "entries", "density 1.0000", "work", "memory"):
        assert word in text
