"""Recall: the attention mass that a plan keeps, against the weights themselves."""

from __future__ import annotations

import pytest
import torch

import plans
import sparseflash as sf
from harness import EACH, inputs
from sparseflash import Plan, SparseFlashError


@EACH
@pytest.mark.parametrize("seed", range(6))
def test_recall_is_the_share_of_the_weights_that_are_visible(backend, seed, generator):
    kind = ("window", "blocks", "mask", "buckets", "slashes", "offset")[seed]
    example = plans.example(seed, kind, batch=2, heads=4, Tq=63, Tk=129)
    q, k, _, _, _ = inputs(generator, 63, 129, B=2, H=4, Hkv=2)
    bias = torch.randn(1, 4, 129, generator=generator)
    plan, at = example.plan, torch.arange(63)[:, None]
    dense = torch.ones(1, 1, 63, 129, dtype=torch.bool)
    if plan.causal:
        dense = at + torch.as_tensor(plan.q_offset).reshape(-1, 1, 1, 1) >= torch.arange(129)
    logits = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT
    logits = 5 * torch.tanh(logits / 5) + bias.double()[..., None, :]
    weights = torch.where(dense, logits, -torch.inf).softmax(-1)
    mask = plans._spread(plan.to_dense(), 4)
    want = torch.where(dense.any(-1), torch.where(mask, weights, 0).sum(-1), 1.0)
    got = sf.recall(q, k, plan, scale=0.3, softcap=5.0, key_bias=bias, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_recall_of_several_plans_is_that_of_their_union(generator):
    q, k, _, _, _ = inputs(generator, 60, 60, H=2, Hkv=2)
    bucket = torch.randint(0, 4, (1, 2, 60), generator=generator)
    both = Plan.from_buckets(bucket, bucket) | Plan.dense(60, 60, causal=True, window=(5, 0))
    assert isinstance(both, sf.Plans)
    torch.testing.assert_close(
        sf.recall(q, k, both),
        sf.recall(q, k, Plan.from_mask(both.to_dense()), dense=Plan.dense(60, 60, causal=True)),
    )
    assert torch.equal(sf.recall(q, k, Plan.dense(60, 60, causal=True)), torch.ones(q.shape[:3]))


def test_recall_of_positions_of_ones_own_needs_to_know_what_is_dense(generator):
    q, k, _, _, _ = inputs(generator, 20, 20, H=2, Hkv=2)
    bucket = torch.zeros(1, 1, 20, dtype=torch.int64)
    plan = Plan.from_buckets(bucket, bucket, window=(3, 0))
    with pytest.raises(SparseFlashError, match="positions of its own: say what to compare with"):
        sf.recall(q, k, plan)
    found = sf.recall(q, k, plan, dense=Plan.dense(20, 20, causal=True))
    want = sf.recall(q, k, Plan.dense(20, 20, causal=True, window=(3, 0)))
    torch.testing.assert_close(found, want)
