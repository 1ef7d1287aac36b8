"""N:M weights: masks on the right axes, products equal to masked dense ones, and what they find."""

import pytest
import torch

import sparseflash as sf
from sparseflash.nn import NMConv2d, NMLinear, nm_mask
from sparseflash.ops.nm import nm_product

RULES = ("bdwp", "sr-ste", "one-sided")


def layer(rule="bdwp", n=2, m=8, shape=(32, 16), **options):
    torch.manual_seed(0)
    return NMLinear(*shape, n=n, m=m, rule=rule, dtype=torch.float64, **options)


# masks


@pytest.mark.parametrize("n, m", [(2, 4), (2, 8), (1, 4), (4, 8), (8, 8), (3, 5)])
@pytest.mark.parametrize("dim", [0, 1, -1, 2])
def test_every_group_keeps_its_largest(n, m, dim):
    weight = torch.randn(2 * m, 3 * m, m, generator=torch.Generator().manual_seed(n * m))
    keep = nm_mask(weight, n, m, dim)
    groups, values = (x.movedim(dim, -1).unflatten(-1, (-1, m)) for x in (keep, weight.abs()))
    assert (groups.sum(-1) == n).all()
    least = values.where(groups, torch.inf).amin(-1)
    assert (values.where(~groups, 0).amax(-1) <= least).all()


def test_of_equal_magnitudes_the_first_are_kept():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    assert nm_mask(weight, 2, 4, 1).nonzero()[:, 1].tolist() == [0, 1, 4, 5]


def test_forward_groups_lie_along_inputs_and_backward_groups_along_outputs():
    found = layer()
    front, back = found.masks()
    assert torch.equal(front, nm_mask(found.weight, 2, 8, 1)) and torch.equal(
        back, nm_mask(found.weight, 2, 8, 0)
    )
    assert 0.3 < float((front & back).sum() / front.sum()) < 0.9  # neither the same nor unrelated
    assert not (front.T.reshape(32, 2, 8).sum(-1) == 2).all()


