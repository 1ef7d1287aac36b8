"""`jagged_attention`: nested in, nested out, each sample as if it were alone."""

from __future__ import annotations

import pytest
import torch

import plans
import sparseflash as sf
from harness import BACKENDS, EACH, peak_memory, randn, same_bits
from sparseflash.backends.numerics import dropout_bar
from sparseflash.backends.reference.dropout import left

LENGTHS = (0, 1, 31, 32, 0, 33, 64)
LONGEST = 40


def _nested(rows, lengths, axis=1):
    edges = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(rows, edges, jagged_dim=1).transpose(1, axis)


def _weights(s, activation, post_mask, sees):
    """What the scores of one sample become; a post mask does not renormalise, as FBGEMM has it."""
    if activation == "softmax":
        some = sees.any(-1, keepdim=True)
        p = torch.where(some, s.masked_fill(~sees, -torch.inf), 0).softmax(-1) * some
    else:
        f = torch.nn.functional.silu if activation == "silu" else lambda x: x.clamp(min=0).square()
        p = torch.where(sees, f(s), 0)
    return p.triu() if post_mask else p


def _one_by_one(q, k, v, lengths_q, lengths_k, *, longest=None, factor=None, **options):
    """Packed rows [total,H,D] of every sample, in a loop; in fp64. Weights times `factor` [H,total,total]."""
    options = {"activation": "softmax", "causal": False, "window": None, "post_mask": None} | options
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    begin = begin_k = 0
    for n, m in zip(lengths_q, lengths_k, strict=True):
        a, b = (x if longest is None else min(x, longest) for x in (n, m))
        i, j = torch.arange(a)[:, None] + b - a, torch.arange(b)[None]
        sees = plans.rules(i, j, causal=options["causal"], window=options["window"])
        qs = q[begin : begin + a].transpose(0, 1)
        ks, vs = (
            x[begin_k : begin_k + b].transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)
            for x in (k, v)
        )
        s = qs @ ks.mT * options.get("scale", q.shape[2] ** -0.5)
        if "alibi_slopes" in options:
            s = s - options["alibi_slopes"][:, None, None] * (i - j).abs()
        p = _weights(s, options["activation"], options["post_mask"], sees) * options.get("out_scale", 1.0)
        if factor is not None:
            p = p * factor[:, begin : begin + a, begin_k : begin_k + b]
        out[begin : begin + a] = (p @ vs).transpose(0, 1)
        begin, begin_k = begin + n, begin_k + m
    return out


@pytest.mark.parametrize("axis", [1, 2], ids=["BjHD", "BHjD"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": (7, None)},
        {"scale": 1.0, "out_scale": 1 / 64, "post_mask": "upper"},
        {"activation": "silu", "causal": True, "out_scale": 1 / 64},
        {"activation": "relu2", "post_mask": "upper", "max_length": LONGEST},
        {"post_mask": "upper", "max_length": LONGEST},
        {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0], dtype=torch.float64)},
        {"causal": True, "dropout_p": 0.4},
        {"post_mask": "upper", "dropout_p": 0.4, "max_length": LONGEST},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_a_jagged_batch_is_its_samples_one_by_one(axis, options, generator):
    """Output and every gradient of the definition, in fp64, against a loop."""
    total = sum(LENGTHS)
    q, k, v = (randn(generator, total, h, 8, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    dout = randn(generator, total, 4, 8, dtype=torch.float64)
    rest = dict(options)
    if p := rest.pop("dropout_p", 0):
        tokens = torch.arange(total).expand(1, 4, total)
        rest["factor"] = left(torch.tensor(7), dropout_bar(p), tokens, tokens)[0].double() / (1 - p)
        options = options | {"dropout_seed": 7}
    want = _one_by_one(q, k, v, LENGTHS, LENGTHS, longest=rest.pop("max_length", None), **rest)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0)
    nested = [torch.nested.nested_tensor_from_jagged(x, edges).transpose(1, axis) for x in (q, k, v)]
    got = sf.jagged_attention(*nested, **options)
    assert got.layout == torch.jagged and got.shape == nested[0].shape
    assert (got + nested[0]).shape == got.shape  # the lengths are those of q, to torch too
    rows = got.transpose(1, axis).values()
    torch.testing.assert_close(rows, want, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(x, (q, k, v), dout) for x in (rows, want)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


@EACH
@pytest.mark.parametrize("activation", ["softmax", "silu"])
def test_the_kernels_see_the_packed_rows(backend, activation, generator):
    """The same bits as the op on packed rows: nothing is padded, copied or rounded on the way."""
    rows = [randn(generator, sum(LENGTHS), h, 16, dtype=torch.bfloat16) for h in (4, 2, 2)]
    edges = torch.tensor([0, *LENGTHS]).cumsum(0)
    plan = sf.Plan.from_documents(edges, causal=True)
    packed = [x.transpose(0, 1)[None] for x in rows]
    if activation == "softmax":
        want = sf.attention(*packed, plan, backend=backend)
    else:
        want = sf.pointwise_attention(*packed, plan, activation=activation, backend=backend)
    got = sf.jagged_attention(
        *(_nested(x, LENGTHS) for x in rows), causal=True, activation=activation, backend=backend
    )
    same_bits({"out": got.values()}, {"out": want[0].transpose(0, 1)})


@pytest.mark.parametrize("axis", [1, 2], ids=["BTHD", "BHTD"])
def test_dense_queries_pool_a_jagged_history_and_jagged_ones_read_a_dense_memory(axis, generator):
    B, T, total = len(LENGTHS), 5, sum(LENGTHS)
    seeds = randn(generator, B, T, 2, 8, dtype=torch.float64).requires_grad_()
    k, v = (randn(generator, total, 2, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    want = _one_by_one(seeds.flatten(0, 1), k, v, [T] * B, LENGTHS).view(B, T, 2, 8)
    history = [
        torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, *LENGTHS]).cumsum(0)).transpose(1, axis)
        for x in (k, v)
    ]
    got = sf.jagged_attention(seeds.transpose(1, axis), *history).transpose(1, axis)
    assert not got.is_nested and not got[0].any()  # a sample without a history
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(x.square().sum(), (seeds, k, v)) for x in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)

    got = sf.jagged_attention(history[0], *[seeds.transpose(1, axis)] * 2).transpose(1, axis)
    memory = seeds.flatten(0, 1)
    want = _one_by_one(k, memory, memory, LENGTHS, [T] * B)
    torch.testing.assert_close(got.values(), want, atol=1e-12, rtol=1e-12)


