"""Biases for pairs: ALiBi by the positions of a plan, a matrix, and one of low rank."""

from __future__ import annotations

import math

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, MAIN, inputs, randn, run
from sparseflash import Plan
from test_dropout import left

MATRIX = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
"""Backends that take pair_bias."""


def alibi(slopes, q_pos, k_pos):
    """-slope * |distance|, [B|1,H,Tq,Tk]."""
    far = (q_pos[..., :, None] - k_pos[..., None, :]).abs()
    return -slopes.double().view(-1, slopes.shape[-1], 1, 1) * far


def standing(plan):
    """Positions of the queries and of the keys of 4 heads."""
    at = torch.arange(plan.Tq) + torch.as_tensor(plan.q_offset).view(-1, 1, 1)
    at = at if plan.q_pos is None else plans._spread(plan.q_pos, 4)
    key = torch.arange(plan.Tk) if plan.k_pos is None else plans._spread(plan.k_pos, 4)
    return at.long(), key.long()


@MAIN
@pytest.mark.parametrize("kind", plans.KINDS)
def test_random_plans_under_alibi_are_exact_forward_and_backward(backend, dtype, kind, seed):
    d = plans._Draw(seed)
    example = plans.example(seed % 1_000_000, kind, batch=2, heads=4, Tq=d.pick((1, 33, 129)))
    plan = example.plan
    q, k, v, dout, dlse = inputs(d.torch, plan.Tq, plan.Tk, D=16, Dv=d.pick((16, 40)), dtype=dtype)
    slopes = torch.rand(d.pick(((4,), (2, 4))), generator=d.torch)
    options = {"softcap": 5.0} if d.chance(0.3) else {}
    options |= {"key_bias": randn(d.torch, 1, 2, plan.Tk)} if d.chance(0.5) else {}
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, alibi_slopes=slopes, **options)
    options["pair_bias"] = alibi(slopes, *standing(plan))
    tolerance.compare(got, q, k, v, example.mask, dout=dout, dlse=dlse, note=example.line, **options)


@EACH
def test_alibi_is_a_bias_of_keys_where_causal_and_has_two_sides_where_not(backend, generator):
    q, k, v, dout, _ = inputs(generator, 70, 100)
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    at = torch.arange(70)[None] + 30
    for causal in (True, False):
        plan = Plan.dense(70, 100, causal=causal, q_offset=30)
        got = run(q, k, v, plan, backend=backend, dout=dout, alibi_slopes=slopes)
        pair = alibi(slopes, at, torch.arange(100)[None])
        tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout, pair_bias=pair)
        if causal:
            bias = slopes[:, None] * torch.arange(100)
            like = run(q, k, v, plan, backend=backend, dout=dout, key_bias=bias[None])
            torch.testing.assert_close(got["out"], like["out"], atol=1e-4, rtol=1e-4)


@EACH
def test_alibi_is_exact_far_from_the_first_token(backend, generator):
    q, k, v, dout, _ = inputs(generator, 40)
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.1])
    far = 2**31 - 50
    plan = Plan.dense(40, 40, q_offset=far)
    plan = plan._changed(k_pos=(torch.arange(40) + far).int()[None, None])
    near = run(q, k, v, Plan.dense(40, 40), backend=backend, dout=dout, alibi_slopes=slopes)
    got = run(q, k, v, plan, backend=backend, dout=dout, alibi_slopes=slopes)
    for name, x in near.items():
        torch.testing.assert_close(got[name], x, atol=1e-5, rtol=1e-5)


@MATRIX
@pytest.mark.parametrize("kind", plans.KINDS)
def test_random_plans_under_a_matrix_are_exact_forward_and_backward(backend, kind, seed):
    d = plans._Draw(seed)
    example = plans.example(seed % 1_000_000, kind, batch=2, heads=4, Tq=d.pick((1, 33, 129)))
    Tq, Tk = example.plan.Tq, example.plan.Tk
    dtype = d.pick((torch.float32, torch.bfloat16) if backend == "cpu" else (torch.float32,))
    q, k, v, dout, dlse = inputs(d.torch, Tq, Tk, D=16, Dv=40, dtype=dtype)
    shape = (d.pick((1, 2)), d.pick((1, 4)), d.pick((1, Tq)), Tk)
    pair = (randn(d.torch, *shape) * 2).to(d.pick((torch.float32, torch.bfloat16, torch.float16)))
    pair = pair.mT.contiguous().mT if d.chance(0.3) else pair
    options = {"key_bias": randn(d.torch, 1, 2, Tk)} if d.chance(0.5) else {}
    options |= {"sink_logits": randn(d.torch, 4)} if d.chance(0.5) else {}
    options |= {"dropout_p": 0.3, "dropout_seed": 5} if d.chance(0.3) else {}
    options["pair_bias"] = pair
    got = run(q, k, v, example.plan, backend=backend, dout=dout, dlse=dlse, **options)
    if options.pop("dropout_seed", 0):
        options["factor"] = left(options.pop("dropout_p"), 5, 2, 4, Tq, Tk).double() / 0.7
    tolerance.compare(got, q, k, v, example.mask, dout=dout, dlse=dlse, note=example.line, **options)


