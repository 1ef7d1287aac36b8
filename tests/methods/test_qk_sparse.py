"""QK-sparse attention against dense masked softmax in fp64, where it is easy to be wrong."""

import pytest
import torch

import sparseflash as sf
from harness import EACH
from selected import Selected, tensors
from sparseflash.methods.qk_sparse import random_keep

SELECTED = Selected(sf.qk_sparse_attention, sees=lambda a, b: a & b)


@EACH
@pytest.mark.parametrize("T", [1, 63, 129, 300])
@pytest.mark.parametrize("include_self", [True, False])
def test_random_masks_of_any_length(T, include_self, backend, generator):
    q_keep, k_keep = torch.rand(2, 2, 4, T, generator=generator) > 0.4
    SELECTED.check(tensors(generator, T), q_keep, k_keep, include_self, backend=backend)


@EACH
@pytest.mark.parametrize(("Tq", "Tk"), [(40, 200), (200, 40), (1, 130), (130, 1)])
def test_queries_and_keys_of_different_lengths(Tq, Tk, backend, generator):
    q_keep = torch.rand(2, 4, Tq, generator=generator) > 0.3
    k_keep = torch.rand(2, 4, Tk, generator=generator) > 0.3
    SELECTED.check(tensors(generator, Tq, Tk), q_keep, k_keep, backend=backend)


@EACH
@pytest.mark.parametrize(("q_heads", "k_heads"), [(4, 2), (1, 1), (2, 4), (4, 1)])
def test_masks_per_query_head_per_kv_head_or_shared(q_heads, k_heads, backend, generator):
    q_keep = torch.rand(1, q_heads, 150, generator=generator) > 0.3
    k_keep = torch.rand(2, k_heads, 150, generator=generator) > 0.3
    SELECTED.check(tensors(generator, 150, Hkv=2), q_keep, k_keep, backend=backend)


@EACH
def test_counts_that_differ_from_head_to_head_and_one_head_dropped(backend, generator):
    rate = torch.tensor([0.0, 0.02, 0.5, 1.0])[:, None]
    q_keep = torch.rand(2, 4, 300, generator=generator) < rate
    k_keep = torch.rand(2, 4, 300, generator=generator) < rate.flip(0)
    q_keep[0, 1], k_keep[1, 2] = False, False
    got = SELECTED.check(tensors(generator, 300), q_keep, k_keep, backend=backend)
    assert got["out"][:, 0].abs().max() == 0 and got["dq"][:, 0].abs().max() == 0


@EACH
@pytest.mark.parametrize("what", ["queries", "keys", "both", "later"])
def test_where_nothing_is_seen_all_is_zero(what, backend, generator):
    q_keep, k_keep = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    if what in ("queries", "both"):
        q_keep = ~q_keep
    if what in ("keys", "both"):
        k_keep = ~k_keep
    if what == "later":  # every kept key comes after every kept query
        q_keep, k_keep = torch.arange(150)[None, None] < 70, torch.arange(150)[None, None] >= 70
    got = SELECTED.run(*tensors(generator, 150), q_keep, k_keep, backend=backend)
    assert torch.equal(got.pop("lse"), torch.full((2, 4, 150), float("-inf")))
    assert all(x.abs().max() == 0 for x in got.values())


@EACH
def test_a_dropped_key_may_hold_anything(backend, generator):
    q, k, v, dout = tensors(generator, 200, Hkv=2)
    q_keep = torch.rand(2, 4, 200, generator=generator) > 0.3
    k_keep = torch.rand(2, 2, 200, generator=generator) > 0.5
    clean = SELECTED.run(q, k, v, dout, q_keep, k_keep, backend=backend)
    for poison in (float("nan"), float("inf")):
        k2, v2 = (torch.where(k_keep[..., None], x, poison) for x in (k, v))
        q2, dout2 = (torch.where(q_keep[..., None], x, poison) for x in (q, dout))
        dirty = SELECTED.run(q2, k2, v2, dout2, q_keep, k_keep, backend=backend)
        assert all(torch.equal(clean[n], dirty[n]) for n in clean)


@EACH
def test_heads_and_batch_slots_commute(backend, generator):
    q, k, v, dout = tensors(generator, 200)
    q_keep, k_keep = torch.rand(2, 2, 4, 200, generator=generator) > 0.4
    plain = SELECTED.run(q, k, v, dout, q_keep, k_keep, backend=backend)
    heads, slots = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0])
    moved = SELECTED.run(*(x[slots][:, heads] for x in (q, k, v, dout, q_keep, k_keep)), backend=backend)
    for name, x in plain.items():
        torch.testing.assert_close(moved[name], x[slots][:, heads])


