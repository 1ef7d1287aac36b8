"""Attention over rounded numbers, against its formula; what rounding costs."""

import itertools

import pytest
import torch

import sparseflash as sf
from sparseflash.ops.quantised import rounded


def levels(x, bits, group, channels=False):
    """Each group of rows rounded by itself."""
    top, parts = 2 ** (bits - 1) - 1, []
    for part in x.split(group, 2):
        size = part.abs().amax((2,) if channels else (2, 3), keepdim=True) / top
        parts.append((part / size).round() * size)
    return torch.cat(parts, 2)


@pytest.mark.parametrize(("qk_bits", "pv_bits"), [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("centred", [False, True])
def test_it_is_the_softmax_of_rounded_numbers(qk_bits, pv_bits, centred, generator):
    q = torch.randn(2, 4, 90, 40, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 90, 40, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 4, 90, 90, generator=generator) < 0.3
    mask[:, :, 7] = False
    got = sf.attention_quantised(
        q, k, v, sf.Plan.from_mask(mask), qk_bits=qk_bits, pv_bits=pv_bits, centred=centred
    )
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    k = k - k.mean(2, keepdim=True) if centred else k
    score = levels(q, qk_bits, 32) @ levels(k, qk_bits, 64).mT * 40**-0.5
    score = score.masked_fill(~mask, -torch.inf)
    weight = (score - score.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    top = 2 ** (pv_bits - 1) - 1
    weight = (weight * top).round()
    want = (weight @ levels(v, pv_bits, 64, True)) / weight.sum(-1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(got, want)
    assert not got[:, :, 7].any()


def test_eight_bits_of_normal_numbers_are_off_by_two_in_a_hundred_and_four_by_more(generator):
    q, k, v = torch.randn(3, 1, 2, 512, 64, generator=generator)
    plan = sf.Plan.dense(512, 512)
    truth = sf.attention(q, k, v, plan)

    def off(**options):
        return float((sf.attention_quantised(q, k, v, plan, **options) - truth).norm() / truth.norm())

    assert off() < 0.03 < off(qk_bits=4) < 0.5
    k = k + 9 * torch.randn(1, 1, 1, 64, generator=generator)  # a mean that no row tells apart
    truth = sf.attention(q, k, v, plan)
    assert off() < 0.5 * off(centred=False)


def test_one_loud_key_spoils_its_own_group_alone(generator):
    k = torch.randn(1, 1, 128, 16, generator=generator)
    k[:, :, 5] *= 1000
    error = (rounded(k, 8, 64, None) - k).abs().amax((0, 1, 3))
    assert float(error[64:].max()) < 0.05 < float(error[:64].max())


def test_in_an_order_where_neighbours_are_alike_rounding_costs_less(generator):
    """Loud places of every frame: in raster order each group has one, by place few groups do."""
    grid, loud = (16, 8, 8), torch.ones(8 * 8)
    loud[torch.randperm(64, generator=generator)[:8]] = 40
    v = torch.randn(1, 1, 1024, 32, generator=generator) * loud.repeat(16)[:, None]
    quiet = loud.repeat(16) == 1

    def off(axes):
        order = sf.selection.grid_order(grid, axes=axes)
        return float((rounded(v, 4, 16, order, channels=True) - v)[:, :, quiet].abs().mean())

    found = {axes: off(axes) for axes in itertools.permutations(range(3))}
    assert min(found, key=found.get)[-1] == 0 and min(found.values()) < 0.5 * found[0, 1, 2]


def test_what_it_cannot_do_is_refused():
    x = torch.zeros(1, 1, 8, 16)
    plan = sf.Plan.dense(8, 8)
    for change, said in (
        ({"qk_bits": 3}, "qk_bits=3: expected 8 or 4"),
        ({"k_group": 0}, "k_group=0: expected rows >= 1"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            sf.attention_quantised(x, x, x, plan, **change)
    with pytest.raises(sf.SparseFlashError, match="expected one Plan"):
        sf.attention_quantised(x, x, x, (plan, plan))
    for T in (0, 1):
        x = torch.zeros(2, 1, T, 16)
        assert sf.attention_quantised(x, x, x, sf.Plan.dense(T, T)).shape == x.shape