def test_masks_follow_the_weight():
    found = layer()
    first = found.masks()
    optimizer = torch.optim.AdamW(found.parameters(), lr=1.0, fused=True)
    found(torch.randn(4, 32, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert torch.equal(found.masks()[0], nm_mask(found.weight, 2, 8, 1))
    assert not torch.equal(found.masks()[0], first[0])
    assert set(found.state_dict()) == {"weight", "bias"}


# products


BACKENDS = [name for name, status in sf.backend_status().items() if status.usable and name != "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 63, 64, 129])
@pytest.mark.parametrize("n, m", [(2, 8), (1, 4), (3, 5), (8, 8), (7, 64), (2, 128)])
def test_a_product_is_that_of_the_masked_weight(n, m, T, backend):
    if backend == "cpu" and m > 64:
        with pytest.raises(sf.SparseFlashError, match="at most 64"):
            nm_product(torch.ones(T, m), torch.ones(3, m), n, m, backend=backend)
        return
    g = torch.Generator().manual_seed(n * m + T)
    for inputs, outputs in ((3 * m, 33), (m, 1), (0, 5), (9 * m, 48)):
        x, weight = (torch.randn(rows, inputs, generator=g) for rows in (T, outputs))
        want = x.double() @ (weight * nm_mask(weight, n, m)).double().mT
        for given in (x, torch.cat([x, x], 1)[:, :inputs]):
            for w in (weight, weight.mT.contiguous().mT):
                got = nm_product(given, w, n, m, backend=backend)
                bound = 2**-23 * (inputs + 2) * (x.double().abs() @ weight.double().abs().mT)
                assert got.dtype == torch.float32 and ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_product_of_another_dtype_has_it(dtype):
    x, weight = (torch.randn(2, 40, 32).to(dtype) for _ in range(2))
    got = nm_product(x, weight[0], 2, 8)
    assert got.dtype == dtype and got.shape == (2, 40, 40)
    torch.testing.assert_close(got, x @ (weight[0] * nm_mask(weight[0], 2, 8)).mT)


def test_a_weight_that_is_not_a_number_is_the_smallest_and_hurts_no_other_group():
    x, weight = torch.ones(64, 16), torch.ones(3, 16)
    weight[1, 2] = torch.nan
    got = nm_product(x, weight, 2, 8)
    assert bool((got[:, [0, 2]] == 4).all()) and bool((got[:, 1] >= 2).all())


def test_the_product_keeps_the_rules_of_torch_library():
    x, weight = torch.randn(64, 16), torch.randn(3, 16)
    for backend in BACKENDS:
        torch.library.opcheck(torch.ops.sparseflash.nm_product.default, (x, weight, 2, 8, backend))
    compiled = torch.compile(lambda x, w: nm_product(x, w, 2, 8), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), nm_product(x, weight, 2, 8))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
def test_the_entry_refuses_what_does_not_fit():
    import ctypes

    from sparseflash.backends import cpu
    from sparseflash.backends.cpu.nm import NMCall

    room, sizes = torch.ones(1024), {"T": 2, "K": 8, "O": 3, "n": 2, "m": 8, "threads": 1}

    def call(**changes):
        own = NMCall(size=ctypes.sizeof(NMCall), x_row=8, w_out=8, w_in=1, **sizes)
        own.x, own.w, own.y = room.data_ptr(), room.data_ptr(), room.data_ptr() + 2048
        for name, value in changes.items():
            setattr(own, name, value)
        return cpu.native().library.sf_nm(ctypes.byref(own), cpu.native().fp32)

    assert call() == 0
    wrong = {
        "size": (0, 8),
        "T": (-1, 2**40),
        "K": (-1, 7, 2**40),
        "O": (-1, 2**40),
        "n": (0, 9),
        "m": (0, 65, 3),
    }
    wrong |= {"x_row": (-1, 2**62), "w_out": (-1, 2**62), "w_in": (-1, 2**62), "threads": (0, -1)}
    wrong |= {name: (None, room.data_ptr() + 1) for name in ("x", "w", "y")}
    for name, values in wrong.items():
        for value in values:
            assert call(**{name: value}) == 3, (name, value)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_in_float32_is_the_layer_in_float64(rule):
    found = layer(rule, shape=(64, 48))
    short = NMLinear(64, 48, rule=rule)
    short.load_state_dict(found.state_dict())
    with torch.no_grad():
        found.weight.copy_(short.weight)
        found.bias.copy_(short.bias)
    x = torch.randn(3, 50, 64)
    ends = []
    for one, kind in ((found, torch.float64), (short, torch.float32)):
        own = x.to(kind).requires_grad_()
        (one(own).square().sum() / 1000).backward()
        ends.append([own.grad, one.weight.grad, one.bias.grad])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(b.double(), a, atol=1e-5, rtol=1e-4)


def surrogate(found, x, g, product):
    """y, dx, dW and db as the papers define them, from dense products of masked weights."""
    weight = found.weight.detach()
    front = nm_mask(weight, found.n, found.m, 1)
    back = {"bdwp": nm_mask(weight, found.n, found.m, 0), "sr-ste": front}.get(
        found.rule, torch.ones_like(front)
    )

    def gradients(masked):
        x_, w_ = x.detach().requires_grad_(), masked.clone().requires_grad_()
        y = product(x_, w_)
        return y.detach(), *torch.autograd.grad(y, (x_, w_), g)

    y, _, dw = gradients(weight * front)
    dx = gradients(weight * back)[1]
    return y, dx, dw + found.decay * weight * ~front


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n, m", [(2, 8), (2, 4), (8, 8)])
@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32), (0, 32), (1, 32)])
def test_a_linear_layer_is_its_masked_products(rule, n, m, shape):
    found = layer(rule, n, m)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = found(x)
    g = torch.randn_like(y)
    y.backward(g)
    want = surrogate(found, x, g, torch.nn.functional.linear)
    for a, b in zip((y - found.bias, x.grad, found.weight.grad), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(found.bias.grad, g.reshape(-1, 16).sum(0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "how", [{}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": (0, 3), "dilation": 2}]
)
def test_a_convolution_is_its_masked_products(rule, how):
    torch.manual_seed(1)
    found = NMConv2d(16, 24, (3, 2), n=2, m=8, rule=rule, decay=0.3, dtype=torch.float64, **how)
    x = torch.randn(2, 16, 9, 11, dtype=torch.float64, requires_grad=True)
    y = found(x)
    g = torch.randn_like(y)
    y.backward(g)
    want = surrogate(found, x, g, lambda a, w: torch.nn.functional.conv2d(a, w, **how))
    bias = found.bias[:, None, None]
    for a, b in zip((y - bias, x.grad, found.weight.grad), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


def test_the_gradient_of_x_is_none_of_y_unless_all_weights_count():
    x = torch.randn(1, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer(n=8), x)
    assert torch.autograd.gradcheck(layer("sr-ste", decay=0.0), x)
    assert not torch.autograd.gradcheck(layer(), x, raise_exception=False)


def test_all_of_m_is_a_dense_layer_bit_for_bit():
    found, dense = NMLinear(32, 16, n=8, m=8), torch.nn.Linear(32, 16)
    dense.load_state_dict(found.state_dict())
    for made in (found, dense):
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        torch.manual_seed(2)
        for _ in range(3):
            made(torch.randn(5, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(found.weight, dense.weight, atol=0, rtol=1e-6)  # the bias is added apart


def test_compiled_and_in_bf16_it_is_the_same():
    found = NMLinear(64, 32)
    x = torch.randn(5, 64)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), found(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = found(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), found(x), atol=0.02, rtol=0.02)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        x.requires_grad_()
        (first,) = torch.autograd.grad(found(x).square().sum(), x, create_graph=True)
        first.sum().backward()


# what it promises


@pytest.mark.parametrize("rule, share", [("bdwp", 0.5), ("sr-ste", 0.5), ("one-sided", 0.75)])
def test_multiplications_are_counted(rule, share):
    found = layer(rule)
    counts = found.multiplications(100)
    assert sum(counts) / (3 * 100 * 32 * 16) == share == found.share()
    kept = [int(mask.sum()) * 100 for mask in found.masks()]
    assert list(counts) == [*kept, 100 * 32 * 16]


def test_a_planted_pattern_is_found():
    """Of a teacher whose weight is 2:8 the mask finds all; a mask that does not move cannot."""
    torch.manual_seed(3)
    teacher = torch.randn(16, 32)
    planted = nm_mask(torch.rand(16, 32), 2, 8, 1)
    teacher = teacher.sign() * (0.5 + teacher.abs()) * planted
    found = NMLinear(32, 16, bias=False)
    start = float((found.masks()[0] & planted).sum() / planted.sum())
    optimizer = torch.optim.Adam(found.parameters(), lr=0.02)
    for _ in range(250):
        x = torch.randn(64, 32)
        (found(x) - x @ teacher.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert start < 0.4
    assert float((found.masks()[0] & planted).sum() / planted.sum()) >= 0.99


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: NMLinear(30, 16), "30 inputs: expected a multiple of m=8"),
        (lambda: NMLinear(32, 10), "10 outputs: expected a multiple of m=8, or rule='sr-ste'"),
        (lambda: NMLinear(32, 16, n=9), "n=9, m=8: expected 1 <= n <= m"),
        (lambda: NMLinear(32, 16, rule="both"), "rule='both': expected 'bdwp' or"),
        (lambda: NMLinear(32, 16, decay=-1.0), "decay=-1.0: expected a number >= 0"),
        (lambda: NMConv2d(16, 16, 0), "kernel_size=0: expected an int >= 1, or two"),
        (lambda: NMLinear(32, 16)(torch.randn(3, 30)), r"x: \[3, 30\]; expected \[..., in_features=32\]"),
        (lambda: NMConv2d(16, 16, 3)(torch.randn(16, 5, 5)), r"expected \[B, 16, H, W\]"),
        (lambda: nm_mask(torch.randn(3, 8), 2, 8, 0), "3 weights along dim 0: expected a multiple of m=8"),
    ],
)
def test_bad_input_is_named(make, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        make()
    assert NMLinear(32, 10, rule="sr-ste")(torch.randn(3, 32)).shape == (3, 10)
