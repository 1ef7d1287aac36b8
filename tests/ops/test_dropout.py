"""Dropout: a draw that follows from a seed and the numbers of a pair alone, and exact attention under it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import plans
import sparseflash as sf
import tolerance
from harness import EACH, MAIN, inputs, randn, run, same_bits
from sparseflash import Plan
from sparseflash.backends.dispatch import choose
from sparseflash.backends.numerics import Numbers, Softmax, dropout_bar
from sparseflash.backends.reference import dropout as draw


def left(p: float, seed: int, B: int, H: int, Tq: int, Tk: int) -> torch.Tensor:
    """Which weights stay, [B,H,Tq,Tk]."""
    tokens = (torch.arange(T).expand(B, H, T) for T in (Tq, Tk))
    return draw.left(torch.tensor(seed), dropout_bar(p), *tokens)


def drawn(backend: str, p: float, seed: int, plan, shape, dtype=torch.float32) -> torch.Tensor:
    """Which weights stay, as a backend's results tell: keys have equal scores and values of their own."""
    B, H, Tq, Tk = shape
    q, k = torch.zeros(B, H, Tq, 16, dtype=dtype), torch.zeros(B, 1, Tk, 16, dtype=dtype)
    parts = []
    for first in range(0, Tk, 128):
        v = torch.zeros(B, 1, Tk, 128, dtype=dtype)
        some = torch.arange(first, min(first + 128, Tk))
        v[:, :, some, some - first] = 1
        out = sf.attention(q, k, v, plan, dropout_p=p, dropout_seed=seed, backend=backend)
        parts.append(out[..., : len(some)] > 0)
    return torch.cat(parts, -1)


