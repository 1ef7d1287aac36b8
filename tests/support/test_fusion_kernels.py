"""Fused programs as Triton kernels: in the interpreter, and compiled for cards that need not be here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparseflash as sf
from sparseflash.fusion import BYTES, GOLDEN, SIZES, Kernel, Program, fuse, run

SCRIPT = Path(__file__).parents[1] / "fusion_kernels.py"


def script(*arguments: str, interpret: bool) -> str:
    places = [str(Path(sf.__file__).parent.parent), str(SCRIPT.parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "TRITON_INTERPRET": str(int(interpret))}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_kernels_give_what_the_definition_does():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    assert "all kernels hold" in script("run", interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_kernels_compile_for_a_card(target):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    assert "all kernels compile" in script("compile", target, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernels_run_on_the_card(name, dtype):
    sizes = {dim: min(n, 1000) for dim, n in SIZES[name].items()}
    program = fuse(GOLDEN[name](), sizes, tiers=BYTES).program
    given = {
        x: torch.randn([sizes[dim] for dim in axes], dtype=dtype, device="cuda") for x, axes in program.inputs
    }
    kernel = Kernel(program, sizes, {dim: min(n, 64) for dim, n in sizes.items()})
    (wanted,) = run(program, {x: t.double() for x, t in given.items()})
    error = (kernel(**given)[0] - wanted).abs().max() / wanted.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def text(name: str) -> tuple[list[str], Program]:
    sizes = dict.fromkeys(SIZES[name], 512)
    program = fuse(GOLDEN[name](), sizes, tiers=BYTES, least=64).program
    return Kernel(program, sizes, dict.fromkeys(sizes, 64)).source.splitlines(), program


def test_numerator_and_denominator_of_attention_share_one_running_maximum():
    lines, _ = text("attention")
    assert sum("tl.maximum" in line for line in lines) == 1
    assert sum("tl.dot" in line for line in lines) == 2
    assert sum("tl.store" in line for line in lines) == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_the_text_loads_every_input_once(name):
    """And the first block of what is centred before that."""
    lines, program = text(name)
    assert sum("tl.load" in line for line in lines) == len(program.inputs) + str(program).count("= first")


def test_what_is_no_kernel_is_refused():
    program, sizes = GOLDEN["attention"](), dict.fromkeys("mdnl", 64)
    with pytest.raises(sf.SparseFlashError, match="10 outermost loops; a kernel has one"):
        Kernel(program, sizes, {})
    found = fuse(program, sizes, rules=("R1", "R2", "R3"))
    with pytest.raises(sf.SparseFlashError, match="goes through global memory; fuse further"):
        Kernel(found.program, sizes, {})
    found = fuse(program, sizes, tiers=BYTES)
    with pytest.raises(sf.SparseFlashError, match="a block of n is 24; expected a power of two"):
        Kernel(found.program, sizes, {"n": 24})
    kernel = Kernel(found.program, sizes, {})
    with pytest.raises(sf.SparseFlashError, match="n has 65; the kernel is for 64"):
        kernel(q=torch.zeros(64, 64), k=torch.zeros(65, 64), v=torch.zeros(65, 64))
