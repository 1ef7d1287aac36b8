"""What every layer promises, for each row of `nn_cases.py`."""

import copy
import inspect
import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nn_cases
import sparseflash as sf
from cases import CASES
from nn_cases import HEADS, ROWS, WIDTH, one_thread, spun
from sparseflash.backends.numerics import dropout_bar
from sparseflash.backends.reference.dropout import left
from sparseflash.nn.base import rotate

T = 17
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


_one_thread = pytest.fixture(autouse=True)(one_thread)


streaming = pytest.mark.parametrize("row", [row for row in ROWS if row.causal and row.decodes], ids=str)


def draw(generator, B=2, T=T, dtype=torch.float64):
    return torch.randn(B, T, WIDTH, generator=generator, dtype=dtype)


def gradients(call, layer, x, dout, aux=1):
    """y, and the gradients of x and every parameter."""
    x = x.clone().requires_grad_()
    y = call(x)
    loss = (y * dout).sum() + aux * layer.aux_loss
    names, weights = zip(*layer.named_parameters())
    found = torch.autograd.grad(loss, (x, *weights), materialize_grads=True, allow_unused=True)
    return {"y": y.detach(), "x": found[0], **dict(zip(names, found[1:]))}


def close(got, want, tolerance=1e-10):
    for name, x in got.items():
        y = want[name]
        error = (x - y).abs().max() if x.numel() else 0
        assert error <= tolerance * (1 + y.abs().max() if y.numel() else 1), f"{name}: off by {float(error)}"


# ---------------------------------------------------------------- exactness


@every_row
def test_a_layer_is_its_formula_forward_and_backward(row, generator):
    layer, x = row.layer(), draw(generator)
    dout = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    got = gradients(layer, layer, x, dout)
    close(got, gradients(lambda x: row.dense(layer, x), layer, x, dout))
    assert all(bool(g.any()) for g in got.values()), "a parameter without gradient"


@every_row
def test_over_more_than_a_tile_and_on_the_fastest_backend(row, generator):
    layer, x = row.layer(), draw(generator, B=1, T=150)
    dout = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    want = gradients(lambda x: row.dense(layer, x), layer, x, dout)
    close(gradients(layer, layer, x, dout), want, 1e-9)
    got = gradients(fast := row.layer(dtype=torch.float32), fast, x.float(), dout.float())
    for name, y in got.items():  # a score that is rounded may choose another key
        off = (y - want[name]).abs().flatten() / (1 + want[name].abs().max())
        assert float(off.quantile(0.9)) < 1e-4, name


@every_row
def test_gradients_agree_with_finite_differences(row, generator):
    layer, x = row.layer(), draw(generator, B=1, T=7).requires_grad_()
    names, weights = zip(*layer.named_parameters())

    def call(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)


@every_row
def test_in_fp32_the_compiled_backend_agrees_with_fp64(row, generator):
    x = draw(generator)
    want, got = row.layer()(x), row.layer(dtype=torch.float32)(x.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=2e-4)


# ---------------------------------------------------------------- what is seen


@every_row
def test_later_tokens_change_nothing_where_a_layer_is_causal(row, generator):
    layer, x = row.layer(), draw(generator)
    for at in (5, T - 1):
        other = torch.cat([x[:, :at], 3 * draw(generator)[:, at:]], 1)
        got, want = layer(other)[:, :at], layer(x)[:, :at]
        if row.causal:
            close({"y": got, "short": layer(x[:, :at])}, {"y": want, "short": want}, 1e-12)
        else:
            assert float((got - want).detach().abs().max()) > 1e-3


@every_row
def test_packed_documents_stay_apart(row, generator):
    layer, x = row.layer(), draw(generator)
    edges = [0, 7, 7, 8, T]
    apart = torch.cat([layer(x[:, lo:hi]) for lo, hi in zip(edges, edges[1:])], 1)
    close({"y": layer(x, cu_seqlens=torch.tensor(edges))}, {"y": apart})
    close({"y": layer(x, cu_seqlens=edges)}, {"y": apart})