def test_one_head_and_rows_with_holes(generator):
    """As `torch.nested.narrow` makes them of a padded batch: offsets from anywhere, lengths beside them."""
    padded = randn(generator, 3, 6, 8, dtype=torch.float64)
    start, length = torch.tensor([1, 0, 3]), torch.tensor([4, 0, 2])
    x = torch.nested.narrow(padded, 1, start, length, layout=torch.jagged)
    got = sf.jagged_attention(x, x, x, causal=True)
    rows = torch.cat([padded[n, s : s + m] for n, (s, m) in enumerate(zip(start, length))])[:, None]
    want = _one_by_one(rows, rows, rows, length.tolist(), length.tolist(), causal=True)[:, 0]
    torch.testing.assert_close(torch.cat(got.unbind()), want, atol=1e-12, rtol=1e-12)


@EACH
def test_scores_far_below_zero_keep_their_softmax(backend):
    """Keys that are not there must not take part, not even as a score of 0."""
    x = torch.full((5, 1, 8), 20.0)
    got = sf.jagged_attention(
        _nested(-x, (2, 3)), _nested(x, (2, 3)), _nested(x, (2, 3)), scale=1.0, backend=backend
    )
    # fp32 knows an lse of -3200 to 2e-4, and so the weights
    torch.testing.assert_close(got.values(), x, rtol=2e-4, atol=0)


@pytest.mark.parametrize("activation", ["softmax", "silu"])
def test_memory_follows_the_sum_of_the_lengths(activation):
    """Padded to the longest, each of q, k and v takes 256 MiB."""
    rows = torch.randn(4096 + 255, 4, 16, requires_grad=True)

    def step(rows, lengths):
        x = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, *lengths]).cumsum(0))
        out = sf.jagged_attention(x, x, x, activation=activation, backend=BACKENDS[0])
        out.values().sum().backward()

    step(rows[:64], [64])
    assert peak_memory(lambda: step(rows, [4096] + [1] * 255)) < 64 << 20


A, B = (_nested(torch.zeros(7, 2, 8), lengths) for lengths in ((3, 4), (5, 2)))
D = torch.zeros(2, 5, 2, 8)


