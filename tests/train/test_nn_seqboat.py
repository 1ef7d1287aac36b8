"""SeqBoat's two ways of leaving tokens out, and how far back it sees."""

import pytest
import torch

import sparseflash as sf
from nn_cases import one_thread

_one_thread = pytest.fixture(autouse=True)(one_thread)


def layer(generator, heads=1, **options):
    made = sf.nn.SeqBoat(16, heads, **{"window": 3, "size": 2, "dtype": torch.float64, **options})
    made.reset(generator)
    return made


@pytest.mark.parametrize("law", ["softmax", "relu2"])
@pytest.mark.parametrize(("heads", "inner"), [(1, 600), (2, 12)])
def test_packed_tokens_and_dropped_ones_give_the_same(law, heads, inner, generator):
    made = layer(generator, heads, law=law, inner=inner)  # 600 values take three heads
    x = torch.randn(2, 40, 16, generator=generator, dtype=torch.float64)
    m = torch.randn(2, 40, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    active = torch.rand(2, 40, generator=generator) < 0.4
    packed, dropped = made._packed(m, active), made._dropped(m, active, None)
    dropped = torch.where(active[..., None], dropped, 0)
    torch.testing.assert_close(packed, dropped)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), m) for y in (packed, dropped))):
        torch.testing.assert_close(a, b)
    assert made(x).shape == x.shape


@pytest.mark.parametrize("bias", [-99.0, 99.0])
def test_none_or_all_tokens_active(bias, generator):
    made = layer(generator)
    x = torch.randn(2, 20, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        made.route.weight.zero_()
        made.route.bias.copy_(torch.tensor([0, bias]))
        y, plain = made(x), made.plain(torch.nn.functional.silu(made.average(x)[0]))
    assert float(made.awake) == (bias > 0)
    assert torch.equal(y, plain) == (bias < 0)


def test_a_window_counts_active_tokens_however_far_back(generator):
    made = layer(generator, window=1, positions="none")
    active = torch.zeros(1, 500, dtype=torch.bool)
    active[0, [3, 490]] = True
    m = torch.randn(1, 500, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(made._packed(m, active)[0, 490].sum(), m)
    assert grad[0].any(-1).nonzero()[:, 0].tolist() == [3, 490]


def test_the_average_is_its_recurrence_from_any_state(generator):
    ema = sf.nn.EMA(4, 3, dtype=torch.float64)
    ema.reset(generator)
    x = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    want, state = ema(x)
    one, h = ema(x[:, :13])
    two, h = ema(x[:, 13:], h)
    torch.testing.assert_close(torch.cat([one, two], 1), want)
    torch.testing.assert_close(h, state)