@EACH
def test_scale_and_kept_everything_is_causal(backend, generator):
    keep = torch.ones(1, 1, 200, dtype=torch.uint8)
    SELECTED.check(tensors(generator, 200), keep, keep, scale=0.5, backend=backend)


def test_the_mask_dtypes_and_shapes_that_are_refused(generator):
    q, k, v, _ = tensors(generator, 20)
    keep = torch.ones(2, 4, 20, dtype=torch.bool)
    attend = sf.qk_sparse_attention
    with pytest.raises(sf.PlanError, match=r"q_keep has dtype torch.float32: expected bool.*q_keep > 0"):
        attend(q, k, v, keep.float(), keep)
    with pytest.raises(sf.PlanError, match="k_keep has dtype torch.int64"):
        attend(q, k, v, keep, keep.long())
    with pytest.raises(sf.PlanError, match=r"k_keep: \[2, 4, 19\]; expected \[2\|1, H\|1, 20\]"):
        attend(q, k, v, keep, keep[..., :19])
    with pytest.raises(sf.PlanError, match=r"q_keep: \[2, 3, 20\]; .* divisor of the 4 query heads"):
        attend(q, k, v, keep[:, :3], keep)
    with pytest.raises(sf.PlanError, match="q_keep: NoneType"):
        attend(q, k, v, None, keep)
    with pytest.raises(sf.SparseFlashError, match="scale=nan"):
        attend(q, k, v, keep, keep, scale=float("nan"))


# ---------------------------------------------------------------- the method


def test_random_masks_have_the_rate_and_are_independent():
    keep = random_keep(2, 4, 20_000, 0.3, seed=3).float()
    assert keep.shape == (2, 4, 20_000)
    assert (keep.mean(-1) - 0.7).abs().max() < 4 * (0.21 / 20_000) ** 0.5
    flat = keep.view(8, -1) - 0.7
    other = random_keep(2, 4, 20_000, 0.3, seed=3, step=1).float().view(8, -1) - 0.7
    stream = random_keep(2, 4, 20_000, 0.3, seed=3, stream=1).float().view(8, -1) - 0.7
    shifted = flat.roll(1, -1)
    bound = 5 * 0.21 / 20_000**0.5
    for a, b in ((flat, flat), (flat, other), (flat, stream), (flat, shifted)):
        product = a @ b.T / 20_000
        assert (product - torch.diag(product.diag()) * (a is b)).abs().max() < bound


def test_random_masks_are_bits_of_a_counter():
    """Integers only: the same on every machine, and a longer sequence extends a shorter one."""
    bits = random_keep(1, 1, 32, 0.5, seed=0)[0, 0].int().tolist()
    assert sum(b << i for i, b in enumerate(bits)) == 2149095843
    long = random_keep(3, 5, 700, 0.25, seed=2**40 + 1, step=9)
    assert torch.equal(long[:2, :4, :100], random_keep(2, 4, 100, 0.25, seed=2**40 + 1, step=9))
    assert not random_keep(1, 2, 500, 1.0, seed=1).any() and random_keep(1, 2, 500, 0.0, seed=1).all()


def test_the_method_takes_masks_steps_and_either_side_alone(generator):
    q, k, v, _ = tensors(generator, 200, Hkv=2)
    method = sf.methods.QKSparse(q_drop=0.2, k_drop=0.6, seed=4)
    q_keep, k_keep = method.keep(q, k)
    assert q_keep.shape == (2, 4, 200) and k_keep.shape == (2, 2, 200)
    assert torch.equal(method(q, k, v), sf.qk_sparse_attention(q, k, v, q_keep, k_keep))
    given = torch.rand(1, 1, 200, generator=generator) > 0.5
    only_keys = method(q, k, v, ctx={"k_keep": given})
    assert torch.equal(only_keys, sf.qk_sparse_attention(q, k, v, q_keep, given))
    one, two = (method(q, k, v, ctx={"step": n}) for n in (1, 2))
    assert not torch.equal(one, two) and torch.equal(one, method(q, k, v, ctx={"step": 1}))
    with pytest.raises(sf.PlanError, match="k_keep"):
        method(q, k, v, ctx={"k_keep": given.float()})


def test_work_is_that_of_what_is_kept(generator):
    keep = torch.rand(2, 1, 2, 4096, generator=generator) > 0.5
    plan = sf.Plan.from_keep(*keep)
    causal = sf.Plan.dense(4096, 4096, causal=True)
    assert plan.density == pytest.approx(0.25, rel=0.05)
    assert plan.work < 0.27 * causal.work + 0.02
