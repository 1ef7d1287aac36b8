"""A plan for some queries and some keys: the mask, sliced; and no more is visited than its share."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import plans
from sparseflash import Plan, PlanError, Plans
from sparseflash.plan.figures import visible_pairs, visited_area

SEED = st.integers(0, 2**32 - 1)
WAYS = ("all", "none", "run", "run of tiles", "striped", "some", "shuffled")


def tokens(way: str, T: int, generator: torch.Generator) -> torch.Tensor | None:
    """Some of T tokens."""
    if way == "all":
        return None
    if way == "none":
        return torch.zeros(0, dtype=torch.int64)
    if way in ("run", "run of tiles"):
        lo, hi = sorted(torch.randint(T + 1, (2,), generator=generator).tolist())
        lo, hi = (lo // 32 * 32, hi // 32 * 32) if way == "run of tiles" else (lo, hi)
        return torch.arange(lo, hi)
    if way == "striped":
        return torch.arange(T)[torch.arange(T) // 16 % 3 == 1]
    kept = (torch.rand(T, generator=generator) < 0.4).nonzero()[:, 0]
    return kept if way == "some" else kept[torch.randperm(len(kept), generator=generator)]


def sliced(mask, q, k):
    """The mask of what stays."""
    mask = mask if q is None else mask[..., q, :]
    return mask if k is None else mask[..., k]


@pytest.mark.parametrize("kind", sorted(plans.KINDS))
@settings(max_examples=8)
@given(seed=SEED, ways=st.tuples(st.sampled_from(WAYS), st.sampled_from(WAYS)))
def test_a_part_is_the_mask_of_the_part(kind, seed, ways):
    example = plans.example(seed, kind, batch=2, heads=4)
    plan, generator = example.plan, torch.Generator().manual_seed(seed)
    q, k = (tokens(way, T, generator) for way, T in zip(ways, (plan.Tq, plan.Tk)))
    part = plan.restrict(q, k).check()
    want = sliced(example.mask, q, k)
    heads = max(want.shape[1], part.extent()[1])
    got = plans._spread(part.to_dense(), heads)
    assert torch.equal(*torch.broadcast_tensors(got, plans._spread(want, heads))), (example.line, ways)


@pytest.mark.parametrize("left", [3, 4, 5])
def test_tiles_are_not_joined_over_a_key_that_only_the_first_lists(left):
    """Key 1 lies 4 before query 5, whose tile does not list it: the window alone may hide it or not."""
    spans = torch.tensor([[[[[0, 2]], [[4, 8]]]]])
    plan = Plan.from_spans(spans, Tq=8, Tk=8, tile=4, causal=True).with_rules(window=(left, 0))
    some = torch.tensor([1, 5])
    part = plan.restrict(some).check()
    assert torch.equal(part.to_dense(), plan.to_dense()[..., some, :])
    assert part.tiles == (1 if left < 4 else 2)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("hash", "contiguous"),
        ("hash", "zigzag"),
        ("hash", "striped"),
        ("kept", "zigzag"),
        ("kept", "striped"),
        ("causal", "striped"),
        ("window", "zigzag"),
        ("blocks", "striped"),
    ],
)
def test_the_parts_visit_no_more_than_their_share(kind, way, generator):
    """What four ranks visit together, over what one visits; and their pairs are the plan's."""
    T, world = 8192, 4
    bucket = torch.randint(8, (1, 2, T), generator=generator)
    keep = torch.rand(1, 2, T, generator=generator) < 0.5
    blocks = torch.rand(1, 2, T // 128, T // 128, generator=generator) < 0.25
    plan = {
        "hash": lambda: Plan.from_buckets(bucket, bucket),
        "kept": lambda: Plan.from_keep(keep, keep),
        "causal": lambda: Plan.dense(T, T, causal=True),
        "window": lambda: Plan.dense(T, T, causal=True, window=(511, 0), sink_tokens=4),
        "blocks": lambda: Plan.from_blocks(blocks, Tq=T, Tk=T, causal=True),
    }[kind]()
    block = torch.arange(T) // 128
    chunk = torch.arange(T) // (T // (2 * world))
    owner = {
        "contiguous": torch.arange(T) // (T // world),
        "zigzag": torch.minimum(chunk, 2 * world - 1 - chunk),
        "striped": block % world,
    }[way]
    ranks = [(owner == r).nonzero()[:, 0] for r in range(world)]
    parts = [plan.restrict(q).restrict(None, k) for q in ranks for k in ranks]
    assert sum(visited_area(part) for part in parts) <= 1.3 * visited_area(plan)
    assert sum(visible_pairs(part) for part in parts) == visible_pairs(plan)
    if kind == "blocks":
        assert all(part.spans is None for part in parts)  # units stay units


def test_several_plans_are_restricted_one_by_one(generator):
    near = Plan.dense(300, 300, causal=True, window=(15, 0))
    bucket = torch.randint(4, (1, 2, 300), generator=generator)
    both = Plan.from_buckets(bucket, bucket) | near
    assert isinstance(both, Plans)
    q, k = torch.arange(37, 290), torch.arange(0, 300, 2)
    assert torch.equal(both.restrict(q, k).check().to_dense(), sliced(both.to_dense(), q, k))


def test_what_is_no_choice_of_tokens_is_refused():
    plan = Plan.dense(8, 8)
    for given_, said in (
        (torch.tensor([0, 8]), "q_tokens holds 0..8: expected tokens 0..7"),
        (torch.tensor([1, 1]), "q_tokens names a token twice"),
        (torch.tensor([0.5]), "expected integers"),
        ([1, 2], "q_tokens: list; expected integers"),
    ):
        with pytest.raises(PlanError, match=said):
            plan.restrict(given_)
