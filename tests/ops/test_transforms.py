"""The transforms of torch.func: reverse mode and vmap are exact, forward mode is refused."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jvp, vjp, vmap

import sparseflash as sf
from harness import inputs, randn
from sparseflash import Plan

B, H, T, D = 2, 4, 70, 16
MASK = torch.rand(2, 1, T, T, generator=torch.Generator().manual_seed(0)) < 0.3
PLANS = (Plan.from_mask(MASK, tile=16), Plan.from_mask(~MASK).prepare())
BIAS, SINK, RATE = torch.linspace(-1, 1, T).view(1, 1, T), torch.arange(4.0), torch.arange(4.0) / 9

OPS = {
    "attention": lambda q, k, v: sf.attention(q, k, v, PLANS, key_bias=BIAS, sink_logits=SINK),
    "lse": lambda q, k, v: sf.attention(q, k, v, causal=True, return_lse=True)[1],
    "pointwise": lambda q, k, v: sf.pointwise_attention(q, k, v, PLANS),
    "stick-breaking": lambda q, k, v: sf.stick_breaking(q, k, v, PLANS[0]),
    "linear": lambda q, k, v: sf.linear_attention(q, k, v, decay_rate=RATE),
    "method": sf.methods.SinkWindow(window=9),
}


@pytest.fixture
def qkv(generator):
    return inputs(generator, T, B=B, H=H, D=D)[:3]


def _loss(name):
    return lambda *qkv: OPS[name](*qkv).square().sum()


@pytest.mark.parametrize("name", OPS)
def test_grad_and_vmap_in_any_order_give_what_backward_gives_one_by_one(name, qkv):
    q, k, v = qkv
    qs = torch.stack([q, q - 1, 2 * q], 1)  # the axis to map over is the second
    leaves = [[x.clone().requires_grad_() for x in (one, k, v)] for one in qs.unbind(1)]
    want = [torch.autograd.grad(_loss(name)(*x), x, allow_unused=True)[0] for x in leaves]

    outs = vmap(lambda q: OPS[name](q, k, v), in_dims=1)(qs)
    torch.testing.assert_close(outs, torch.stack([OPS[name](*x) for x in leaves]), rtol=0, atol=0)
    torch.testing.assert_close(vjp(_loss(name), q, k, v)[1](torch.tensor(1.0))[0], want[0], rtol=0, atol=0)
    each = vmap(grad(_loss(name)), in_dims=(1, None, None))(qs, k, v)
    torch.testing.assert_close(each, torch.stack(want), rtol=0, atol=0)
    summed = grad(lambda qs: vmap(lambda q: _loss(name)(q, k, v), in_dims=1)(qs).sum())(qs)
    torch.testing.assert_close(summed, torch.stack(want, 1), rtol=0, atol=0)


def test_what_is_mapped_over_may_be_a_sink_alone(qkv):
    sinks = torch.stack([SINK, -SINK])
    per_sink = grad(lambda sink: sf.attention(*qkv, sink_logits=sink).square().sum())
    torch.testing.assert_close(vmap(per_sink)(sinks), torch.stack([per_sink(x) for x in sinks]))


@pytest.mark.parametrize("name", [*OPS, "decode"])
def test_forward_mode_is_refused_where_it_would_lose_its_tangents(name, qkv):
    q, k, v = qkv
    op = OPS.get(name, sf.decode)
    with pytest.raises(sf.SparseFlashError, match="tangent.*reverse mode"):
        jvp(lambda q: op(q, k, v), (q,), (q,))
    with forward_ad.dual_level():
        torch.testing.assert_close(op(q, k, v), op(q, k, v))  # no tangent, no objection
        with pytest.raises(sf.SparseFlashError, match="tangent.*reverse mode"):
            op(forward_ad.make_dual(q, q), k, v)


def test_compiled_code_loses_no_tangents_either(qkv):
    q, k, v = qkv
    push = torch.compile(lambda q: jvp(lambda x: sf.attention(x, k, v), (q,), (q,))[1], backend="eager")
    with pytest.raises(sf.SparseFlashError, match="tangent.*reverse mode"):
        push(q)


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_refused(name, qkv):
    first = grad(lambda q: grad(_loss(name))(q, *qkv[1:]).sum())
    with pytest.raises(sf.SparseFlashError, match="reverse mode, once"):
        first(qkv[0])


CU = torch.tensor([0, 30, T])


EVERY = {
    **OPS,
    "dense": lambda q, k, v: sf.attention(q, k, v, causal=True),
    "one plan": lambda q, k, v: sf.attention(q, k, v, PLANS[0], return_lse=True)[1],
    "varlen": lambda q, k, v: sf.attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), CU, CU),
    "hash-sparse": sf.methods.HashSparse(nb=4),
    "qk-sparse": sf.methods.QKSparse(0.5, 0.5),
    "rem": lambda q, k, v: sf.stick_breaking(q, k, v, return_rem=True)[1],
    "state": lambda q, k, v: sf.linear_attention(q, k, v, return_state=True)[1],
}
REFUSED = pytest.raises(sf.SparseFlashError, match="reverse mode, once")


def _twice(call, given):
    """The gradients of each input as leaves of a graph, and then each of them differentiated by each."""
    for power in (1, 2):  # with 1 the slope of the output is constant
        out = call(*given).pow(power).sum()
        firsts = torch.autograd.grad(out, given, create_graph=True, allow_unused=True)
        for first in firsts:
            for x in given if first is not None else ():
                with REFUSED:
                    torch.autograd.grad(out + first.square().sum(), x, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", EVERY)
def test_a_second_derivative_in_eager_code_is_refused_and_not_left_out(name, qkv):
    _twice(EVERY[name], [x.requires_grad_() for x in qkv])


@pytest.mark.parametrize("activation", ["softmax", "silu"])
def test_a_second_derivative_of_a_jagged_batch_is_refused(activation, generator):
    """By nested leaves: torch itself cannot go twice through what makes nested tensors of rows."""
    rows = randn(generator, T, H, D)
    q, k, v = (torch.nested.nested_tensor_from_jagged(rows + n, CU).requires_grad_() for n in range(3))
    for power in (1, 2):
        out = sf.jagged_attention(q, k, v, activation=activation).values().pow(power).sum()
        for first in torch.autograd.grad(out, (q, k, v), create_graph=True):
            with REFUSED:
                torch.autograd.grad(out + first.values().square().sum(), q, retain_graph=True)


@pytest.mark.parametrize("plans", [PLANS[0], PLANS], ids=["one plan", "two"])
@pytest.mark.parametrize("learns", [(0,), (1,), (0, 1)], ids=["bias", "sinks", "both"])
def test_a_second_derivative_by_biases_and_sinks_alone_is_refused(plans, learns, qkv):
    given = [BIAS.clone(), SINK.clone()]

    def call(*learned):
        bias, sink = (dict(zip(learns, learned)).get(n, x) for n, x in enumerate(given))
        return sf.attention(*qkv, plans, key_bias=bias, sink_logits=sink)

    _twice(call, [given[n].requires_grad_() for n in learns])


@pytest.mark.parametrize("by", ["backward", "func"])
def test_a_second_derivative_of_the_indexers_loss_is_refused(by, qkv, generator):
    q, k, v = qkv
    lse = sf.attention(q, k, v, causal=True, return_lse=True)[1]
    shapes = (B, 2, T, 8), (B, T, 8), (B, 2, T)
    given = [randn(generator, *shape).requires_grad_() for shape in shapes]
    if by == "backward":
        return _twice(lambda *learned: sf.indexer_kl_loss(*learned, q, k, lse), given)
    first = grad(lambda x: sf.indexer_kl_loss(x, *given[1:], q, k, lse))
    torch.testing.assert_close(
        first(given[0]), torch.autograd.grad(sf.indexer_kl_loss(*given, q, k, lse), given[0])[0]
    )
    with REFUSED:
        grad(lambda x: first(x).square().sum())(given[0])


def test_a_second_derivative_by_the_slope_of_the_output_is_refused(qkv):
    """The trick that makes forward mode of two reverse ones."""
    q, k, v = (x.requires_grad_() for x in qkv)
    out, lse = sf.attention(q, k, v, PLANS[0], sink_logits=SINK, return_lse=True)
    slopes = torch.ones_like(out).requires_grad_(), torch.ones_like(lse).requires_grad_()
    first = torch.autograd.grad((out, lse), q, slopes, create_graph=True)[0].sum()
    for slope in slopes:
        with REFUSED:
            torch.autograd.grad(first, slope, retain_graph=True)


@pytest.mark.parametrize("name", ["attention", "dense", "linear"])
def test_a_second_derivative_through_compiled_code_is_refused(name, qkv):
    _twice(torch.compile(EVERY[name], backend="eager"), [x.requires_grad_() for x in qkv])


def test_gradients_with_a_graph_are_those_without(qkv):
    given = [*(x.requires_grad_() for x in qkv), BIAS.clone().requires_grad_(), SINK.clone().requires_grad_()]
    q, k, v, bias, sink = given
    out = sf.attention(q, k, v, PLANS, key_bias=bias, sink_logits=sink).square().sum()
    for one, other in zip(
        torch.autograd.grad(out, given, create_graph=True), torch.autograd.grad(out, given), strict=True
    ):
        assert torch.equal(one, other)
