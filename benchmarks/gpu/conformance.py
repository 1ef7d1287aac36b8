"""Right on a card: against fp64, bit for bit the same, no read out of bounds, no wait for the host."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import plans
import sparseflash as sf
import tolerance
from harness import inputs, run
from sparseflash import Plan, methods
from sparseflash.backends.triton import trust
from sparseflash.bench.results import Row

from . import ROOT
from .device import AHEAD, DEVICE, DRY, DTYPE, wait
from .task import Task

KINDS = ("dense", "blocks") if DRY else tuple(plans.KINDS)
DTYPES = (torch.float16,) if DRY else (torch.float32, torch.float16, torch.bfloat16)
DIMS = ((64, 64), (128, 128), (80, 48), (16, 16), (40, 40), (256, 64))[: 1 if DRY else None]
BLOCK = 16 if DRY else 64
REPEATS = 2 if DRY else 30


def check() -> list[Task]:
    """A task for every kind of plan, dtype and head dimension; the first dimension is repeated."""
    return [
        _check(kind, dtype, seed, REPEATS if seed == 0 else 2)
        for seed in range(len(DIMS))
        for dtype in DTYPES
        for kind in KINDS
    ]


def few() -> list[Task]:
    """Of those in half precision a quarter: both dtypes at D = 64, and bf16 at 128."""
    cases = ((torch.float16, 0),) if DRY else ((torch.bfloat16, 1), (torch.float16, 0), (torch.bfloat16, 0))
    own = Task({"kind": "what a first call checks", "dtype": "both", "seed": 0}, trusted)
    found = [_check(kind, dtype, seed, 2) for dtype, seed in cases for kind in KINDS]
    return found if DRY else [own, *found]  # the interpreter takes half a minute for it


def _check(kind: str, dtype: torch.dtype, seed: int, repeats: int) -> Task:
    key: Row = {"kind": kind, "dtype": str(dtype)[6:], "seed": seed}
    return Task(key, functools.partial(_hold, kind, dtype, seed, repeats))


def trusted() -> Iterator[Row]:
    """The library's own short check, on which it depends whether calls without `backend=` run here."""
    device = torch.device("cpu" if AHEAD else DEVICE)
    if AHEAD:
        for _, plan, dtype, D in trust.cases(device):
            shapes = ((1, heads, plan.Tq, D) for heads in (4, 2, 2, 4))
            q, k, v, dout = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
            run(q, k, v, plan, dout=dout, dlse=dout[..., 0].float())
        return
    if found := trust.faults(device):
        raise AssertionError(found)
    yield {"repeats": 1}


def _hold(kind: str, dtype: torch.dtype, seed: int, repeats: int) -> Iterator[Row]:
    small = {"Tq": 17, "Tk": 33} if DRY else {}
    example = plans.example(seed, kind, batch=2, heads=4, **small)
    D, Dv = (16, 16) if DRY else DIMS[seed]
    given = inputs(
        torch.Generator().manual_seed(seed), example.plan.Tq, example.plan.Tk, D=D, Dv=Dv, dtype=dtype
    )
    q, k, v, dout, dlse = given
    k, v = (k[:1], v[:1]) if example.pool else (k, v)
    if AHEAD:  # some lists are as long as their values say
        run(q, k, v, example.plan, dout=dout, dlse=dlse)
        sf.decode(q, k, v, example.plan, return_lse=True)
        return
    on = [x.to(DEVICE) for x in (q, k, v, dout, dlse)]
    plan = example.plan.to(DEVICE)

    def both() -> dict[str, torch.Tensor]:
        found = run(*on[:3], plan, dout=on[3], dlse=on[4])
        found["decoded"], found["decoded_lse"] = sf.decode(*on[:3], plan, return_lse=True)
        return {name: x.cpu() for name, x in found.items()}

    results = [both() for _ in range(repeats)]
    got = results[0]
    decoded = {"out": got.pop("decoded"), "lse": got.pop("decoded_lse")}
    shares = tolerance.compare(got, q, k, v, example.mask, dout=dout, dlse=dlse, note=example.line)
    of_decode = tolerance.compare(decoded, q, k, v, example.mask, note=example.line)
    same = all(torch.equal(other[n], x) for other in results[1:] for n, x in got.items())
    if not same:
        raise AssertionError(f"{repeats} repeats gave different bits: {example.line}")
    yield {
        "D": D, "Dv": Dv, "repeats": repeats, "same_bits": same,
        "worst": max(shares.values()), "worst_decode": max(of_decode.values()),
    }  # fmt: skip


# ---------------------------------------------------------------- on the card alone