@pytest.mark.parametrize(
    "backend, kind",
    [("cpu", x) for x in plans.KINDS if "cpu" in BACKENDS]
    + [("reference", x) for x in list(plans.KINDS)[::4]],
)
def test_a_bias_by_distance_is_its_matrix_and_its_gradient_that_of_diagonals(backend, kind, seed):
    d = plans._Draw(seed)
    lengths = (1, 7, 33, 129) if backend == "cpu" else (1, 33)
    example = plans.example(seed % 1_000_000, kind, batch=2, heads=4, Tq=d.pick(lengths))
    plan, Tq, Tk = example.plan, example.plan.Tq, example.plan.Tk
    dtype = d.pick((torch.float32, torch.bfloat16) if backend == "cpu" else (torch.float32,))
    q, k, v, dout, dlse = inputs(d.torch, Tq, Tk, D=16, Dv=40, dtype=dtype)
    bias = (randn(d.torch, d.pick((1, 2)), d.pick((1, 4)), Tq + Tk - 1) * 2).to(
        d.pick((torch.float32, torch.float16))
    )
    bias = bias.mT.contiguous().mT if d.chance(0.3) else bias
    options = {"key_bias": randn(d.torch, 1, 2, Tk)} if d.chance(0.5) else {}
    options |= {"dropout_p": 0.3, "dropout_seed": 5} if d.chance(0.3) else {}
    place = torch.arange(Tk) - torch.arange(Tq)[:, None] + Tq - 1
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, pair_bias=bias, **options)
    like = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, pair_bias=bias[..., place], **options)
    given = got.pop("dpair"), like.pop("dpair").double().sum_to_size(*bias.shape[:2], Tq, Tk)
    assert all(torch.equal(got[name], like[name]) for name in got), example.line
    sums = torch.zeros(bias.shape, dtype=torch.float64)
    sums.index_add_(2, place.flatten(), given[1].flatten(2))
    scale = torch.zeros_like(sums).index_add_(2, place.flatten(), given[1].flatten(2) ** 2).sqrt()
    few = torch.finfo(torch.bfloat16 if bias.dtype != torch.float32 or dtype != torch.float32 else dtype).eps
    assert bool(((given[0] - sums).abs() <= 4 * few * (scale + sums.abs()) + 1e-5).all()), example.line


@MATRIX
@pytest.mark.parametrize("Tq, Tk", [(1, 50), (63, 63), (129, 70)])
def test_a_table_of_buckets_learns_what_a_dense_one_would(backend, Tq, Tk, generator):
    """T5, in fp64: causal and not, over several plans, in sequences longer than the largest distance."""
    q, k, v, dout, dlse = inputs(generator, Tq, Tk, dtype=torch.float32)
    for causal in (False, True):
        how = {"buckets": 16, "max_distance": 40, "causal": causal, "q_offset": 3}
        table = randn(generator, 4, 16).requires_grad_()
        near = Plan.dense(Tq, Tk, causal=causal, q_offset=3, window=(20, 0 if causal else 20))
        for plan in (Plan.dense(Tq, Tk, causal=causal, q_offset=3), (near, Plan.dense(Tq, Tk) - near)):
            bias = table[None, :, sf.t5_buckets(Tq, Tk, **how)]
            out, lse = sf.attention(q, k, v, plan, pair_bias=bias, return_lse=True, backend=backend)
            [got] = torch.autograd.grad((out, lse), table, (dout, dlse))
            wide = table.detach().double().requires_grad_()
            at = torch.arange(Tk) - torch.arange(Tq)[:, None] + Tq - 1
            matrix = wide[None, :, sf.t5_buckets(Tq, Tk, **how)[at]]
            mask = sum(p.to_dense().int() for p in (plan if isinstance(plan, tuple) else (plan,))).bool()
            want, norm = tolerance.softmax_attention(*(x.double() for x in (q, k, v)), mask, pair_bias=matrix)
            [exact] = torch.autograd.grad((want, norm), wide, (dout.double(), dlse.double()))
            torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=1e-4)


