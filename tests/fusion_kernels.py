"""The Triton kernels of the three fused programs, for tests: run in the interpreter, or compiled for a card.

python tests/fusion_kernels.py run            with TRITON_INTERPRET=1
python tests/fusion_kernels.py compile sm_90  without
"""

import sys

import torch

from sparseflash.fusion import BYTES, GOLDEN, RULES, SIZES, Kernel, fuse, run


def programs():
    """Each of them fused, and attention with what a row shares made in the first turn."""
    for name, make in GOLDEN.items():
        sizes = dict.fromkeys(SIZES[name], 512)
        program = fuse(make(), sizes, tiers=BYTES, least=64).program
        yield name.replace("-", "_"), program
        if name == "attention":
            yield "peeled", next(RULES["R7"][1](program)).program


def hold() -> None:
    """Every kernel gives what the definition does: any blocks, strides, large logits, offsets."""
    generator = torch.Generator().manual_seed(0)
    for name, program in programs():
        scale, offset = (100.0, 0.0) if name in ("attention", "peeled") else (1.0, 300.0)
        sizes = {dim: 50 - 7 * i for i, dim in enumerate(program.dims)}
        for blocks in ({}, dict.fromkeys(sizes, 16), {"m": 16, "n": 32}):
            if name == "peeled" and not blocks:
                continue  # there is one turn
            given = {}
            for i, (x, axes) in enumerate(program.inputs):
                wide = torch.randn([sizes[dim] + 3 for dim in axes], generator=generator)
                wide = wide * scale + offset if i == 0 else wide
                given[x] = wide[tuple(slice(sizes[dim]) for dim in axes)]
            kernel = Kernel(program, sizes, blocks, name)
            (found,), (wanted,) = kernel(**given), run(program, {x: t.double() for x, t in given.items()})
            (eager,) = run(program, given, blocks)
            assert found.shape == wanted.shape and found.dtype == torch.float32
            error, bound = ((x - wanted).abs().max() for x in (found, eager))
            assert error <= 2 * bound + 1e-6 * wanted.abs().max(), (name, blocks, error, bound)
            print(f"{name} {blocks or 'whole'}: grid over {kernel.grid}, off by {error:.1e}")
    print("all kernels hold")


def compiled(target: str) -> None:
    """Every kernel compiles in bf16, uses tensor cores, spills nothing and fits into shared memory."""
    import triton
    from triton.compiler import ASTSource

    from triton_aot import TARGETS, measured

    card, limit = TARGETS[target]
    for name, program in programs():
        blocks = dict.fromkeys(program.dims, 32) | {"m": 64}
        kernel = Kernel(program, {dim: 4096 if dim == "m" else 512 for dim in blocks}, blocks, name)
        signature: dict[str, str] = {}
        fixed, aligned = {}, {}
        for i, arg in enumerate(kernel.function.arg_names):
            what, _, rest = arg.partition("_")
            last = what == "stride" and rest.endswith("_1")
            signature[arg] = "constexpr" if last or what == "block" else "i32" if rest else "*bf16"
            if signature[arg] == "constexpr":
                fixed[(i,)] = 1 if last else kernel.blocks[rest]
            else:
                aligned[(i,)] = [["tt.divisibility", 16]]
        source, options = ASTSource(kernel.function, signature, fixed, aligned), {"num_warps": kernel.warps}
        found = measured(triton.compile(source, target=card, options=options))
        print(name, found)
        assert found["products"] > 0 and found["spilled"] == 0 and found["shared"] <= limit, (name, found)
    print("all kernels compile")


if __name__ == "__main__":
    hold() if sys.argv[1] == "run" else compiled(sys.argv[2])
