"""Numbers that overflow or cancel, PyTorch functions as programs, threads, and the command."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparseflash import SparseFlashError
from sparseflash.fusion import (
    BYTES,
    GOLDEN,
    RULES,
    Builder,
    Meter,
    Program,
    Tiers,
    centre,
    cost,
    fuse,
    read,
    run,
    simplify,
)


def normal(generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def masked_attention(q, k, v, bias):
    return F.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, -1) @ v


def fused(program: Program) -> Program:
    sizes = dict.fromkeys(program.dims, 128)
    return fuse(program, sizes, tiers=BYTES, least=64).program


@pytest.fixture(scope="module")
def attention() -> tuple[Program, Program]:
    program = read(masked_attention, q="m d", k="n d", v="n l", bias="m n")
    return program, fused(program)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 16])
def test_logits_of_any_size_and_rows_that_see_nothing_are_exact(attention, generator, block):
    q, k, v = normal(generator, 6, 4) * 1e4, normal(generator, 11, 4), normal(generator, 11, 3)
    bias = torch.where(torch.rand(6, 11, generator=generator) < 0.4, -torch.inf, 0.0).double()
    bias[2], bias[3, 1:], bias[4, :-1] = -torch.inf, -torch.inf, -torch.inf
    wanted = masked_attention(q, k, v, bias).nan_to_num(0.0)
    for program in attention:
        meter = Meter()
        (found,) = run(
            program, {"q": q, "k": k, "v": v, "bias": bias}, dict.fromkeys("mndl", block), meter=meter
        )
        assert (found[2] == 0).all()
        assert (found - wanted).abs().max() <= 1e-12 * v.abs().max()
        said = cost(program, {"m": 6, "n": 11, "d": 4, "l": 3}, dict.fromkeys("mndl", block), 8)
        assert said[:4] == (meter.read, meter.written, meter.flops, meter.calls)


def test_without_pairs_large_logits_overflow(attention, generator):
    q, k, v = normal(generator, 6, 4) * 1e4, normal(generator, 11, 4), normal(generator, 11, 3)
    given = {"q": q, "k": k, "v": v, "bias": torch.zeros(6, 11).double()}
    assert not run(replace(attention[1], pairs=False), given)[0].isfinite().all()


def test_a_log_of_a_sum_of_exponentials_is_the_logsumexp(generator):
    b = Builder(s="m n")
    program = b.done(b["s"].apply("exp").sum("n").apply("log"))
    s = normal(generator, 5, 9) * 1e4
    assert torch.equal(run(program, {"s": s}, {"n": 2})[0], torch.logsumexp(s, 1))


def test_a_softmax_over_columns_sums_what_varies_along_its_own_exponent(generator):
    b = Builder(s="m n")
    e = b["s"].apply("exp")
    program = b.done(e * e.sum("m").apply("inverse"))
    s = normal(generator, 5, 9)
    for block in (1, 2, 16):
        (found,) = run(program, {"s": s}, {"m": block, "n": block})
        assert (found - s.softmax(0)).abs().max() < 1e-14


@pytest.mark.parametrize("block", [1, 3, 16])
def test_a_layer_norm_far_from_zero_keeps_its_digits(generator, block):
    x, y = normal(generator, 6, 24) + 3000, normal(generator, 5, 24)
    naive = GOLDEN["layernorm-matmul"]()
    wanted = F.layer_norm(x, (24,)) @ y.mT
    blocks = dict.fromkeys("mnk", block)
    for program in (naive, fused(naive)):
        (found,) = run(centre(program), {"x": x, "y": y}, blocks)
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    x, y = x.float(), y.float()
    wanted = F.layer_norm(x.double(), (24,)) @ y.double().mT
    safe, plain = fused(naive), next(step.program for step in reversed([*simplify(naive)]))
    assert (run(safe, {"x": x, "y": y}, blocks)[0] - wanted).abs().max() < 1e-2
    assert not (run(plain, {"x": x, "y": y}, blocks)[0] - wanted).abs().max() < 1


@pytest.mark.parametrize("first", [0.0, 1e6, -1e3])
def test_a_first_block_far_from_the_rest_costs_no_more_than_its_share(generator, first):
    x, y = normal(generator, 4, 24) + 3000, normal(generator, 5, 24)
    x[:, 0] = first
    wanted = F.layer_norm(x, (24,)) @ y.mT
    program = fused(GOLDEN["layernorm-matmul"]())
    (found,) = run(program, {"x": x, "y": y}, dict.fromkeys("mnk", 1))
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_a_reader_that_needs_the_mean_keeps_it(generator):
    """Only those get x minus something whose result does not show it."""
    program = fused(
        read(lambda x, y: x.sum(-1, keepdim=True) * (F.layer_norm(x, (8,)) @ y.mT), x="m k", y="n k")
    )
    x, y = normal(generator, 5, 8) + 3000, normal(generator, 4, 8)
    wanted = x.sum(-1, keepdim=True) * (F.layer_norm(x, (8,)) @ y.mT)
    (found,) = run(program, {"x": x, "y": y}, {"m": 2, "k": 3, "n": 2})
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert program.centred == () and "first" in str(program)


def test_what_cannot_be_centred_is_refused():
    b = Builder(x="m k")
    mean = b["x"].sum("k") / "k"
    variance = (b["x"] * b["x"]).sum("k") / "k" - mean * mean
    program = replace(b.done(variance + mean), centred=("x",))
    with pytest.raises(SparseFlashError, match="the result depends on the mean of x"):
        centre(program)


# Reading PyTorch

FUNCTIONS = {
    "linear layers": (lambda x, w, c: F.relu(F.linear(x, w, c)), {"x": "m k", "w": "n k", "c": "n"}),
    "a gated layer": (lambda x, w, v: F.silu(x @ w.mT) * (x @ v.t()), {"x": "m k", "w": "n k", "v": "n k"}),
    "a weighted norm": (
        lambda x, w, g: F.rms_norm(x, (5,), g, eps=1e-5) @ w,
        {"x": "m k", "w": "k n", "g": "k"},
    ),
    "a layer norm": (
        lambda x, g, c: F.layer_norm(x, (5,), weight=g, bias=c),
        {"x": "m k", "g": "k", "c": "k"},
    ),
    "a norm of a product": (lambda x, w: F.layer_norm(x @ w.mT, (7,)).exp(), {"x": "m k", "w": "n k"}),
    "statistics": (
        lambda x: (x - x.mean(-1, keepdim=True)) / x.pow(2).sum(-1, keepdim=True).sqrt(),
        {"x": "m k"},
    ),
    "sums": (lambda x: torch.sum(2 - x, 0) / 3 + 1 / torch.exp(x).sum(dim=0), {"x": "m k"}),
    "several results": (lambda x, y: (torch.sigmoid(x) - y, torch.square(x)), {"x": "m k", "y": "m k"}),
    "scaled logits": (
        lambda x, y: torch.softmax(x @ y.transpose(0, 1) / x.shape[1] ** 0.5, dim=-1),
        {"x": "m k", "y": "n k"},
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pytorch_function_is_read_and_fused(name, generator):
    fn, axes = FUNCTIONS[name]
    sizes = {"m": 6, "k": 5, "n": 7}
    program = read(fn, **axes)
    given = {x: normal(generator, *(sizes[dim] for dim in of.split())) for x, of in axes.items()}
    wanted = fn(**given)
    for one in (program, fused(program)):
        found = run(one, given, {"m": 4, "k": 2, "n": 3})
        for a, b in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_the_weight_of_a_norm_is_no_obstacle():
    """Every input is read once."""
    fn, axes = FUNCTIONS["a weighted norm"]
    assert fused(read(fn, **axes)).passes == 4


@pytest.mark.parametrize(
    ("fn", "axes", "message"),
    [
        (lambda x: torch.cumsum(x, 0), {"x": "m k"}, "operator cumsum is not known here; known: add,"),
        (lambda x: x.tanh(), {"x": "m k"}, "operator tanh is not known"),
        (lambda x, y: x @ y, {"x": "m k", "y": "n k"}, r"\('m', 'k'\) @ \('n', 'k'\); expected one name"),
        (lambda x, y: x + y, {"x": "m k", "y": "m n"}, "they do not broadcast; expected the same names"),
        (lambda x: x**3, {"x": "m k"}, "a power of 3; known: 2, 0.5"),
        (lambda x, y: x * y, {"x": "m k"}, "axes of x; expected those of x, y"),
        (lambda x, y: x @ y, {"x": "m k", "y": "k"}, "expected two matrices"),
        (lambda x: x, {"x": "m k"}, "x is an input and an output"),
        (lambda x: F.layer_norm(x.mT, (3,)), {"x": "m k"}, "a norm of a transposed matrix"),
        (lambda x: F.rms_norm(x, (3,)), {"x": "m k"}, "rms_norm without eps, which depends on the dtype"),
    ],
)
def test_what_is_not_known_is_refused_by_name(fn, axes, message):
    with pytest.raises(SparseFlashError, match=message):
        read(fn, **axes)


@pytest.mark.parametrize(
    ("given", "blocks", "message"),
    [
        ({"a": (3, 4)}, {}, "given a; expected a, b"),
        ({"a": (3, 4), "b": (5, 3)}, {}, "b has 3 along k; expected 4"),
        ({"a": (3,), "b": (5, 4)}, {}, r"a has shape \(3,\); expected axes m, k"),
        ({"a": (3, 4), "b": (5, 4)}, {"k": 0}, "a block of k is 0 long"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(given, blocks, message):
    b = Builder(a="m k", b="n k")
    program = b.done(b["a"].dot(b["b"]))
    with pytest.raises(SparseFlashError, match=message):
        run(program, {name: torch.zeros(shape) for name, shape in given.items()}, blocks)


def test_a_product_needs_one_axis_in_common():
    b = Builder(a="m k", b="k m")
    with pytest.raises(SparseFlashError, match="expected one axis in common"):
        b["a"].dot(b["b"])


def test_fuse_says_what_it_was_given():
    program = GOLDEN["attention"]()
    with pytest.raises(SparseFlashError, match="sizes of m; expected m, d, n, l"):
        fuse(program, {"m": 4})
    with pytest.raises(SparseFlashError, match="no rule R10; expected some of R1"):
        fuse(program, dict.fromkeys("mdnl", 16), rules=("R10",))
    with pytest.raises(SparseFlashError, match="no blocks of 16 or more fit into 100 bytes"):
        fuse(program, dict.fromkeys("mdnl", 16), tiers=Tiers(local=100))


# Running in earnest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tiles_on_threads_give_what_one_thread_gives(generator, dtype):
    program = fused(GOLDEN["rmsnorm-swiglu"]())
    sizes = {"m": 70, "d": 12, "h": 20, "n": 9}
    given = {
        name: normal(generator, *(sizes[dim] for dim in axes)).to(dtype) for name, axes in program.inputs
    }
    blocks, before = {"m": 16, "h": 8}, torch.get_num_threads()
    alone, apart = (run(program, given, blocks, threads=n)[0] for n in (1, 3))
    assert torch.equal(alone, apart) and apart.dtype == dtype
    assert torch.get_num_threads() == before


class Sizes(TorchDispatchMode):
    """Remembers the elements of every tensor that is made, views apart."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and not func._schema.is_mutable:
            self.made.append(out.numel())
        return out


