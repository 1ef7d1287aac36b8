"""The threshold of SPARSEK, and the layer where it must agree with something simpler."""

import pytest
import torch

import sparseflash as sf
from nn_cases import causal, one_thread, sparsek_weights

_one_thread = pytest.fixture(autouse=True)(one_thread)


def weights(u, k):
    """clip(u_j - tau_i, 0, 1) of every prefix; torch's clamp has a gradient at its edges."""
    tau = sf.nn.sparsek_threshold(u, k)
    off = u[..., None, :] - tau[..., None]
    m = torch.where((off > 0) & (off < 1), off, (off >= 1).to(u.dtype))
    return m.masked_fill(~causal(u.shape[-1]), 0), tau


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_weights_of_every_prefix_are_the_projection_onto_the_capped_simplex(k, generator):
    u = 2 * torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
    m, tau = weights(u, k)
    sums = torch.arange(1, 41).clamp(max=k).double()
    torch.testing.assert_close(m.sum(-1), sums.expand(2, 3, 40))
    torch.testing.assert_close(m, sparsek_weights(u, k), atol=1e-9, rtol=0)
    assert bool((tau.diff(dim=-1)[..., k:] >= 0).all())  # so a key that is gone stays gone
    shifted = sf.nn.sparsek_threshold(u + 3, k)
    torch.testing.assert_close(shifted, tau + 3)


def test_k_of_one_is_sparsemax_and_large_gaps_are_a_hard_choice(generator):
    u = torch.randn(12, generator=generator, dtype=torch.float64)
    order = u.sort(descending=True).values
    support = int((1 + torch.arange(1, 13) * order > order.cumsum(0)).sum())
    tau = (order[:support].sum() - 1) / support
    torch.testing.assert_close(sf.nn.sparsek_threshold(u, 1)[-1], tau)
    m, _ = weights(3.0 * torch.randperm(12, generator=generator).double(), 4)
    assert set(m.unique().tolist()) == {0.0, 1.0} and bool((m.sum(-1)[4:] == 4).all())


@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_gradient_of_the_threshold(k, generator):
    u = torch.randn(2, 20, generator=generator, dtype=torch.float64, requires_grad=True)

    def finite(u):  # where a choice is hard, many thresholds will do, but the weights are the same
        return weights(u, k)[0][..., k:, :]

    assert torch.autograd.gradcheck(finite, u)
    u.grad = None
    weights(u, k)[0][..., k:, :].cos().sum().backward()
    want = u.detach().requires_grad_()
    sparsek_weights(want, k)[..., k:, :].cos().sum().backward()
    torch.testing.assert_close(u.grad, want.grad)


def test_equal_scores_share_what_there_is():
    m, _ = weights(torch.zeros(10, dtype=torch.float64), 2)
    torch.testing.assert_close(m[-1], torch.full((10,), 0.2, dtype=torch.float64))


def test_padding_is_no_key(generator):
    u = torch.randn(9, generator=generator, dtype=torch.float64)
    padded = torch.cat([u.new_full((4,), -torch.inf), u])
    assert torch.equal(sf.nn.sparsek_threshold(padded, 2)[4:], sf.nn.sparsek_threshold(u, 2))


def test_with_room_for_all_the_layer_is_dense_attention(generator):
    x = torch.randn(1, 30, 16, generator=generator, dtype=torch.float64)
    layer = sf.nn.SparseKAttention(16, 2, k=30, window=0, dtype=torch.float64)
    dense = sf.nn.SelfAttention(16, 2, dtype=torch.float64)
    dense.load_state_dict({n: w for n, w in layer.state_dict().items() if not n.startswith("score")})
    torch.testing.assert_close(layer(x), dense(x))
    layer(x).sum().backward()
    assert not layer.score.weight.grad.any()


def test_wide_heads_take_two_calls_and_a_needle_stays(generator):
    x = torch.randn(1, 300, 16, generator=generator)
    layer = sf.nn.SparseKAttention(16, 1, head_dim=160, k=4, window=3)
    layer.reset(generator)
    with torch.no_grad():
        x[0, 3] = 40 * layer.score.weight[0] / layer.score.weight.norm()
        state = layer.new_state(1)
        y = layer(x, state=state)
        exact = sf.nn.SparseKAttention(16, 1, head_dim=160, k=4, window=3, dtype=torch.float64)
        exact.load_state_dict(layer.state_dict())
        torch.testing.assert_close(y.double(), exact(x.double()), atol=1e-3, rtol=1e-3)
    assert bool((state.tensors["u"] > 10).any()) and state.tensors["k"].shape[2] < 30


@pytest.mark.parametrize(
    ("u", "k"), [(torch.arange(3), 1), (torch.zeros(3), 0), (None, 1), (torch.zeros(()), 1)]
)
def test_what_is_no_score_is_refused(u, k):
    with pytest.raises(sf.SparseFlashError, match="expected"):
        sf.nn.sparsek_threshold(u, k)