@pytest.mark.parametrize(
    "q, k, v, change, said",
    [
        (D, D, D, {}, r"none is nested: dense tensors go to attention\(\)"),
        (A, A, B, {}, "samples of the same lengths"),
        (A, A, A.transpose(1, 2), {}, "different axes"),
        (A, A, torch.zeros(2, 5, 8), {}, "for one head"),
        (A, D[:1], D[:1], {}, "one number of samples"),
        (A, A, 3, {}, "v: an int"),
        (torch.nested.nested_tensor([D[0], D[1]]), A, A, {}, "expected layout=torch.jagged"),
        (A, A, A, {"activation": "gelu"}, "'softmax', 'silu' or 'relu2'"),
        (A, A, A, {"post_mask": "lower"}, "expected 'upper'"),
        (A, A, A, {"post_mask": "upper", "causal": True}, "post_mask together with causal"),
        (A, A, A, {"max_length": -1}, "max_length=-1"),
        (A, A, A, {"out_scale": "x"}, "out_scale='x'"),
        (A, A, A, {"window": 5}, "window=5"),
        (A, A, A, {"activation": "silu", "dropout_p": 0.1}, "silu' together with dropout_p"),
        (A, A, A, {"activation": "relu2", "alibi_slopes": torch.ones(1)}, "together with alibi_slopes"),
    ],
    ids=[str(n) for n in range(15)],
)
def test_bad_arguments_have_their_message(q, k, v, change, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.jagged_attention(q, k, v, **change)


# ---------------------------------------------------------------- pooling with a bias of places


def _pooled(q, k, v, bias, lengths, longest, scale):
    """Sample by sample, as written down."""
    out, begin = [], 0
    for b, n in enumerate(lengths):
        own = slice(begin, begin + min(n, longest))
        s = scale * q[b] @ k[own].T
        if bias is not None:
            s = s + bias[b if len(bias) > 1 else 0, : min(n, longest)].T
        out.append(s.softmax(-1) @ v[own])
        begin += n
    return torch.stack(out)


@pytest.mark.parametrize("biases", [None, 1, len(LENGTHS)])
@pytest.mark.parametrize("longest", [LONGEST, 1, 100, None])
@pytest.mark.parametrize("T, D, Dv", [(4, 16, 16), (1, 40, 24), (35, 7, 5)])
def test_pooling_is_each_sample_by_itself_with_every_gradient(biases, longest, T, D, Dv):
    total, B, N = sum(LENGTHS), len(LENGTHS), longest or 80
    g = torch.Generator().manual_seed(T)
    shapes = [(B, T, D), (total, D), (total, Dv)] + ([(biases, N, T)] if biases else [])
    given = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    q, k, v, *rest = given
    bias = rest[0] if rest else None
    k_, v_ = (_nested(x, LENGTHS) for x in (k, v))
    found = sf.jagged_pool(q, k_, v_, bias, max_length=longest if bias is None else None, scale=0.3)
    want = _pooled(q, k, v, bias, LENGTHS, N, 0.3)
    torch.testing.assert_close(found, want)
    dout = torch.randn(want.shape, generator=g, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(x, given, dout) for x in (found, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_pooling_of_low_scores_is_finite_and_of_nothing_zero():
    """FBGEMM's kernel lets keys out of range into the running maximum: scores below -100 gave NaN there."""
    k = torch.full((sum(LENGTHS), 8), 20.0)
    out = sf.jagged_pool(torch.full((len(LENGTHS), 2, 8), -20.0), _nested(k, LENGTHS), _nested(k, LENGTHS))
    assert torch.equal(out, torch.tensor([20.0 * (n > 0) for n in LENGTHS])[:, None, None].expand_as(out))
    empty = _nested(k[:0], (0, 0))
    assert torch.equal(sf.jagged_pool(torch.randn(2, 3, 8), empty, empty), torch.zeros(2, 3, 8))


def test_torch_has_the_products_and_the_softmax_of_jagged_axes():
    """What stands around pooling in FBGEMM is torch's own: no function here repeats it."""
    lengths = [n for n in LENGTHS if n]
    k = torch.randn(sum(lengths), 6, dtype=torch.float64)
    x, dense = _nested(k, lengths), torch.randn(len(lengths), 6, 4, dtype=torch.float64)
    parts = list(zip(k.split(lengths), dense))
    torch.testing.assert_close((x @ dense).values(), torch.cat([a @ b for a, b in parts]))
    torch.testing.assert_close((x.transpose(1, 2) @ x), torch.stack([a.T @ a for a, _ in parts]))
    torch.testing.assert_close(torch.softmax(x, 1).values(), torch.cat([a.softmax(0) for a, _ in parts]))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"q": torch.randn(3, 16)}, r"q: .*expected a dense tensor \[B, T, D\]"),
        ({"k": torch.randn(3, 9, 16)}, r"expected nested tensors \[B, j, D\]"),
        ({"bias": torch.randn(3, 9, 5)}, r"bias: .*expected \[3\|1, N, T=4\]"),
        ({"q": torch.randn(2, 4, 16)}, "expected one number of samples"),
        ({"max_length": -1}, "max_length=-1: expected a number of tokens >= 0"),
    ],
)
def test_pooling_says_what_does_not_fit(changes, said):
    history = torch.nested.nested_tensor([torch.randn(n, 16) for n in (5, 0, 9)], layout=torch.jagged)
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.jagged_pool(**({"q": torch.randn(3, 4, 16), "k": history, "v": history} | changes))