@streaming
@pytest.mark.parametrize("grad", [False, True])
def test_streaming_is_one_shot(row, grad, generator):
    layer, x = row.layer(), draw(generator)
    with torch.set_grad_enabled(grad):
        want = layer(x)
        state = layer.new_state(2)
        parts = [layer(part, state=state) for part in x.split([6, 0, 1, 1, 1, 8] if grad else 1, 1)]
        close({"y": torch.cat(parts, 1)}, {"y": want})
        assert state.length == T


@streaming
def test_a_state_carries_gradient_and_detaches(row, generator):
    layer, x = row.layer(), draw(generator)
    dout = torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def parts(x):
        state = layer.new_state(2)
        return torch.cat([layer(part, state=state) for part in x.split([10, 1, T - 11], 1)], 1)

    close(gradients(parts, layer, x, dout, 0), gradients(layer, layer, x, dout, 0))
    state = layer.new_state(2)
    early = x[:, :10].clone().requires_grad_()
    layer(early, state=state)
    assert state.detach_() is state
    (grad,) = torch.autograd.grad(
        layer(x[:, 10:], state=state).sum() + 0 * early.sum(), early, materialize_grads=True
    )
    assert not grad.any()


# ---------------------------------------------------------------- torch


@every_row
def test_the_same_generator_gives_the_same_weights_and_outputs(row, generator):
    x = draw(generator)
    one, two = row.layer(3), row.layer(3)
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert torch.equal(one(x), two(x)) and torch.equal(one(x), one(x))
    assert not torch.equal(row.layer(4)(x), one(x))
    torch.manual_seed(5)
    one.reset_parameters()
    torch.manual_seed(5)
    two.reset()
    assert torch.equal(one(x), two(x))


@every_row
def test_a_full_graph_gives_what_eager_gives(row, generator):
    layer, x = row.layer(dtype=torch.float32), draw(generator, dtype=torch.float32)
    dout = torch.randn(x.shape, generator=generator)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, layer, x, dout), gradients(layer, layer, x, dout), 1e-5)


@every_row
def test_checkpointing_gives_the_same_gradients(row, generator):
    layer, x = row.layer(), draw(generator).requires_grad_()
    want = torch.autograd.grad(layer(x).sum(), x)[0]
    for reentrant in (False, True):
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, want)


@every_row
def test_layers_are_copied_stored_and_moved(row, generator):
    layer, x = row.layer(), draw(generator)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = row.layer(9)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), want)
    bare = row.make(WIDTH, HEADS, device="meta", dtype=torch.float64, **row.options).to_empty(device="cpu")
    bare.reset(torch.Generator().manual_seed(0))
    if row.prepare is not None:
        row.prepare(bare)
    assert torch.equal(bare(x), want)