def test_words_are_those_that_philox_is_published_with():
    # known answers of Random123, the authors' own library, for 10 rounds
    word = draw.WORD
    for counter, key, want in (
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((word,) * 4, (word,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        found = draw.philox([torch.tensor(x) for x in counter], [torch.tensor(x) for x in key])
        assert tuple(int(x) for x in found) == want


@MAIN
@pytest.mark.parametrize("kind", plans.KINDS)
def test_random_plans_give_the_exact_result_and_gradients(backend, dtype, kind, seed):
    d = plans._Draw(seed)
    example = plans.example(seed % 1_000_000, kind, batch=2, heads=4, Tq=d.pick((1, 33, 129)))
    Tq, Tk = example.plan.Tq, example.plan.Tk
    D, Dv = d.pick((16, 40)), d.pick((16, 40))
    q, k, v, dout, dlse = inputs(d.torch, Tq, Tk, Hkv=d.pick((1, 2, 4)), D=D, Dv=Dv, dtype=dtype)
    p, number = d.pick((0.1, 0.5, 0.9)), d.random.getrandbits(64) - 2**63
    options = {"key_bias": randn(d.torch, 1, 2, Tk), "sink_logits": randn(d.torch, 4)}
    options |= {"softcap": 5.0} if d.chance(0.5) else {}
    got = run(
        q, k, v, example.plan, backend=backend, dout=dout, dlse=dlse,
        dropout_p=p, dropout_seed=number, **options,
    )  # fmt: skip
    options["factor"] = left(p, number, 2, 4, Tq, Tk).double() / (1 - p)
    note = f"{example.line}, dropout_p={p}, dropout_seed={number}"
    tolerance.compare(got, q, k, v, example.mask, dout=dout, dlse=dlse, note=note, **options)


@MAIN
@pytest.mark.parametrize("tile", [1, 16, 100])
def test_the_draw_is_the_same_in_every_tile_layout_and_order(backend, dtype, tile, generator):
    shape = B, H, Tq, Tk = 1, 2, 40, 141
    want = left(0.4, 11, *shape)
    blocks = torch.rand(1, H, -(-Tq // tile), 9, generator=generator) < 0.7
    buckets = [torch.randint(3, (B, H, T), generator=generator) for T in (Tq, Tk)]
    for plan in (
        Plan.dense(Tq, Tk, tile=tile),
        Plan.dense(Tq, Tk, causal=True, window=(40, 0), q_offset=101, tile=tile),
        Plan.from_mask(torch.rand(B, H, Tq, Tk, generator=generator) < 0.3, tile=tile),
        Plan.from_blocks(blocks, Tq=Tq, Tk=Tk, tile=tile, unit=16),
        Plan.from_buckets(*buckets, tile=tile),
    ):
        assert torch.equal(drawn(backend, 0.4, 11, plan, shape, dtype), want & plan.to_dense())


def test_gradients_are_those_of_finite_differences(generator):
    q, k, v, _, _ = (x[:1, :2].requires_grad_() for x in inputs(generator, 9, D=5, dtype=torch.float64))
    bias, sink = (
        randn(generator, 1, 2, 9).double().requires_grad_(),
        randn(generator, 2).double().requires_grad_(),
    )

    def attend(q, k, v, bias, sink):
        return sf.attention(
            q, k, v, causal=True, key_bias=bias, sink_logits=sink, softcap=3.0, return_lse=True,
            dropout_p=0.3, dropout_seed=1, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, sink), fast_mode=True)


@EACH
def test_plans_of_one_softmax_a_pool_and_packed_rows_have_one_draw(backend, generator):
    q, k, v, dout, _ = inputs(generator, 90)
    how = {"dropout_p": 0.2, "dropout_seed": 5, "backend": backend}
    whole = Plan.dense(90, 90, causal=True)
    near = Plan.dense(90, 90, causal=True, window=(20, 0))
    both = (near, whole - near)
    one, two = (run(q, k, v, plan, dout=dout, **how) for plan in (whole, both))
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, atol=2e-5, rtol=2e-5)
    pool = run(q, k[:1], v[:1], whole, dout=dout, **how)
    spread = run(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), whole, dout=dout, **how)
    torch.testing.assert_close(pool["out"], spread["out"], atol=1e-6, rtol=1e-6)
    cu = torch.tensor([0, 50, 90], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = sf.attention_varlen(*packed, cu, causal=True, **how)
    documents = Plan.from_documents(cu, Tq=90, Tk=90, causal=True)
    want = sf.attention(*(x[:1] for x in (q, k, v)), documents, **how)
    assert torch.equal(out, want[0].transpose(0, 1))


def test_the_draw_has_the_share_and_the_spread_of_coins():
    for p in (0.1, 0.5):
        keep = torch.stack([left(p, n, 2, 2, 300, 500) for n in (0, 1, 2**32, -1)])
        spread = (p * (1 - p)) ** 0.5
        z = (keep.double() - (1 - p)) / spread

        def sure(x: torch.Tensor) -> None:  # a mean of independent numbers of mean 0 and variance 1
            assert abs(float(x.mean())) * x.numel() ** 0.5 < 4.5

        sure(z)
        for dim, size in ((-1, 500), (-2, 300)):  # sums of rows and of columns spread as those of coins
            sums = keep.double().sum(dim)
            ratio = float(((sums - size * (1 - p)) ** 2).mean()) / (size * p * (1 - p))
            assert abs(ratio - 1) < 5 * (2 / sums.numel()) ** 0.5
        for dim in range(z.dim()):  # seeds, batch slots, heads, rows, columns
            for far in {1, 2, 3, 16, 64, 128} & set(range(z.shape[dim])):
                sure(z.narrow(dim, 0, z.shape[dim] - far) * z.narrow(dim, far, z.shape[dim] - far))
        corners = z[..., :-1:2, :-1:2] * z[..., 1::2, :-1:2] * z[..., :-1:2, 1::2] * z[..., 1::2, 1::2]
        sure(corners)
        sure(z[..., :-2] * z[..., 1:-1] * z[..., 2:])
        # no combination of rows and columns stands out: the largest singular value is that of coins
        x = left(p, 3, 1, 1, 600, 1200)[0, 0].double()
        top = torch.linalg.svdvals((x - (1 - p)) / spread / 1200**0.5)[0]
        assert 0.97 < float(top) / (1 + (600 / 1200) ** 0.5) < 1.03


@EACH
def test_dropout_leaves_the_log_sum_exp_and_on_average_the_result(backend, generator):
    q, k, v, _, _ = inputs(generator, 64, D=16)
    plain, lse = sf.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    total = torch.zeros_like(plain)
    for number in range(60):
        how = {"dropout_p": 0.1, "dropout_seed": number, "backend": backend}
        out, same = sf.attention(q, k, v, causal=True, return_lse=True, **how)
        assert torch.equal(lse, same)
        total += out
    assert float((total / 60 - plain).square().mean().sqrt()) < 0.04
    assert float((out - plain).square().mean().sqrt()) > 0.05


@EACH
def test_without_dropout_results_are_bit_for_bit_those_without_the_argument(backend, generator):
    q, k, v, dout, _ = inputs(generator, 130)
    plan = Plan.dense(130, 130, causal=True)
    same_bits(
        run(q, k, v, plan, dout=dout, backend=backend),
        run(q, k, v, plan, dout=dout, backend=backend, dropout_p=0.0, dropout_seed=4),
    )


def test_a_seed_is_drawn_from_the_default_generator_and_checkpoints_restore_it(generator):
    q, k, v, dout, _ = inputs(generator, 100)
    torch.manual_seed(7)
    first = sf.attention(q, k, v, dropout_p=0.5)
    second = sf.attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(first, sf.attention(q, k, v, dropout_p=0.5))
    state = torch.get_rng_state()
    sf.attention(q, k, v)
    assert torch.equal(state, torch.get_rng_state())  # a call without dropout draws nothing

    found = []
    for again in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(3)

        def block(*x):
            return sf.attention(*x, causal=True, dropout_p=0.3) * 2

        out = checkpoint(block, *leaves, use_reentrant=False) if again else block(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_a_seed_may_be_a_tensor_and_one_that_is_no_seed_is_refused(generator):
    q, k, v, _, _ = inputs(generator, 40)
    a = sf.attention(q, k, v, dropout_p=0.5, dropout_seed=-3)
    assert torch.equal(a, sf.attention(q, k, v, dropout_p=0.5, dropout_seed=torch.tensor(-3)))
    for seed in (0.5, "1", True, 2**63, torch.tensor(1.0), torch.tensor([1]), torch.tensor(1).int()):
        with pytest.raises(sf.SparseFlashError, match="dropout_seed: .*expected an int of 64 bits"):
            sf.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)
    for p in (-0.1, 1, 1.5, math.nan, "0.1", True):
        with pytest.raises(sf.SparseFlashError, match=r"dropout_p=.*expected a number in \[0, 1\)"):
            sf.attention(q, k, v, dropout_p=p)


@EACH
def test_pieces_of_a_softmax_have_gradients_under_seeds_of_their_own(backend, generator):
    q, k, v, dout, _ = inputs(generator, 60)
    how = {"dropout_p": 0.3, "backend": backend}
    halves = [(k[:, :, :30], v[:, :, :30], 1), (k[:, :, 30:], v[:, :, 30:], 2)]
    parts = [sf.attention(q, a, b, return_lse=True, dropout_seed=n, **how) for a, b, n in halves]
    out, lse = sf.merge(parts)
    factor = torch.cat([left(0.3, n, 2, 4, 60, 30) for *_, n in halves], -1).double() / 0.7
    got = {"out": out, "lse": lse}
    found = [
        sf.attention_backward(dout, q, a, b, out, lse, Plan.dense(60, 30), dropout_seed=n, **how)
        for a, b, n in halves
    ]
    got |= {"dq": found[0][0] + found[1][0]}
    got |= {f"d{x}": torch.cat([found[0][i], found[1][i]], 2) for i, x in ((1, "k"), (2, "v"))}
    mask = torch.ones(1, 1, 60, 60, dtype=torch.bool)
    tolerance.compare(got, q, k, v, mask, dout=dout, factor=factor)
    with pytest.raises(sf.SparseFlashError, match="give the seed that the forward was given"):
        sf.attention_backward(dout, q, k, v, out, lse, Plan.dense(60, 60), **how)


def by_number(backend, generator):
    """Some tokens and heads of many, which draw for them what they draw for all; compared."""
    q, k, v, dout, _ = inputs(generator, 90, Hkv=4)
    some, keys = torch.randperm(90, generator=generator)[:70], torch.arange(3, 90, 2)
    plan = Plan.dense(90, 90, causal=True).restrict(some, keys)
    options = Softmax(0.25, 0.0, backend, dropout=0.3, head=2)
    own = [x[:, 2:] for x in (q[:, :, some], k[:, :, keys], v[:, :, keys], dout[:, :, some])]
    run = choose("forward", backend, *own[:3])
    how = {"key_bias": None, "seed": torch.tensor(5), "numbers": Numbers(some, keys)}
    out, lse, norm = run.forward(*own[:3], plan, options, out_dtype=q.dtype, normed=True, **how)
    found = run.backward(own[3], *own[:3], out, norm, None, plan, options, grad_dtype=None, **how)
    factor = left(0.3, 5, 2, 4, 90, 90)[:, 2:, some][..., keys].double() / 0.7
    got = {"out": out, "lse": lse, "dq": found[0], "dk": found[1], "dv": found[2]}
    tolerance.compare(got, *own[:3], plan.to_dense(), dout=own[3], factor=factor, scale=0.25)


@EACH
def test_some_tokens_and_heads_draw_by_their_numbers(backend, generator):
    by_number(backend, generator)


def test_transforms_and_compiled_code_draw_the_same(generator):
    q, k, v, dout, _ = inputs(generator, 50)

    def loss(q, seed):
        return (sf.attention(q, k, v, causal=True, dropout_p=0.4, dropout_seed=seed) * dout).sum()

    x = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x, 9), x)
    assert torch.equal(torch.func.grad(loss)(q, 9), want)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(q, torch.tensor([9, 10]))
    assert torch.equal(each[0], want) and not torch.equal(each[1], want)
    torch.manual_seed(2)
    many = torch.func.vmap(lambda x: sf.attention(x, k, v, dropout_p=0.4), randomness="different")(
        torch.stack([q, q])
    )
    assert not torch.equal(*many)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x, torch.tensor(9)), x)
    assert torch.equal(got, want)
    drawn = torch.compile(
        lambda q: sf.attention(q, k, v, causal=True, dropout_p=0.4), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(drawn(q), drawn(q))
