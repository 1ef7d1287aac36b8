"""`indexer_kl_loss` against its formula and autograd in fp64, in the warm-up and in the sparse stage."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import sparseflash as sf
from harness import EACH, MAIN, peak_memory, randn

NAMES = ("q_index", "k_index", "weights")


def _inputs(generator, Tq, Tk=None, *, B=2, H=3, D=16, Hq=4, Hkv=2, Dm=32, dtype=torch.float32):
    Tk = Tq if Tk is None else Tk
    shapes = ((B, H, Tq, D), (B, Tk, D), (B, H, Tq), (B, Hq, Tq, Dm), (B, Hkv, Tk, Dm))
    return [randn(generator, *s, dtype=dtype) for s in shapes]


def _formula(q_index, k_index, weights, q, k, lse, seen, scale, index_scale, softcap=None):
    """The loss of each row, over the pairs that are seen [B,Tq,Tk]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    some = seen.any(-1)
    s = q @ k.transpose(-1, -2) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    p = torch.exp(s - lse[..., None]).masked_fill(~seen[:, None], 0).sum(1)
    p = p / torch.where(some, p.sum(-1), 1)[..., None]
    products = (q_index @ k_index[:, None].transpose(-1, -2) * index_scale).relu()
    score = (products * weights[..., None]).sum(1).masked_fill(~(seen | ~some[..., None]), -torch.inf)
    log = score.log_softmax(-1).masked_fill(~seen, 0)
    return torch.where(seen, torch.xlogy(p, p) - p * log, 0).sum(-1) * some


