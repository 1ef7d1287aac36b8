"""Rules put on lists, windows that count members, lists put together, several plans as one."""

from __future__ import annotations

import itertools
import pickle
from functools import partial

import pytest
import torch

import sparseflash as sf
import tolerance
from harness import EACH, inputs, run, unseen
from sparseflash import Plan, PlanError, Plans

T = 60
AT = torch.arange(T)


def listed(generator) -> dict[str, Plan]:
    """Plans whose lists have what rules may take from them: full ranges, full units, bits, orders."""
    keep = torch.rand(2, 2, 4, 8, generator=generator) < 0.6
    mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    mask[..., 40:48], mask[..., ::3, 50:52] = False, False
    bucket = torch.randint(0, 3, (1, 2, T), generator=generator)
    blocks = Plan.from_blocks(keep, Tq=T, Tk=T, tile=16, unit=8)
    return {
        "blocks": blocks,
        "bits beside ranges": Plan.from_mask(mask, tile=16, unit=8),
        "bits beside units": blocks & Plan.from_mask(mask, tile=16, unit=8),
        "dense": Plan.dense(T, T),
        "window": Plan.dense(T, T, causal=True, window=(20, 0)),
        "buckets": Plan.from_buckets(bucket, bucket, causal=False),
    }


RULES = {
    "causal": {"causal": True},
    "window and sink": {"causal": True, "window": (7, 0), "sink": 2},
    "later": {"causal": True, "q_offset": 5},
    "later on a device": {"causal": True, "q_offset": torch.tensor([3])},
    "expiry": {"k_end": (AT * 7 % 50)[None, None].int()},
    "segments": {"q_seg": (AT // 20)[None, None].int(), "k_seg": (AT // 20)[None, None].int()},
    "not itself": {"include_self": False},
    "windows of heads": {"window": (torch.tensor([3, 9]), 0)},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_put_on_a_plan_is_tested_where_entries_were_full(rule, generator):
    ruling = Plan.dense(T, T)
    ruling = ruling._changed(span_full=ruling.span_full * 0)  # nothing is full: every rule is tested
    for name, plan in listed(generator).items():
        bare = {"causal": False, "window": None}
        lists = plan._changed(**bare).to_dense() if name == "window" else plan.to_dense()
        own = {"causal": plan.causal, "window": plan.window}
        want = lists & ruling.with_rules(**own | RULES[rule]).to_dense()
        ruled = plan.with_rules(**RULES[rule]).check()
        assert torch.equal(*torch.broadcast_tensors(ruled.to_dense(), want)), name
        with unseen():
            there = plan.with_rules(**RULES[rule])
        assert torch.equal(*torch.broadcast_tensors(there.check().to_dense(), want)), name


@EACH
def test_attention_under_added_rules_skips_no_test(backend, generator):
    q, k, v, dout, _ = inputs(generator, T, T, B=2, H=2, Hkv=2)
    for name, plan in listed(generator).items():
        ruled = plan.with_rules(**RULES["window and sink"])
        got = run(q, k, v, ruled, backend=backend, dout=dout)
        tolerance.compare(got, q, k, v, ruled.to_dense(), dout=dout, note=name)


def test_what_is_no_rule_is_refused():
    with pytest.raises(PlanError, match="no rule 'tile'"):
        Plan.dense(4, 4).with_rules(tile=2)
    with pytest.raises(PlanError, match="give window= too"):
        Plan.dense(4, 4, window=(torch.tensor([1]), 0)).with_rules(sink=2)


# ---------------------------------------------------------------- windows that count members


def members(see, position, window, *, causal, include_self):
    """Which of the keys see [Tq,Tk] a window of members shows: the nearest that is not later is the first."""
    out = torch.zeros_like(see)
    for i, at in enumerate(position):
        keys = see[i].nonzero().flatten().tolist()
        behind = [j for j in keys if (j <= at if include_self else j < at)]
        place = len(behind) - int(include_self)
        for rank, j in enumerate(keys):
            left, right = (torch.inf if side is None else side for side in window)
            out[i, j] = (not causal or j in behind) and -right <= place - rank <= left
    return out


@pytest.mark.parametrize(("causal", "include_self"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("window", [(2, 0), (0, 0), (3, None), (None, 1), (4, 2)], ids=str)
def test_a_window_counts_members_of_a_bucket_and_kept_keys(causal, include_self, window, generator):
    for Tq, Tk, offset in ((40, 40, 0), (20, 50, torch.tensor([25, 31])), (1, 5, 3), (0, 5, 0), (5, 0, 0)):
        given = {"causal": causal, "include_self": include_self, "window": window, "tile": 16, "unit": 16}
        q_bucket = torch.randint(0, 4, (2, 1, Tq), generator=generator)
        k_bucket = torch.randint(0, 4, (1, 2, Tk), generator=generator)
        q_keep, k_keep = q_bucket > 0, k_bucket > 0

        buckets = partial(Plan.from_buckets, q_bucket, k_bucket, q_offset=offset, **given)
        made = {"buckets": buckets().check(), "kept": Plan.from_keep(q_keep, k_keep, **given).check()}
        for (name, plan), b, h in itertools.product(made.items(), range(2), range(2)):
            first = int(torch.as_tensor(offset).reshape(-1).expand(2)[b]) if name == "buckets" else 0
            see = q_bucket[b, 0][:, None] == k_bucket[0, h]
            see = see if name == "buckets" else q_keep[b, 0][:, None] & k_keep[0, h]
            want = members(see, range(first, first + Tq), window, causal=causal, include_self=include_self)
            assert torch.equal(plan.to_dense().expand(2, 2, Tq, Tk)[b, h], want), (name, Tq, Tk)
        with unseen():
            there = buckets(buckets=4)
        assert torch.equal(there.check().to_dense(), made["buckets"].to_dense())


def test_a_window_of_members_visits_no_other(generator):
    bucket = torch.randint(0, 4, (1, 1, 4096), generator=generator)
    assert Plan.from_buckets(bucket, bucket, window=(31, 0), tile=64).work < 0.03
    with pytest.raises(PlanError, match="counts members"):
        Plan.from_buckets(bucket, bucket, window=(3, 3), causal=False, include_self=False)


# ---------------------------------------------------------------- ranges beside gathered keys, several plans


def test_ranges_and_gathered_keys_are_one_plan(generator):
    spans = torch.tensor([[0, 5], [20, 33]]).expand(2, 1, 4, 2, 2)
    index = torch.randint(33, T, (1, 2, 4, 7), generator=generator)
    frame = {"Tq": T, "Tk": T, "tile": 16, "causal": True, "q_offset": torch.tensor([3, 8])}
    parts = Plan.from_spans(spans, **frame), Plan.from_keys(index, **frame)
    want = parts[0].to_dense() | parts[1].to_dense()
    for plan in (
        Plan.from_lists(spans=spans, index=index, **frame),
        Plan.from_lists(spans=parts[0], index=index),
        Plan.from_lists(spans=spans, index=parts[1], disjoint=True),
        Plan.from_lists(spans=parts[0], index=parts[1]),
    ):
        assert torch.equal(plan.check().to_dense(), want)
    with pytest.raises(PlanError, match="in spans and in index"):
        Plan.from_lists(spans=spans, index=index * 0 + 4, **frame)
    with pytest.raises(PlanError, match="one rule"):
        Plan.from_lists(spans=parts[0], index=Plan.from_keys(index, Tq=T, Tk=T, tile=16))


def test_a_union_of_several_plans_has_what_a_plan_has(generator, tmp_path):
    bucket = torch.randint(0, 6, (1, 2, T), generator=generator)
    near = Plan.dense(T, T, causal=True, window=(5, 0))
    both = Plan.from_buckets(bucket, bucket) | near
    want = Plan.from_buckets(bucket, bucket).to_dense() | near.to_dense()
    assert isinstance(both, Plans) and isinstance(both, tuple) and (both.Tq, both.Tk) == (T, T)
    assert torch.equal(both.check().to_dense(), want)
    assert both.density == pytest.approx(float(want.sum()) / (2 * T * (T + 1) / 2))
    assert both.work == pytest.approx(sum(one.work for one in both))
    assert "kept" in str(both) and both.kept == both.density and both.explain().count("queries x") == 2
    assert both.plot(tmp_path / "both.svg").stat().st_size > 1000
    other = Plan.dense(T, T, causal=True, window=(20, 0))
    for made, mask in (
        (both & other, want & other.to_dense()),
        (both - other, want & ~other.to_dense()),
        (both | other, want | other.to_dense()),
        (both | near, want),
        (both.retile(16, 16), want),
        (both.prepare().to("cpu"), want),
        (pickle.loads(pickle.dumps(both)), want),
    ):
        assert isinstance(made, Plans)
        assert torch.equal(made.check().to_dense(), mask)
    q, k, v, _, _ = inputs(generator, T, T, H=2, Hkv=2)
    assert torch.equal(sf.attention(q, k, v, both), sf.attention(q, k, v, tuple(both)))


def test_plans_that_are_no_softmax_are_refused():
    with pytest.raises(PlanError, match="not one softmax"):
        Plans([Plan.dense(4, 4), Plan.dense(4, 5)])
    with pytest.raises(PlanError, match="one plan at least"):
        Plans([])
    with pytest.raises(PlanError, match="share 10 pairs"):
        Plans([Plan.dense(4, 4, causal=True)] * 2).check()