def test_a_run_by_row_tiles_makes_nothing_larger_than_a_tile_but_the_result(generator):
    program, sizes = GOLDEN["rmsnorm-swiglu"](), {"m": 256, "d": 12, "h": 20, "n": 9}
    shapes = {name: [sizes[dim] for dim in axes] for name, axes in program.inputs}
    given = {name: normal(generator, *shape) for name, shape in shapes.items()}
    with Sizes() as sizes_of_fused:
        run(fused(program), given, {"m": 8})
    assert [n for n in sizes_of_fused.made if n > 8 * 20] == [256 * 9]
    with Sizes() as sizes_of_naive:
        run(program, given, {"m": 8})
    assert len([n for n in sizes_of_naive.made if n > 8 * 20]) > 10


def test_local_memory_is_that_of_a_tile(generator):
    """Ten times the rows take no more."""
    program = fused(GOLDEN["attention"]())
    found = [cost(program, {"m": m, "n": m, "d": 16, "l": 16}, {"m": 16, "n": 16}).local for m in (64, 640)]
    assert found[0] == found[1]


def test_blocks_are_chosen_that_fit_and_smaller_memory_moves_more():
    program = fused(GOLDEN["attention"]())
    sizes = {"m": 4096, "n": 4096, "d": 64, "l": 64}
    moved = []
    for local in (32 << 10, 128 << 10, 1 << 20):
        found = fuse(program, sizes, tiers=Tiers(local=local))
        assert found.cost(found.program).local <= local
        moved.append(found.cost(found.program).bytes)
    assert moved == sorted(moved, reverse=True) and moved[0] > moved[-1]


