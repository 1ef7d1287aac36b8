"""`muse_attention` against its formulas, and where it is exact."""

import math

import pytest
import torch

import harness
import sparseflash as sf
from nn_cases import one_thread
from sparseflash.selection import kmeans

_one_thread = pytest.fixture(autouse=True)(one_thread)


def inputs(generator, T=24, Hkv=2, D=5, Dv=3):
    return harness.inputs(generator, T, Hkv=Hkv, D=D, Dv=Dv, dtype=torch.float64)[:3]


def dense(q, k, v, C, dipole=False, iterations=4):
    """Both stages over every pair of clusters: (out, lse)."""
    s = q.shape[-1] ** -0.5
    k_label = kmeans(k, C, iterations=iterations)[0].repeat_interleave(2, 1)
    q_label = kmeans(q, C, iterations=iterations)[0]
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    out, lse = torch.zeros(*q.shape[:3], v.shape[-1]).double(), torch.zeros(q.shape[:3]).double()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for a in q_label[b, h].unique():
                members = (q_label[b, h] == a).nonzero()[:, 0]
                mean = q[b, h, members].mean(0)
                delta = q[b, h, members] - mean
                logits, values, masses, slopes = [], [], [], []
                for j in k_label[b, h].unique():
                    n = k_label[b, h] == j
                    logit = s * k[b, h, n] @ mean
                    p, w = logit.softmax(0), logit.logsumexp(0)
                    kt, vt = p @ k[b, h, n], p @ v[b, h, n]
                    logits.append(w + s * delta @ kt)
                    values.append(vt)
                    masses.append(w)
                    slopes.append((p[:, None] * (k[b, h, n] - kt)).T @ (v[b, h, n] - vt))
                logits, values = torch.stack(logits, -1), torch.stack(values)
                found = logits.softmax(-1) @ values
                if dipole:
                    pi = torch.stack(masses).softmax(0)
                    found = found + s * delta @ (pi[:, None, None] * torch.stack(slopes)).sum(0)
                out[b, h] = out[b, h].index_put((members,), found)
                lse[b, h] = lse[b, h].index_put((members,), logits.logsumexp(-1))
    return out, lse


@pytest.mark.parametrize("dipole", [False, True])
def test_both_stages_are_their_formulas_forward_and_backward(dipole, generator):
    leaves = [x.requires_grad_() for x in inputs(generator)]
    got = sf.muse_attention(*leaves, clusters=4, dipole=dipole, return_lse=True)
    want = dense(*leaves, 4, dipole)
    grads = [torch.autograd.grad(o.sin().sum() + lse.cos().sum(), leaves) for o, lse in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dipole", [False, True])
def test_a_cluster_for_every_query_or_every_key_is_exact(dipole, generator):
    q, k, v = inputs(generator)
    want = sf.attention(q, k, v)
    torch.testing.assert_close(sf.muse_attention(q, k, v, clusters=24, dipole=dipole), want)
    same = q[:, :, :1].expand_as(q).contiguous()
    got = sf.muse_attention(same, k, v, clusters=3, dipole=dipole)  # every query is its mean
    torch.testing.assert_close(got, sf.attention(same, k, v))
    ones = sf.muse_attention(q, k, torch.ones_like(v), clusters=3, dipole=dipole)
    torch.testing.assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("T", [1, 8, 9, 31, 40])
def test_the_tree_with_exact_halves_is_causal_attention(T, generator):
    q, k, v = inputs(generator, T)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = sf.muse_attention(*leaves, clusters=64, causal=True, leaf=8)
    want = sf.attention(*leaves, causal=True)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (got, want))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dipole", "order"), [(False, 1), (True, 2)])
def test_the_error_is_of_the_first_order_and_with_a_dipole_of_the_second(dipole, order, generator):
    _, k, v = inputs(generator)
    centre, off = torch.randn(2, 2, 4, 1, 5, generator=generator, dtype=torch.float64).unbind()
    off = off * torch.tensor([1.0, -1.0]).double()[:, None].repeat(12, 1)
    errors = []
    for size in (1e-2, 5e-3):
        q = centre + size * off
        far = sf.muse_attention(q, k, v, clusters=1, dipole=dipole) - sf.attention(q, k, v)
        errors.append(float(far.norm()))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1


def test_later_tokens_matter_only_through_the_means_of_their_half(generator):
    q, k, v = inputs(generator, 32)
    want = sf.muse_attention(q, k, v, clusters=2, causal=True, leaf=8)
    other = [torch.cat([x[:, :, :16], x[:, :, 16:] + 1], 2) for x in (q, k, v)]
    got = sf.muse_attention(*other, clusters=2, causal=True, leaf=8)
    torch.testing.assert_close(got[:, :, :16], want[:, :, :16])


def test_memory_goes_from_step_to_step(generator):
    q, k, v = inputs(generator, 64)
    memory = {}
    for _ in range(6):
        out = sf.muse_attention(q, k, v, clusters=4, iterations=2, memory=memory)
    torch.testing.assert_close(out, sf.muse_attention(q, k, v, clusters=4, iterations=12))
    sf.muse_attention(q, k, v, clusters=5, memory=memory)  # of another number: anew
    assert memory[0, 64][0].shape == (2, 4, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clusters": 0}, "positive int"),
        ({"leaf": 0}, "positive int"),
        ({"iterations": -1}, ">= 0"),
        ({"memory": 3}, "expected a dict"),
        ({"q": torch.zeros(2, 4, 7, 5), "causal": True}, "takes as many"),
        ({"q": torch.zeros(2, 3, 24, 5)}, "multiple of Hkv"),
        ({"q": None}, "floating point"),
    ],
)
def test_what_it_cannot_take_is_refused(change, message, generator):
    q, k, v = inputs(generator)
    with pytest.raises(sf.SparseFlashError, match=message):
        sf.muse_attention(**{"q": q, "k": k, "v": v, **change})


def test_fp32_and_a_full_graph(generator):
    q, k, v = (x.float() for x in inputs(generator, 40))
    call = torch.compile(
        lambda q, k, v: sf.muse_attention(q, k, v, clusters=3, causal=True, leaf=16),
        backend="aot_eager",
        fullgraph=True,
    )
    want = sf.muse_attention(q.double(), k.double(), v.double(), clusters=3, causal=True, leaf=16)
    torch.testing.assert_close(call(q, k, v).double(), want, atol=1e-4, rtol=1e-4)
