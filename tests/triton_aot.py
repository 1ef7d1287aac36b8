"""What Triton's compiler makes of the shipped kernels for a card that is not here: a table of integers.

    python tests/triton_aot.py --targets sm_90 --dims 64 128 > table.csv

The backend's own launcher is run on tensors in main memory, over a driver that names a target and never
launches: what is compiled is what the launcher would have started, specialised as Triton specialises it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sparseflash import BackendError, Plan
from sparseflash.backends import triton as backend
from sparseflash.backends.numerics import Linear, Softmax, Statistics, Stick
from sparseflash.backends.triton import blocks, softmax

GOLDEN = Path(__file__).with_suffix(".csv")
KIB = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
"""Every target with the shared memory that a program may have there."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIMS = (16, 32, 64, 128, 256)
WIDE = 512
"""The same for attention and decoding; `latent` has more than that."""
LATENT = 576
T, HEADS = 512, 4
PLAIN = ("carry", "merge", "words")
"""Kernels that multiply no matrices."""

PRODUCTS = re.compile(r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync|v_mfma_")


PLAINEST_AND_FULLEST = ("dense", "everything")
"""Plans that are enough where every kernel is compiled for every plan elsewhere."""


class Run(NamedTuple):
    """A call of the backend: under which plan, in which dtype and head dimension."""

    plan: str
    dtype: str
    dim: int
    call: Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One compiled kernel: which, and what it takes."""

    target: str
    kernel: str
    plan: str
    dtype: str
    dim: int
    warps: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's stack."""
    shared: int
    """Bytes of shared memory of a program."""
    products: int
    """Tensor-core instructions in the code; fp32 has none: its products are exact."""

    @property
    def key(self) -> tuple[str | int, ...]:
        return self.target, self.kernel, self.plan, self.dtype, self.dim


def read(source: Path | TextIO) -> list[Row]:
    """A table from a file."""
    if isinstance(source, Path):
        with source.open(newline="") as file:
            return read(file)
    numbers = {f.name for f in fields(Row) if f.type == "int"}
    return [
        Row(**{n: int(x) if n in numbers else x for n, x in line.items()}) for line in csv.DictReader(source)
    ]


def faults(rows: list[Row]) -> list[str]:
    """What is worse than the committed table, or than a card allows: one sentence each."""
    known, found = {row.key: row for row in read(GOLDEN)}, []
    for row in rows:
        was, limit = known.get(row.key), TARGETS[row.target][1]
        if row.spilled:
            found.append(f"{row.key}: spills {row.spilled} bytes")
        if row.shared > limit:
            found.append(f"{row.key}: {row.shared} bytes of shared memory, the card has {limit}")
        if row.dtype != "fp32" and row.kernel not in PLAIN and not row.products:
            found.append(f"{row.key}: does not use the tensor cores")
        if was is None:
            found.append(f"{row.key}: not in the table {GOLDEN.name}; write it anew")
        elif row.registers > was.registers * 1.1:
            found.append(f"{row.key}: {row.registers} registers, the table has {was.registers}")
    return found


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def everything(**given: Any) -> Plan:
    """A plan that has every field, so that every switch is on."""
    plan = Plan.from_blocks(torch.ones(1, 1, T // 128, T // 128, dtype=torch.bool), Tq=T, Tk=T, causal=True)
    tiles, order = plan.tiles, torch.arange(T, dtype=torch.int32)[None, None]
    assert plan.count is not None
    lists = torch.ones(1, 1, tiles, dtype=torch.int32)
    begin, token = torch.arange(tiles)[None, None], ints(1, 1, T)
    fields: dict[str, Any] = {
        "tile": 128, "unit": 128, "causal": True, "window": (ints(HEADS), ints(HEADS)), "sink": ints(HEADS),
        "span_start": begin, "span_full": lists * 0, "span_count": lists,
        "spans": torch.tensor([[0, 128]] * tiles, dtype=torch.int32),
        "start": begin, "full": lists * 0, "count": lists, "index": torch.ones(tiles, dtype=torch.int32),
        "bits": ints(tiles, 128, 4), "bits_start": begin,
        "q_offset": ints(1), "q_order": order, "k_order": order, "q_pos": token, "k_pos": token,
        "k_end": token, "q_seg": token, "k_seg": token,
    }  # fmt: skip
    return Plan(T, T, **(fields | given))


def plans() -> dict[str, Callable[[], Plan]]:
    """The plans whose kernels are shipped for speed, and the one that has everything."""
    blocks = torch.ones(1, HEADS, T // 128, T // 128, dtype=torch.bool)
    return {
        "dense": lambda: Plan.dense(T, T, causal=True),
        "blocks": lambda: Plan.from_blocks(blocks, Tq=T, Tk=T, causal=True),
        "buckets": lambda: Plan.from_buckets(ints(1, HEADS, T), ints(1, HEADS, T), causal=True),
        "documents": lambda: Plan.from_documents(torch.tensor([0, 200, T]), causal=True),
        "rules": lambda: everything(window=(9, 9), sink=1, q_offset=0, bits=None, bits_start=None),
        "everything": everything,
    }


def attention(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """Forward and backward, the one with everything also under a softcap and a bias."""
    cap = named == "everything"
    how: dict[str, Any] = {"options": Softmax(0.1, 30.0 if cap else 0.0)}
    how["key_bias"] = torch.zeros(1, HEADS, T) if cap else None
    if named == "dense":
        met = torch.zeros(*q.shape[:2], 2, dtype=torch.int64)
        backend.forward(q, q, q, plan, **how, out_dtype=dtype, normed=True, skipped=met)
    out, _, norm = backend.forward(q, q, q, plan, **how, out_dtype=dtype, normed=True)
    with contextlib.suppress(BackendError):  # of wide heads in fp32, which AMD's registers do not hold
        backend.backward(out, q, q, q, out, norm, None, plan, **how, grad_dtype=None)


def dropout(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """The same with dropout."""
    how: dict[str, Any] = {
        "options": Softmax(0.1, 0.0, dropout=0.1),
        "seed": torch.zeros((), dtype=torch.int64),
    }
    how["key_bias"] = torch.zeros(1, HEADS, T) if named == "everything" else None
    out, _, norm = backend.forward(q, q, q, plan, **how, out_dtype=dtype, normed=True)
    backend.backward(out, q, q, q, out, norm, None, plan, **how, grad_dtype=None)


def alibi(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """The same with slopes of distances."""
    how: dict[str, Any] = {"options": Softmax(0.1, 0.0), "alibi_slopes": torch.zeros(HEADS)}
    how["key_bias"] = torch.zeros(1, HEADS, T) if named == "everything" else None
    out, _, norm = backend.forward(q, q, q, plan, **how, out_dtype=dtype, normed=True)
    backend.backward(out, q, q, q, out, norm, None, plan, **how, grad_dtype=None)


def latent(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """Keys whose first dimensions are the values, as absorbed latent attention has them: no gradients."""
    how: dict[str, Any] = {"options": Softmax(0.1, 0.0)}
    how["key_bias"] = torch.zeros(1, HEADS, T) if named == "everything" else None
    with contextlib.suppress(BackendError):
        backend.forward(q, q, q[..., :WIDE], plan, **how, out_dtype=dtype, normed=True)
    if named == "dense":
        lengths, one = Plan.from_lengths(torch.tensor([T]), Tk=T), q[:, :1]
        backend.decode(q[:, :, :1], one, one[..., :WIDE], (lengths,), **how, sink_logits=None)


def decode(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """One query a head over a cache that heads share in pairs; with everything, the plan's own queries."""
    cap = named == "everything"
    how: dict[str, Any] = {"options": Softmax(0.1, 30.0 if cap else 0.0)}
    how["key_bias"] = torch.zeros(1, HEADS, T) if cap else None
    if not cap:
        plan, q = Plan.from_lengths(torch.tensor([T]), Tk=T), q[:, :, :1]
    k = torch.zeros(1, HEADS if cap else HEADS // 2, T, q.shape[3], dtype=dtype)
    with contextlib.suppress(BackendError):  # as above
        backend.decode(q, k, k, (plan,), **how, sink_logits=None)


def statistics(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """What is summed over rows, keys, entries, diagonals and blocks."""
    cap = named == "everything"
    numbers, bias = {"scale": 0.1, "softcap": 30.0 if cap else 0.0}, torch.zeros(1, HEADS, T) if cap else None
    widths = {"row": T, "key": T, "entry": 2 * plan.tiles, "diagonal": 2 * T - 1, "block": (T // 64) ** 2}
    for over, width in widths.items():
        asked = Statistics(over=over, width=width, peak=False, **numbers, tile=64, unit=64)
        backend.stats(q, q, torch.stack([q[..., 0]] * 2), plan, asked, key_bias=bias)


def linear(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """Linear attention, which has no plan, in time (dQ is the same kernel as the forward) and against it."""
    state = torch.zeros(*q.shape[:2], q.shape[3], q.shape[3])
    backend.linear_backward(q, state, q, q, q, torch.ones(HEADS), state, Linear(1.0))


def stick(plan: Plan, named: str, q: torch.Tensor, dtype: torch.dtype) -> None:
    """Stick-breaking, forward and backward."""
    out, rem = backend.stick_forward(q, q, q, plan, Stick(0.1))
    backend.stick_backward(out, rem, q, q, q, plan, Stick(0.1))


OPS = {
    "attention": attention,
    "dropout": dropout,
    "alibi": alibi,
    "latent": latent,
    "decode": decode,
    "statistics": statistics,
    "linear": linear,
    "stick": stick,
}


def _dims(op: str, name: str, dims: list[int]) -> list[int]:
    """The head dimensions of an op, of those asked for; wide ones are for fewer plans."""
    if op == "alibi" and name != "dense":
        return [dim for dim in dims if dim == 64]
    if op in ("dropout", "alibi"):
        return [dim for dim in dims if 64 <= dim <= max(DIMS)]
    if op == "latent":
        return [dim for dim in dims if dim == LATENT]
    wide = op in ("attention", "decode") and name in PLAINEST_AND_FULLEST
    return [dim for dim in dims if dim <= max(DIMS) or (dim == WIDE and wide)]


def runs(
    dims: list[int], dtypes: list[str], names: list[str], ops: list[str], plain: tuple[str, ...]
) -> Iterator[Run]:
    """Everything the backend launches, the ops in `plain` under the plainest plan alone."""
    made = plans()
    for op, name in ((op, name) for op in ops for name in names):
        if op != "attention" and name not in PLAINEST_AND_FULLEST or (op in plain and name != "dense"):
            continue
        plan = made[name]().prepare()
        for dtype in dtypes:
            for dim in _dims(op, name, dims):
                q = torch.zeros(1, HEADS, T, dim, dtype=DTYPES[dtype])
                yield Run(name, dtype, dim, partial(OPS[op], plan, name, q, DTYPES[dtype]))


def compiled_by(run: Callable[[], None]) -> list[tuple[str, Any]]:
    """The kernels that a call would have launched."""
    found: list[tuple[str, Any]] = []
    start = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = start(self, *args, grid=grid, warmup=True, **kwargs)
        band = {0: "", -1: "blocks"}.get(kwargs.get("BAND", 0), "diagonals")
        own = band or ("decode" if kwargs.get("SPLIT") else "")
        name = own or self.__name__.removesuffix("_kernel")
        name += ", backward" if kwargs.get("BACKWARD") else ""
        name += ", statistics" if "F" in kwargs and kwargs["F"].STATS else ""
        name += f", {kwargs['F'].ONLY}" if "F" in kwargs and kwargs["F"].ONLY else ""
        name += ", dropout" if "F" in kwargs and kwargs["F"].DROP else ""
        name += ", alibi" if "F" in kwargs and kwargs["F"].ALIBI else ""
        name += ", skipping" if "F" in kwargs and kwargs["F"].SKIP else ""
        name += ", edges" if kwargs.get("KEEP") else ""
        name += ", against time" if kwargs.get("REVERSE") else ""
        found.append((name, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = start
    return found


def measured(kernel: Any) -> dict[str, int]:
    """Registers, spills, shared memory and tensor-core instructions of a compiled kernel."""
    if "cubin" in kernel.asm:
        binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            said = subprocess.run(
                [binary, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        registers, spilled, text = usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.asm["ptx"]
    else:
        text = kernel.asm["amdgcn"]
        usage = {n: int(x) for n, x in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        registers, spilled = usage["vgpr_count"], usage["private_segment_fixed_size"]
    return {
        "warps": kernel.metadata.num_warps, "registers": registers, "spilled": spilled,
        "shared": kernel.metadata.shared, "products": len(PRODUCTS.findall(text)),
    }  # fmt: skip


def table(
    target: str, dims: list[int], dtypes: list[str], names: list[str], ops: list[str], share: tuple[int, int]
) -> Iterator[Row]:
    """The rows of a target; `share` (i, n) is every n-th of its runs from i on."""
    named = SimpleNamespace(
        get_current_target=lambda: TARGETS[target][0],
        get_current_device=lambda: [*TARGETS].index(target),  # Triton keeps what it compiled device by device
        get_current_stream=lambda device: 0,
    )
    driver.set_active(named)
    blocks.target.cache_clear()
    softmax.multiprocessors = lambda device: 132
    plain: tuple[str, ...] = ("linear",)  # has no plan
    if target != "sm_90":  # fewer elsewhere: the plainest and the fullest, of sticks the plainest
        names, plain = [name for name in names if name in PLAINEST_AND_FULLEST], ("linear", "stick")
        ops = [op for op in ops if op != "alibi"]
    every = [
        run
        for run in runs(dims, dtypes, names, ops, plain)
        if run.dim <= max(DIMS) or run.dtype != "fp16" or target in ("sm_90", "sm_80")  # what bf16 takes
    ]
    for i, run in enumerate(every):
        if i % share[1] == share[0]:
            for kernel, made in dict(compiled_by(run.call)).items():
                yield Row(target, kernel, run.plan, run.dtype, run.dim, **measured(made))


def main() -> None:
    """Print the table as CSV."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_90"])
    parser.add_argument("--dims", nargs="+", type=int, default=[*DIMS, WIDE, LATENT])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--plans", nargs="+", choices=plans(), default=[*plans()])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=[*OPS])
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--expect", help="the version of Triton that this must be")
    given = parser.parse_args()
    assert given.expect in (None, triton.__version__), f"this is Triton {triton.__version__}"
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    writer = csv.DictWriter(sys.stdout, [f.name for f in fields(Row)])
    writer.writeheader()
    for target in given.targets:
        for row in table(target, given.dims, given.dtypes, given.plans, given.ops, given.share):
            writer.writerow(asdict(row))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
