"""Star Attention and MTraining within one process, by their papers' own words."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from sparseflash import SparseFlashError


def grid(Tq, Tk, offset=0):
    return torch.meshgrid(torch.arange(Tq) + offset, torch.arange(Tk), indexing="ij")


@pytest.mark.parametrize(("T", "block", "anchor"), [(129, 32, 16), (300, 70, None), (64, 200, 3), (1, 1, 0)])
@pytest.mark.parametrize("offset", [0, 77])
def test_star_is_its_mask(T, block, anchor, offset):
    """Own block so far, and the anchor; the last queries everything."""
    q, k = torch.zeros(1, 2, T, 8), torch.zeros(1, 1, T + offset, 8)
    plan = sf.methods.StarAttention(block, anchor, last=5).select(q, k, {"q_offset": offset}).plan.check()
    i, j = grid(T, T + offset, offset)
    near = (i // block == j // block) | (j < (block if anchor is None else anchor))
    assert torch.equal(plan.to_dense()[0, 0], (i >= j) & (near | (i >= T + offset - 5)))
    assert plan.bits is None and plan.index is None


def test_star_visits_its_share():
    q = torch.zeros(1, 1, 8192, 8)
    plan = sf.methods.StarAttention(block=1024, last=64).select(q, q).plan
    dense = sf.Plan.dense(8192, 8192, causal=True)
    assert plan.work / dense.work < 1.1 * (8 * 0.5 + 7 + 8192 * 64 / 1024**2) / 32


def test_a_layer_at_a_time_is_block_after_block():
    """The anchor in front of each block has the states of the first block: two layers, with RoPE."""
    torch.manual_seed(0)
    T, block, anchor, width = 48, 12, 8, 16
    weights = torch.randn(2, 4, width, width, dtype=torch.float64) / 4
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 0.3 ** torch.arange(width // 2)

    def rotate(x, at):
        a, b = x.chunk(2, -1)
        cos, sin = angle[at].cos(), angle[at].sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def model(x, at, mask):
        for to_q, to_k, to_v, to_out in weights:
            q, k, v = rotate(x @ to_q, at), rotate(x @ to_k, at), x @ to_v
            weight = (q @ k.T / 4).masked_fill(~mask, -torch.inf).softmax(-1)
            x = x + torch.tanh(weight @ v @ to_out)
        return x

    x = torch.randn(T, width, dtype=torch.float64)
    q = torch.zeros(1, 1, T, 8)
    mask = sf.methods.StarAttention(block, anchor, last=0).select(q, q).plan.to_dense()[0, 0]
    whole = model(x, torch.arange(T), mask)
    for first in range(block, T, block):
        at = torch.cat([torch.arange(anchor), torch.arange(first, first + block)])
        alone = model(x[at], at, torch.ones(len(at), len(at), dtype=torch.bool).tril())
        torch.testing.assert_close(alone[anchor:], whole[first : first + block], atol=1e-12, rtol=0)


def test_star_refuses_an_anchor_beyond_the_first_block():
    with pytest.raises(SparseFlashError, match="anchor=9 of blocks of 8: .*expected at most that"):
        sf.methods.StarAttention(block=8, anchor=9)
    with pytest.raises(SparseFlashError, match="block=0: expected"):
        sf.methods.StarAttention(block=0)


@pytest.mark.parametrize(("T", "size"), [(256, 16), (250, 16), (129, 32), (16, 16)])
def test_mtraining_is_the_rule_of_its_last_row(T, size, generator):
    """Block b of the last row is on iff some offset meets it; others see it shifted; bars elsewhere."""
    method = sf.methods.MTraining(vertical=6, slash=4, granularity=size, last=16, sinks=2, near=2)
    columns, far = (torch.rand(1, 2, T, generator=generator) for _ in range(2))
    mask = method.plan(columns, far, T).check().to_dense()
    blocks = -(-T // size)
    N = blocks * size
    for h in range(2):
        columns[0, h, :2] = far[0, h, :2] = torch.inf
        bars, offsets = columns[0, h].topk(6).indices, far[0, h].topk(4).indices
        b = torch.arange(blocks)[:, None]
        low, high = ((N - n - offsets).div(size, rounding_mode="floor") for n in (size, 1))
        last = ((low <= b) & (b <= high)).any(-1)
        last[-1] = True
        row = torch.arange(blocks)
        at = row[None] + (blocks - 1 - row)[:, None]
        on = (at < blocks) & last[at.clamp(max=blocks - 1)]
        i, j = grid(T, T)
        want = on[i // size, j // size] | torch.isin(j, bars)
        assert torch.equal(mask[0, h], want & (i >= j))


def test_mtraining_keeps_a_share_of_the_mass(generator):
    columns = torch.tensor([0.5, 0.3, 0.1, 0.1] + [0.0] * 124).expand(1, 1, 128)
    far = torch.zeros(1, 1, 128)
    far[..., 64], far[..., 32] = 0.9, 0.1
    some, all_ = (
        sf.methods.MTraining(9, 9, mass=mass, granularity=16, sinks=0, near=0).plan(columns, far, 128)
        for mass in (0.85, 1.0)
    )
    assert some.kept < all_.kept
    assert bool(some.to_dense()[0, 0, 127, 63]) and not bool(some.to_dense()[0, 0, 127, 95])


def test_mtraining_begins_where_blocks_do():
    q, k = torch.zeros(1, 1, 20, 8), torch.zeros(1, 1, 40, 8)
    with pytest.raises(SparseFlashError, match="q_offset=20: expected a multiple of the granularity, 128"):
        sf.methods.MTraining().select(q, k, {"q_offset": 20})
