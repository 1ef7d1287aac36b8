"""Blockbuster: three programs found from their naive forms, by rules that know none of them."""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.fusion import BYTES, GOLDEN, RULES, Meter, Program, centre, cost, fuse, run

FOLDER = Path(__file__).parents[1] / "data" / "fusion"

SIZES = {
    "attention": {"m": 192, "d": 64, "n": 256, "l": 128},
    "layernorm-matmul": {"m": 192, "k": 256, "n": 128},
    "rmsnorm-swiglu": {"m": 192, "d": 128, "h": 256, "n": 128},
}


def inputs(program: Program, sizes: dict[str, int], generator, scale: float = 1.0, dtype=torch.float64):
    return {
        name: torch.randn([sizes[dim] for dim in axes], generator=generator, dtype=torch.float64).to(dtype)
        * scale
        for name, axes in program.inputs
    }


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def torch_layernorm(x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) @ y.mT


def torch_swiglu(x: Tensor, g: Tensor, u: Tensor, w: Tensor) -> Tensor:
    h = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return (F.silu(h @ g.mT) * (h @ u.mT)) @ w.mT


TORCH = {"attention": torch_attention, "layernorm-matmul": torch_layernorm, "rmsnorm-swiglu": torch_swiglu}


@cache
def fused(name: str, rules=tuple(RULES)) -> Program:
    """The fused program before it is centred, where only bytes count."""
    found = fuse(GOLDEN[name](), SIZES[name], tiers=BYTES, least=64, rules=rules)
    return next(step.program for step in reversed(found.steps) if step.rule != "S")


def off(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max().clamp(min=1e-300))


def blockings(program: Program, generator, count: int):
    """All ones, all whole, and random blocks, few of which divide anything."""
    yield dict.fromkeys(program.dims, 1)
    yield {}
    for _ in range(count):
        yield {dim: int(torch.randint(1, 9, (), generator=generator)) for dim in program.dims}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_naive_form_becomes_one_kernel_that_reads_every_input_once(name):
    program = fused(name)
    assert program.passes == len(program.inputs) + len(program.outputs)
    assert program.travelling == {"out"}
    assert len(program.body) == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_its_structure_is_the_committed_one(name):
    """To write them anew: PYTHONPATH=src:tests python tests/support/test_fusion.py"""
    for kind, program in golden(name).items():
        assert f"{program}\n" == (FOLDER / f"{name}-{kind}.txt").read_text(), kind


def golden(name: str) -> dict[str, Program]:
    return {"naive": GOLDEN[name](), "fused": fused(name), "centred": centre(fused(name))}


NEEDED = {
    "attention": {"R1", "R3", "R4", "R6"},
    "layernorm-matmul": {"R1", "R2", "R3", "R4", "R5", "R6"},
    "rmsnorm-swiglu": {"R1", "R2", "R3", "R4", "R6", "R8"},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_without_a_rule_that_is_needed_more_passes_are_left(name):
    best = fused(name).passes
    without = {rule: fused(name, tuple(x for x in RULES if x != rule)).passes for rule in RULES}
    assert {rule for rule, passes in without.items() if passes > best} == NEEDED[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_fused_or_not_the_result_is_torchs(name, generator):
    sizes = {dim: 4 + 3 * i for i, dim in enumerate(GOLDEN[name]().dims)}
    naive, best = GOLDEN[name](), fused(name)
    given = inputs(naive, sizes, generator)
    wanted = TORCH[name](**given)
    for blocks in blockings(naive, generator, 6):
        assert off(run(centre(naive), given, blocks)[0], wanted) < 1e-12
        assert off(run(centre(best), given, blocks)[0], wanted) < 1e-12


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_predicted_bytes_and_flops_are_those_that_are_counted(name, dtype, generator):
    sizes = {dim: 3 + 2 * i for i, dim in enumerate(GOLDEN[name]().dims)}
    found = fuse(GOLDEN[name](), SIZES[name], tiers=BYTES, least=64)
    for program in (found.start, found.operators, *(step.program for step in found.steps)):
        given = inputs(program, sizes, generator, dtype=dtype)
        for blocks in blockings(program, generator, 3):
            meter = Meter()
            run(program, given, blocks, meter=meter)
            said = cost(program, sizes, blocks, dtype.itemsize)
            assert said[:4] == (meter.read, meter.written, meter.flops, meter.calls), f"{blocks}\n{program}"
            assert said.local >= meter.local


def test_fused_attention_moves_what_flash_attention_does(generator):
    """Each tile of queries once, and for each of them all keys and values; nothing of size m x n."""
    program = fused("attention")
    for m, n, d, dv, bm, bn in itertools.product((5, 32), (7, 64), (4,), (6,), (2, 8), (3, 16)):
        sizes, blocks = {"m": m, "n": n, "d": d, "l": dv}, {"m": bm, "n": bn, "d": d, "l": dv}
        meter = Meter()
        run(program, inputs(program, sizes, generator), blocks, meter=meter)
        tiles = -(-m // min(bm, m)) if n > bn else 1
        assert meter.read == 8 * (m * d + tiles * n * (d + dv))
        assert meter.written == 8 * m * dv
        assert cost(program, sizes, blocks, 8)[:2] == (meter.read, meter.written)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for one in GOLDEN:
        for kind, program in golden(one).items():
            (FOLDER / f"{one}-{kind}.txt").write_text(f"{program}\n")