def test_buckets_are_those_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    for Tq, Tk, start, causal, n, far in (
        (300, 300, 0, False, 32, 128),
        (1, 400, 399, True, 32, 128),
        (9, 90, 7, True, 10, 20),
    ):
        gap = torch.arange(Tk) - (torch.arange(Tq)[:, None] + start)
        want = t5.T5Attention._relative_position_bucket(gap, not causal, n, far)
        got = sf.t5_buckets(Tq, Tk, q_offset=start, buckets=n, max_distance=far, causal=causal)
        at = torch.arange(Tk) - torch.arange(Tq)[:, None] + Tq - 1
        assert torch.equal(got[at], want)
    for wrong in (
        {"buckets": 3},
        {"buckets": 1, "causal": True},
        {"max_distance": 8},
        {"q_offset": 0.5},
        {"buckets": "x"},
    ):
        with pytest.raises(sf.SparseFlashError, match="expected"):
            sf.t5_buckets(4, 4, **wrong)
    with pytest.raises(sf.SparseFlashError, match=r"by distance .*Tq\+Tk-1=7"):
        sf.attention(*torch.zeros(3, 1, 1, 4, 8), pair_bias=torch.zeros(1, 1, 8))


@EACH
def test_packed_documents_have_distances_of_their_own(backend, generator):
    q, k, v, _, _ = (x[0].transpose(0, 1) for x in inputs(generator, 60))
    slopes, cu = torch.tensor([0.5, 0.25, 0.125, 1.0]), torch.tensor([0, 25, 60])
    for causal in (True, False):
        how = {"causal": causal, "alibi_slopes": slopes, "backend": backend}
        out = sf.attention_varlen(q, k, v, cu, **how)
        for a, b in ((0, 25), (25, 60)):
            one = sf.attention(*(x[None, a:b].transpose(1, 2) for x in (q, k, v)), **how)
            torch.testing.assert_close(out[a:b], one[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
        shorter = torch.tensor([0, 5, 30])  # the last queries of each document
        out = sf.attention_varlen(torch.cat([q[20:25], q[35:]]), k, v, shorter, cu, **how)
        whole = sf.attention_varlen(q, k, v, cu, **how)
        torch.testing.assert_close(out, torch.cat([whole[20:25], whole[35:]]), atol=1e-5, rtol=1e-5)


@MATRIX
def test_minus_infinity_hides_a_pair_and_what_is_hidden_may_be_anything(backend, generator):
    q, k, v, dout, dlse = inputs(generator, 65)
    hidden = torch.rand(1, 1, 65, 65, generator=generator) < 0.5
    hidden[..., 3, :] = True
    pair = torch.zeros(1, 1, 65, 65).masked_fill(hidden, -math.inf)
    plan = Plan.dense(65, 65, causal=True)
    got = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, pair_bias=pair)
    seen = plan.to_dense() & ~hidden
    dpair = got.pop("dpair")
    assert not dpair[~seen].any() and dpair[seen].any()
    tolerance.compare(got, q, k, v, seen, dout=dout, dlse=dlse)
    wild = pair.masked_fill(~plan.to_dense(), math.nan)
    again = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, pair_bias=wild)
    for name, x in got.items():
        assert torch.equal(again[name], x)


@EACH
def test_a_bias_of_low_rank_is_dimensions_of_q_and_k_with_its_gradients(backend, generator):
    """As `docs/concepts.md` shows: q k^T * scale + a b^T is one product of longer rows."""
    q, k, v, dout, _ = inputs(generator, 60, H=4, Hkv=4, D=32)
    a, b = randn(generator, 2, 4, 60, 8), randn(generator, 2, 4, 60, 8)
    leaves = [x.requires_grad_() for x in (q, k, v, a, b)]
    q2, k2 = torch.cat([q * 32**-0.5, a], -1), torch.cat([k, b], -1)
    out = sf.attention(q2, k2, v, causal=True, scale=1.0, backend=backend)
    got = [out, *torch.autograd.grad(out, leaves, dout)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    q, k, v, a, b = wide
    scores = (q @ k.mT * 32**-0.5 + a @ b.mT).masked_fill(~torch.ones(60, 60).tril().bool(), -math.inf)
    want = scores.softmax(-1) @ v
    for x, y in zip(got, [want, *torch.autograd.grad(want, wide, dout.double())], strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-5, rtol=2e-5)


def test_what_does_not_fit_is_refused_by_name(generator):
    q, k, v, _, _ = inputs(generator, 20)
    slopes, pair = torch.ones(4), torch.zeros(1, 1, 20, 20)
    for given, said in (
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes: \[3\].*\[Hq=4\] or \[2,4\]"),
        ({"alibi_slopes": 0.5}, "alibi_slopes: a float"),
        ({"alibi_slopes": slopes.clone().requires_grad_()}, "alibi_slopes requires a gradient"),
        ({"pair_bias": torch.zeros(20, 20)}, r"pair_bias: \[20, 20\].*\[2\|1, 4\|1, 20\|1, 20\|1\]"),
        ({"pair_bias": pair.bool()}, "pair_bias: .*bool.*expected floating point"),
        ({"pair_bias": pair.clone().requires_grad_(), "softcap": 2.0}, "pair_bias.*none under a softcap"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            sf.attention(q, k, v, **given)
    with torch.no_grad():
        sf.attention(q, k, v, pair_bias=pair.clone().requires_grad_(), softcap=2.0)
