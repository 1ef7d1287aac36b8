"""Logits in the thousands and far beyond: maximum and log-sum of a row stay apart inside every op."""

from __future__ import annotations

import math

import pytest
import torch

import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, FAST, inputs, randn, run
from sparseflash import Plan
from sparseflash.backends.numerics import SMALLEST_UNIT

T = 96
CAUSAL = Plan.dense(T, T, causal=True)
MASK = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
NEAR = Plan.dense(T, T, causal=True, window=(9, 0))
PLANS = {
    "tiles": CAUSAL,
    "few": CAUSAL.retile(4, 16),
    "single": Plan.from_mask(MASK, tile=1, unit=1),
    "two": (NEAR, CAUSAL - NEAR),
}
LARGE = (1e3, 1e5, 1e9)
BIASES = (-1e4, -1e9, torch.finfo(torch.float32).min)
EVERY = pytest.mark.parametrize(
    "backend, dtype",
    [(b, t) for b in BACKENDS for t in FAST if b != "reference" or t != torch.float16],
    ids=str,
)
OPTIONS = ("plain", "softcap", "bias", "sinks", "negative", "tiny")


def large_inputs(generator, size, dtype=torch.float32, ties=True):
    """Logits of about `size`: most rows look at one key, some share their weight among two."""
    q, k, v, dout, _ = inputs(generator, T, D=64, dtype=torch.float32)
    q, k = (x * math.sqrt(size) for x in (q, k))
    if ties:
        k[:, :, 1::5] = k[:, :, 0:-1:5]  # equal logits, far from zero
    limit = min(torch.finfo(dtype).max / 4, 1e30)
    return [x.clamp(-limit, limit).to(dtype) for x in (q, k, v, dout)]


def options_of(name, generator, size):
    return {
        "plain": {},
        "softcap": {"softcap": 20.0},
        "bias": {"key_bias": randn(generator, 1, 2, T) * size},
        "sinks": {"sink_logits": randn(generator, 4) * size},
        "negative": {"scale": -0.125},
        "tiny": {"scale": SMALLEST_UNIT / 2},
    }[name]


@EVERY
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("kind", PLANS)
def test_large_logits_are_as_exact_as_an_eager_softmax(kind, size, backend, dtype, generator):
    # the reference multiplies one query at a time by other sums for every key: equal keys are not equal there
    q, k, v, dout = large_inputs(generator, size, dtype, ties=(kind, backend) != ("single", "reference"))
    got = run(q, k, v, PLANS[kind], backend=backend, dout=dout)
    tolerance.compare(got, q, k, v, MASK, dout=dout, large=True)


@EACH
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("kind", ["tiles", "few", "two"])
@pytest.mark.parametrize("name", OPTIONS[1:])
def test_large_logits_under_every_option(name, kind, size, backend, generator):
    q, k, v, dout = large_inputs(generator, size)
    options = options_of(name, generator, size)
    got = run(q, k, v, PLANS[kind], backend=backend, dout=dout, **options)
    tolerance.compare(got, q, k, v, MASK, dout=dout, large=True, **options)


@EVERY
@pytest.mark.parametrize("kind", ["tiles", "few", "two"])
@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_that_all_keys_of_a_row_have_hides_nothing(bias, kind, backend, dtype, generator):
    """What padding masks hold: eager attention spreads such a row evenly, and its weights add up to 1."""
    q, k, v, dout, _ = inputs(generator, T, dtype=dtype)
    key_bias = torch.full((1, 1, T), bias)
    got = run(q, k, v, PLANS[kind], backend=backend, dout=dout, key_bias=key_bias)
    tolerance.compare(got, q, k, v, MASK, dout=dout, key_bias=key_bias, large=True)
    ones = torch.ones_like(v)
    total = sf.attention(q, k, ones, PLANS[kind], key_bias=key_bias, backend=backend)
    assert float((total - 1).abs().max()) <= T * torch.finfo(dtype).eps


@EACH
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_over_large_logits(name, size, backend, generator):
    q, k, v, _ = large_inputs(generator, size)
    options = options_of(name, generator, size)
    # a prefix that all share, and what follows
    parts = [
        Plan.from_spans(torch.tensor([[[x]]]).expand(1, 1, 1, 1, 2), Tq=1, Tk=T, tile=1)
        for x in ((0, 40), (40, T))
    ]
    for plan in (torch.tensor([T, T]), tuple(parts)):
        out, lse = sf.decode(q[:, :, -1:], k, v, plan, return_lse=True, backend=backend, **options)
        want = {"out": out, "lse": lse}
        tolerance.compare(want, q[:, :, -1:], k, v, MASK[:, :, -1:], large=True, **options)


def exact_scores(generator):
    """Integers, whose scores fp32 holds exactly: logits of up to 1e6, and their lse in fp64."""
    q, k = (torch.randint(-400, 401, (2, 4, T, 64), generator=generator).float() for _ in range(2))
    k[:, :, 1::5] = k[:, :, 0:-1:5]
    v, dout = randn(generator, 2, 4, T, 64), randn(generator, 2, 4, T, 64)
    lse = sf.attention(q.double(), k.double(), v.double(), CAUSAL, return_lse=True)[1]
    return q, k, v, dout, lse, {"lse": lse.float(), "lse_low": (lse - lse.float()).float()}


@EACH
def test_statistics_of_an_lse_in_two_numbers_are_those_of_the_softmax(backend, generator):
    q, k, _, _, lse, two = exact_scores(generator)
    of = {"plan": CAUSAL, "over": "row", "backend": backend}
    one = sf.attention_stats(q, k, lse=two["lse"], **of) - 1
    assert 1e-4 < float(one.abs().max()) <= 2e-7 * float(lse.abs().max()), "as the docstring promises"
    for given in (two, {"lse": lse}):
        assert float((sf.attention_stats(q, k, **given, **of) - 1).abs().max()) < 3e-6


@EACH
def test_gradients_of_an_lse_in_two_numbers_are_those_of_attention(backend, generator):
    """The backward of a ring, where one fp32 lse is off by more than the softmax is."""
    q, k, v, dout, lse, two = exact_scores(generator)
    want = run(q, k, v, CAUSAL, backend=backend, dout=dout)
    out = want["out"]

    def off(**given):
        dv = sf.attention_backward(dout, q, k, v, out, plan=CAUSAL, backend=backend, **given)[2]
        return float((dv - want["dv"]).abs().max() / want["dv"].abs().max())

    assert 1e-4 < off(lse=two["lse"]) <= 2e-7 * float(lse.abs().max()), "as the docstring promises"
    assert max(off(**two), off(lse=lse)) < 3e-6