@every_row
def test_autocast_and_weights_in_bf16(row, generator):
    layer, x = row.layer(dtype=torch.float32), draw(generator, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.shape == x.shape and bool(got.isfinite().all())
    off = (got.float() - layer(x)).detach().abs().flatten()
    assert float(off.quantile(0.9)) < 0.1  # rounded scores choose other keys here and there
    half = layer.bfloat16()
    got = half(x.bfloat16())
    (got.sum() + half.aux_loss).backward()
    assert got.dtype == torch.bfloat16 and all(w.grad.dtype == torch.bfloat16 for w in half.parameters())
    assert (
        float((got.float() - row.layer(dtype=torch.float32)(x)).detach().abs().flatten().quantile(0.9)) < 0.2
    )


# ---------------------------------------------------------------- edges


@every_row
@pytest.mark.parametrize(("B", "T"), [(2, 1), (2, 0), (0, 5), (1, 2)])
def test_few_tokens_and_none(row, B, T, generator):
    layer, x = row.layer(), draw(generator, B, T).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape and bool(y.isfinite().all())
    (y.sum() + layer.aux_loss).backward()
    assert x.grad.shape == x.shape and bool(x.grad.isfinite().all())
    if row.causal and row.decodes and B:
        state = layer.new_state(B)
        assert torch.allclose(layer(x, state=state), y)


@every_row
def test_a_layer_says_what_it_is(row, generator):
    layer, x = row.layer(), draw(generator)
    text = repr(layer)
    assert text.startswith(type(layer).__name__) and f"{WIDTH}, {HEADS}" in text
    assert layer.positions in ("rotary", "none")
    assert layer.aux_loss.shape == () and not layer.aux_loss.any()
    layer(x)
    assert layer.aux_loss.shape == () and bool(layer.aux_loss.isfinite())
    layer.update()


@every_row
def test_what_a_layer_cannot_do_is_refused(row, generator):
    layer, x = row.layer(), draw(generator)
    for change, message in row.bad:
        with pytest.raises(sf.SparseFlashError, match=message):
            row.layer(**change)
    for width, heads in ((0, 4), (16, 0), (1.5, 4), (True, 1)):
        with pytest.raises(sf.SparseFlashError, match="positive int"):
            row.make(width, heads)
    for bad in (x[0], x[..., :3], x.long(), None):
        with pytest.raises(sf.SparseFlashError, match="expected floating point"):
            layer(bad)
    for edges in ([0, 5], [1, T], [0, 9, 8, T], [0, 2.5, T], []):
        with pytest.raises(sf.SparseFlashError, match="cu_seqlens"):
            layer(x, cu_seqlens=edges)
    plan = sf.Plan.dense(T, T, causal=True)
    if not layer.takes_plan:
        with pytest.raises(sf.SparseFlashError, match="takes no plan"):
            layer(x, plan=plan)
    else:
        with pytest.raises(sf.SparseFlashError, match="plan together with cu_seqlens"):
            layer(x, plan=plan, cu_seqlens=[0, T])
    if not (row.causal and row.decodes):
        with pytest.raises(sf.SparseFlashError, match="no state"):
            layer.new_state(2)
        return
    with pytest.raises(sf.SparseFlashError, match="batch size"):
        layer(x, state=layer.new_state(3))
    with pytest.raises(sf.SparseFlashError, match="state together with cu_seqlens"):
        layer(x, state=layer.new_state(2), cu_seqlens=[0, T])
    with pytest.raises(sf.SparseFlashError, match="expected .*new_state"):
        layer(x, state={})
    if layer.takes_plan:
        with pytest.raises(sf.SparseFlashError, match="plan together with state"):
            layer(x, plan=plan, state=layer.new_state(2))


def test_rotary_positions_are_products_of_complex_numbers(generator):
    x = torch.randn(2, 3, 9, 6, generator=generator, dtype=torch.float64)
    close({"x": rotate(x)}, {"x": spun(x)})
    close({"x": rotate(x[:, :, 4:], 4)}, {"x": spun(x)[:, :, 4:]})


def test_a_plan_stands_in_place_of_the_method(generator):
    edges = [0, 7, 8, T]
    plan = sf.Plan.from_documents(torch.tensor(edges))
    x = draw(generator)
    for layer in (
        sf.nn.SelfAttention(WIDTH, HEADS, method="window", dtype=torch.float64),
        sf.nn.SelfAttention(WIDTH, HEADS, dtype=torch.float64),
        sf.nn.StickBreakingAttention(WIDTH, HEADS, include_self=True, dtype=torch.float64),
    ):
        close({"y": layer(x, plan=plan)}, {"y": layer(x, cu_seqlens=edges)})


def test_only_methods_that_decode_have_a_state():
    with pytest.raises(sf.SparseFlashError, match="does not decode"):
        sf.nn.SelfAttention(WIDTH, HEADS, method="xattention").new_state(1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_self_attention_over_every_method(case, generator):
    method = case.method()
    layer = sf.nn.SelfAttention(64, 4, kv_heads=2, method=method)
    layer.reset(generator)
    x = torch.randn(1, 96, 64, generator=generator).requires_grad_()
    with torch.set_grad_enabled(not method.forward_only):
        y = layer(x)
    if not method.forward_only:
        y.sum().backward()
        assert bool(x.grad.any())
    assert y.shape == x.shape
    if not (method.decodes and getattr(method, "causal", True)):
        with pytest.raises(sf.SparseFlashError, match="no state|does not decode"):
            layer.new_state(1)
        return
    state = layer.new_state(1)
    with torch.no_grad():
        parts = [layer(part, state=state) for part in x.split([64, 1, 30, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), y, atol=1e-4, rtol=1e-4)


def test_layers_that_do_not_fit_together_are_refused():
    with pytest.raises(sf.SparseFlashError, match="one width"):
        sf.nn.Together(sf.nn.SelfAttention(16, 2), sf.nn.SelfAttention(32, 2))
    for parts in ((), (torch.nn.Linear(2, 2),)):
        with pytest.raises(sf.SparseFlashError, match="at least one"):
            sf.nn.Together(*parts)
    one = sf.nn.Together(sf.nn.SelfAttention(16, 2), sf.nn.StickBreakingAttention(16, 2))
    with pytest.raises(sf.SparseFlashError, match="Together.new_state"):
        one(torch.zeros(1, 3, 16), state=sf.nn.SelfAttention(16, 2).new_state(1))
    plan = sf.Plan.dense(3, 3, causal=True)
    assert one(torch.zeros(1, 3, 16), plan=plan).shape == (1, 3, 16)


# ---------------------------------------------------------------- dropout

DROPS = [
    row
    for row in ROWS
    if "dropout" in inspect.signature(row.make).parameters or row.make is sf.nn.LongGenAttention
]


@pytest.mark.parametrize("row", DROPS, ids=str)
def test_dropout_leaves_weights_out_in_training_and_on_average_nothing(row, generator):
    layer, plain, x = row.layer(dropout=0.5), row.layer(), draw(generator)
    assert "dropout=0.5" in repr(layer) and "dropout" not in repr(plain)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    layer.train(), plain.train()
    with torch.no_grad():
        want = plain(x)
        torch.manual_seed(3)
        off = torch.stack([layer(x) - want for _ in range(30)])
        torch.manual_seed(3)
        assert torch.equal(layer(x) - want, off[0]) and not torch.equal(off[0], off[1])
    assert (
        off.mean(0).square().sum() < 3 / 30 * off.square().sum((1, 2, 3)).mean()
    )  # a mean of 30: 1/30 of the square
    for reentrant in (False, True):
        torch.manual_seed(4)
        own = x.clone().requires_grad_()
        again = torch.autograd.grad(layer(own).sum(), own)[0]
        torch.manual_seed(4)
        checkpoint(layer, own, use_reentrant=reentrant).sum().backward()
        assert torch.equal(own.grad, again)


@pytest.mark.parametrize(
    "options", [{"kv_heads": 2}, {"method": sf.methods.Window(window=5)}, {"causal": False}], ids=str
)
def test_a_layer_with_dropout_is_its_formula_with_the_same_weights_left_out(options, generator, monkeypatch):
    layer, x = sf.nn.SelfAttention(WIDTH, HEADS, dropout=0.3, dtype=torch.float64, **options), draw(generator)
    dout = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    torch.manual_seed(5)
    got = gradients(layer, layer, x, dout)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    tokens = torch.arange(T).expand(len(x), HEADS, T)
    factor = left(seed, dropout_bar(0.3), tokens, tokens).double() / 0.7
    monkeypatch.setattr(nn_cases, "DROP", factor)
    close(got, gradients(lambda x: nn_cases.dense_self(layer, x), layer, x, dout))


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, True, "0.1", float("nan")])
def test_a_share_that_is_none_is_refused(p):
    with pytest.raises(sf.SparseFlashError, match="dropout"):
        sf.nn.SelfAttention(WIDTH, HEADS, dropout=p)