def test_repeating_work_is_weighed_against_what_it_saves():
    """Few flops a byte: read again. Many: keep the list."""
    sizes = {"m": 1024, "n": 1024, "d": 64, "l": 256}
    flash = fuse(GOLDEN["attention"](), sizes, tiers=Tiers(1 << 17, bandwidth=1e9, flops=1e13, call=0))
    two = fuse(GOLDEN["attention"](), sizes, tiers=Tiers(1 << 17, bandwidth=1e12, flops=1e9, call=0))
    assert "R6" in [step.rule for step in flash.steps]
    assert flash.cost(flash.program).bytes < two.cost(two.program).bytes
    assert flash.cost(flash.program).flops > two.cost(two.program).flops


def test_the_first_turn_makes_what_the_others_share():
    """R7: with several blocks of values, the sums of a row's exponentials are made once."""
    program = fused(GOLDEN["attention"]())
    (peeled,) = (new for _, new in RULES["R7"][1](program))
    sizes, blocks = {"m": 32, "n": 32, "d": 16, "l": 64}, dict.fromkeys("mndl", 16)
    before, after = (cost(one, sizes, blocks) for one in (program, peeled))
    assert after.flops < before.flops


def test_a_derivation_is_explained_step_by_step():
    found = fuse(GOLDEN["attention"](), {"m": 512, "d": 64, "n": 512, "l": 64})
    said = found.explain()
    assert [line.split()[1] for line in said.splitlines()[: len(found.steps)]] == [
        x.rule for x in found.steps
    ]
    assert re.search(r"R4 swap scale and product +-\d", said)
    assert "one by one" in said and "fused" in said
    assert found.check() < 1e-12
    saved = found.cost(found.start).bytes - found.cost(found.program).bytes
    assert saved > 0


def test_a_picture_shows_what_travels():
    found = fuse(GOLDEN["attention"](), {"m": 512, "d": 64, "n": 512, "l": 64})
    pictures = found.pictures()
    assert list(pictures) == [str(n) for n in range(len(found.steps) + 1)]
    assert pictures["0"].count('class="tag between"') == found.start.passes - 4
    assert 'class="tag between"' not in pictures[str(len(found.steps))]
    for picture in pictures.values():
        ElementTree.fromstring(picture)