def device() -> list[Task]:
    """Selecting, attending and differentiating where every wait for the host is an error; and CUDA graphs."""
    return [
        *(Task({"case": name, "what": "no wait"}, functools.partial(_unwatched, name)) for name in _METHODS),
        *(
            Task({"case": name, "what": "graph"}, functools.partial(_captured, name))
            for name in (() if DRY else _METHODS)
        ),
        Task({"case": "decode", "what": "graph"}, _captured_decode),
    ]


_METHODS: dict[str, Callable[..., Any]] = {
    "hash-sparse": lambda q, k, v: methods.HashSparse(nb=4)(q, k, v),
    "qk-sparse": lambda q, k, v: methods.QKSparse(q_drop=0.5, k_drop=0.5)(q, k, v),
    "window": lambda q, k, v: methods.Window(window=64)(q, k, v),
    "blocks": lambda q, k, v: sf.attention(q, k, v, _blocks(q)),
}


def _blocks(q: torch.Tensor) -> Plan:
    """The blocks with the highest scores of means: a top-k on the card, with a capacity."""
    means = q.detach().float().unflatten(2, (-1, BLOCK)).mean(3)
    scores = means @ means.transpose(-1, -2)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    return Plan.from_blocks(
        keep, Tq=q.shape[2], Tk=q.shape[2], tile=BLOCK, unit=BLOCK, causal=True, capacity=2
    )


def _given(T: int) -> tuple[torch.Tensor, ...]:
    few = {"B": 1, "H": 2, "Hkv": 1} if DRY else {}
    q, k, v, dout, _ = inputs(torch.Generator().manual_seed(0), T, D=32, dtype=DTYPE, **few)
    return tuple(x.to(DEVICE) for x in (q, k, v, dout))


def _both(case: Callable[..., Any], given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    leaves = [x.requires_grad_() for x in given[:3]]
    out = case(*leaves)
    return [out, *torch.autograd.grad(out, leaves, given[3])]


def _unwatched(name: str) -> Iterator[Row]:
    given = _given(32 if DRY else 1024)
    expected = _both(_METHODS[name], given)  # compiles, too
    wait()
    if not DRY:
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = _both(_METHODS[name], given)
    finally:
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")
    yield {"same_bits": _same(got, expected)}


def _captured(name: str) -> Iterator[Row]:
    yield from _replayed(lambda *x: _both(_METHODS[name], x), _given(32 if DRY else 1024))


def _captured_decode() -> Iterator[Row]:
    q, k, v, _ = _given(32 if DRY else 4096)
    lengths = torch.tensor([17, k.shape[2]], device=DEVICE)[: len(q)]
    yield from _replayed(
        lambda q, k, v, n: [sf.decode(q, k, v, n)], (q[:, :, :1].contiguous(), k, v, lengths)
    )


def _replayed(run: Callable[..., list[torch.Tensor]], given: tuple[torch.Tensor, ...]) -> Iterator[Row]:
    """A graph that is replayed on other numbers gives what a call on them gives."""
    if DRY:  # a graph is a card's
        yield {"same_bits": _same(run(*given), run(*given))}
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(*given)
    with torch.no_grad():
        for x in given:
            x.copy_(x.flip(0))
    graph.replay()
    wait()
    yield {"same_bits": _same(results, run(*given))}


def _same(got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    if not same:
        raise AssertionError("the results differ from those of the call before")
    return same


# ---------------------------------------------------------------- compute-sanitizer


def sanitize() -> list[Task]:
    """Each kind of plan under NVIDIA's tools, in a process of its own."""
    return [
        Task({"tool": tool, "kind": kind}, functools.partial(_sanitized, tool, kind))
        for tool in (("memcheck",) if DRY else ("memcheck", "racecheck"))
        for kind in (KINDS[:1] if DRY else KINDS)
    ]


def _tool() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(p) / "bin") for p in places if p)])
    return shutil.which("compute-sanitizer", path=path)


def _sanitized(tool: str, kind: str) -> Iterator[Row]:
    program = _tool()
    if DRY:  # the interpreter's own run of the small set, without the tool
        command = [sys.executable]
    elif program is None:
        raise FileNotFoundError("compute-sanitizer is not installed here (it comes with the CUDA toolkit)")
    else:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable]
    # allocations one by one, so that every overrun leaves its tensor
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, "-m", f"{__package__}.conformance", kind],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=480,
    )  # fmt: skip
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise RuntimeError(" | ".join(said[-12:]))
    yield {"said": said[-1][:200]}


if __name__ == "__main__":
    for row in _hold(sys.argv[1], torch.float16, 0, 1):
        print(row)
