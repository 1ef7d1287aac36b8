"""FlexAttention's `BlockMask` both ways, and attention equal to `flex_attention`."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import plans
import sparseflash as sf
from sparseflash import Plan, PlanError

KINDS = ("dense", "window", "sink", "offset", "mask", "blocks", "spans", "heads")


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_set(kind, block, seed):
    for n in range(3):
        example = plans.example(seed + n, kind, batch=2, heads=4, Tq=100, Tk=(100, 129, 33)[n])
        back = Plan.from_block_mask(example.plan.to_block_mask(block)).check()
        assert (back.tile, back.unit) == (block, block)
        assert torch.equal(back.to_dense(), example.plan.to_dense()), example.line


@pytest.mark.parametrize("name", ["some blocks", "whole blocks too"])
def test_its_mask_function_is_right_at_every_pair_also_where_no_block_is_listed(name, generator):
    """Uncompiled FlexAttention evaluates all of them."""
    mask = torch.rand(1, 2, 96, 96, generator=generator) < 0.5
    mask &= (torch.arange(96)[:, None] // 16 + torch.arange(96) // 16) % 3 == 0
    if name == "whole blocks too":
        mask[:, :, :32, 64:] = True
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in (1, 2, 96, 96)), indexing="ij")
    assert torch.equal(Plan.from_mask(mask).to_block_mask(16).mask_mod(b, h, q, k), mask)


def _causal(b, h, q, k):
    return q >= k


def _document(b, h, q, k):
    return (q // 50 == k // 50) & (q >= k)


def _by_head(b, h, q, k):
    return (q - k).abs() < 10 * (h + 1)


def _by_batch(b, h, q, k):
    return (q >= k) & (k >= 20 * b)


MASKS = (_causal, _document, _by_head, _by_batch)


@pytest.mark.parametrize("T", [128, 200])
@pytest.mark.parametrize("mask_mod", MASKS)
def test_a_block_mask_becomes_the_plan_of_its_mask_function(mask_mod, T):
    block_mask = create_block_mask(mask_mod, 2, 4, T, T, device="cpu", BLOCK_SIZE=64)
    plan = Plan.from_block_mask(block_mask).check()
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in (2, 4, T, T)), indexing="ij")
    assert torch.equal(plan.to_dense().expand(2, 4, T, T), mask_mod(b, h, q, k))


@pytest.mark.parametrize("mask_mod", MASKS[:3])
def test_attention_equals_flex_attention_from_either_side(mask_mod, generator):
    q, k, v = (torch.randn(2, 4, 128, 16, generator=generator) for _ in range(3))
    block_mask = create_block_mask(mask_mod, None, 4, 128, 128, device="cpu", BLOCK_SIZE=64)
    plan = Plan.from_block_mask(block_mask)
    want = flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(sf.attention(q, k, v, plan), want, atol=2e-6, rtol=2e-5)
    again = flex_attention(q, k, v, block_mask=plan.to_block_mask(64))
    torch.testing.assert_close(again, want, atol=2e-6, rtol=2e-5)


def test_what_has_no_block_mask_is_refused():
    bucket = torch.zeros(1, 1, 32, dtype=torch.int64)
    with pytest.raises(PlanError, match="no row orders.*gather q, k and v"):
        Plan.from_buckets(bucket, bucket).to_block_mask()
    with pytest.raises(PlanError, match="block_mask is a Tensor: expected a BlockMask"):
        Plan.from_block_mask(torch.ones(2, 2))
    with pytest.raises(PlanError, match="tile=0"):
        Plan.dense(8, 8).to_block_mask(0)