def _want(dtype, given, lse, seen, **options):
    leaves = [x.to(dtype).detach().requires_grad_() for x in given[:3]]
    q, k, lse = (x.to(dtype) for x in (*given[3:], lse))
    total = _formula(*leaves, q, k, lse, seen, **options).sum()
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def _got(given, lse, index, **options):
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    total = sf.indexer_kl_loss(*leaves, *given[3:], lse, index, reduction="sum", **options)
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def _stage(generator, stage, T, seen):
    """What the indexer compares: (index, pairs); lists with holes, repetitions and keys of the future."""
    if stage == "warm-up":
        return None, seen
    index = torch.randint(-1, T, (2, T, 90), generator=generator)
    index[:, T // 2] = -1
    listed = torch.zeros(2, T, T + 1, dtype=torch.bool).scatter_(-1, index % (T + 1), True)[..., :T]
    return index, seen & listed


@MAIN
@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
@pytest.mark.parametrize("T, D", [(1, 16), (63, 40), (129, 80)])
def test_the_loss_and_its_gradients_are_those_of_the_formula(
    backend, dtype, stage, T, D, generator, monkeypatch
):
    reference = import_module("sparseflash.backends.reference.indexer")
    monkeypatch.setattr(reference, "HELD", 40_000)  # several pieces
    given = _inputs(generator, T, D=D, dtype=dtype)
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(2, T, T)
    out, lse = sf.attention(given[3], given[4], given[4], causal=True, return_lse=True, backend="reference")
    index, pairs = _stage(generator, stage, T, seen)
    options = {"scale": 32**-0.5, "index_scale": D**-0.5}
    got = _got(given, lse, index, backend=backend, **options)
    want = _want(torch.float64, given, lse, pairs, **options)
    eager = _want(torch.float32, given, lse, pairs, **options)
    # fp32 sums, of bf16 products where the inputs are; a gradient is rounded to the dtype of its input.
    fine, eps = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    for name, x, exact, plain in zip(("loss", *NAMES), got, want, eager, strict=True):
        size = exact.abs().amax()
        own = 3 * (plain - exact).abs().amax() + 16 * fine * size
        band = own + (eps * exact.abs() if x.dtype != torch.float32 else 0)
        # a product that is 0 but for rounding may lie on either side of the ReLU's edge: its term is as small
        assert ((x - exact).abs() <= band + 64 * fine).all(), (name, float((x - exact).abs().max()))


@EACH
def test_ranges_and_padding_are_left_out(backend, generator):
    Tq, Tk = 20, 60
    given = _inputs(generator, Tq, Tk, dtype=torch.float32)
    keep = torch.rand(2, Tk, generator=generator) < 0.7
    first = torch.randint(0, 50, (2, Tq), generator=generator)
    at = torch.arange(Tk)
    seen = (at <= torch.arange(Tq)[:, None] + 30) & keep[:, None] & (at >= first[..., None])
    lse = randn(generator, 2, 4, Tq)  # heads count by what is left of them
    dirty = [*given]
    dirty[1] = given[1].masked_fill(~keep[..., None], torch.nan)
    dirty[4] = given[4].masked_fill(~keep[:, None, :, None], torch.nan)
    options = {"scale": 0.1, "index_scale": 0.3}
    got = _got(dirty, lse, None, q_offset=30, first_key=first, k_keep=keep, backend=backend, **options)
    want = _want(torch.float64, given, lse, seen, **options)
    for x, exact in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
def test_strides_softcap_and_heads_that_saw_nothing(backend, stage, generator):
    T = 70
    given = _inputs(generator, T, D=24, Dm=40)
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(2, T, T)
    lse = randn(generator, 2, 4, T)
    lse[:, 1] = -torch.inf  # of a head that saw nothing: it counts nothing
    index, pairs = _stage(generator, stage, T, seen)
    options = {"scale": 0.2, "index_scale": 0.3, "softcap": 2.0}
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    turned[3] = torch.stack((given[3], given[3]), -1)[..., 0]  # every second item
    got = _got(turned, lse, index, backend=backend, **options)
    want = _want(torch.float64, given, lse.masked_fill(lse == -torch.inf, torch.inf), pairs, **options)
    for x, exact in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
def test_the_number_of_threads_does_not_show(stage, generator):
    given = _inputs(generator, 200, D=64, Dm=64)
    lse = randn(generator, 2, 4, 200)
    index = None if stage == "warm-up" else torch.randint(-1, 200, (2, 200, 90), generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = _got(given, lse, index, backend="cpu")
        torch.set_num_threads(3)
        got = _got(given, lse, index, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_gradcheck_and_op_rules(generator):
    given = _inputs(generator, 9, B=1, D=8, Dm=8, dtype=torch.float64)
    _, lse = sf.attention(given[3], given[4], given[4], causal=True, return_lse=True)
    index = torch.randint(-1, 9, (1, 9, 4), generator=generator)
    leaves = [x.requires_grad_() for x in given[:3]]
    for chosen in (None, index):
        assert torch.autograd.gradcheck(
            lambda *x, chosen=chosen: sf.indexer_kl_loss(*x, *given[3:], lse, chosen), leaves, fast_mode=True
        )
    low, high = torch.zeros(1, 9, dtype=torch.int32), torch.arange(1, 10, dtype=torch.int32)[None]
    op = torch.ops.sparseflash.indexer_kl_loss.default
    rest = (index, low, high, None, 0.5, 0.3, 0.0, "")
    torch.library.opcheck(op, (*leaves, *given[3:], lse, *rest), test_utils="test_schema")
    torch.library.opcheck(op, (*leaves, *given[3:], lse, *rest), test_utils="test_faketensor")


def test_an_indexer_that_is_the_attention_has_no_loss(generator):
    q_index, k_index, _, _, _ = _inputs(generator, 50, H=1, D=32)
    k_index = k_index.abs()
    q, k = q_index.abs(), k_index[:, None]  # products are positive, so that a ReLU changes nothing
    _, lse = sf.attention(q, k, k, causal=True, return_lse=True)
    ones = torch.ones(2, 1, 50)
    loss = sf.indexer_kl_loss(q, k_index, ones, q, k, lse, index_scale=32**-0.5)
    assert abs(float(loss)) < 1e-5
    assert float(sf.indexer_kl_loss(q.flip(-1), k_index, ones, q, k, lse, index_scale=32**-0.5)) > 1e-3


WRONG = [
    ({"q": torch.zeros(2, 4, 8, 16)}, "the tokens and device of the indexer"),
    ({"lse": torch.zeros(2, 9)}, "return_lse=True"),
    ({"index": torch.zeros(2, 9)}, "-1 = none"),
    ({"reduction": "none"}, "expected mean or sum"),
    ({"weights": torch.zeros(2, 9, 3)}, "heads come before tokens"),
]


@pytest.mark.parametrize("given, said", WRONG)
def test_errors_say_what_to_do(given, said):
    good = {
        "q_index": torch.zeros(2, 3, 9, 8),
        "k_index": torch.zeros(2, 9, 8),
        "weights": torch.zeros(2, 3, 9),
        "q": torch.zeros(2, 4, 9, 16),
        "k": torch.zeros(2, 2, 9, 16),
        "lse": torch.zeros(2, 4, 9),
    }
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.indexer_kl_loss(**(good | given))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
def test_memory_does_not_hold_the_scores(stage, generator):
    given = _inputs(generator, 2048, B=1, H=8, D=32)
    lse = torch.zeros(1, 4, 2048)
    index = None if stage == "warm-up" else torch.randint(0, 2048, (1, 2048, 64), generator=generator)
    _got(given, lse, index)
    assert peak_memory(lambda: _got(given, lse, index)) < 128 << 20, "less than the scores of its heads, once"
