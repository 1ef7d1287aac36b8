"""Everything that needs a GPU, in stages of a few minutes: `python benchmarks/gpu.py check dense`.

Needs the repository, PyTorch and Triton, no network and no installation. Each stage writes
`benchmarks/results/gpu-<stage>.csv` as it goes, so a stage that is cut off keeps what it has; --dry-run walks
through a stage on the CPU in Triton's interpreter, at tiny shapes, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests")]
DRY = "--dry-run" in sys.argv
if DRY:  # decided before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402

import sparseflash as sf  # noqa: E402
from sparseflash import Plan  # noqa: E402
from sparseflash.bench.cases import forward_backward  # noqa: E402
from sparseflash.bench.machine import git_hash  # noqa: E402
from sparseflash.bench.results import write  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
Row = dict[str, Any]


def machine() -> Row:
    """What stands beside every figure."""
    found = {"torch": torch.__version__, "triton": triton.__version__, "git": git_hash()}
    if DRY:
        return found | {"gpu": "interpreter"}
    clocks = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"],
        capture_output=True, text=True,
    )  # fmt: skip
    return found | {"gpu": torch.cuda.get_device_name(), "clocks": clocks.stdout.strip().split("\n")[0]}


def times(runs: dict[str, Callable[[], Any]], rounds: int = 20, budget: float = 30.0) -> dict[str, float]:
    """Median milliseconds of each, one after another round by round; NaN for what does not run here."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in list(runs.items()):
        try:
            for _ in range(1 if DRY else 3):
                run()
            wait()
        except Exception as error:
            print(f"  {name} does not run: {str(error).splitlines()[0][:150]}", flush=True)
            del runs[name]
    began = time.monotonic()
    for _ in range(1 if DRY else rounds):
        for name, run in runs.items():
            found[name].append(once(run))
        if time.monotonic() - began > budget:
            break
    return {name: statistics.median(x) if x else float("nan") for name, x in found.items()}


def once(run: Callable[[], Any]) -> float:
    """Milliseconds of one call, by the device's own clock."""
    if DRY:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def wait() -> None:
    """Wait for the device."""
    if not DRY:
        torch.cuda.synchronize()


def tensors(B: int, H: int, T: int, D: int, dtype: torch.dtype, Hkv: int | None = None) -> list[torch.Tensor]:
    """q, k, v, dout."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (H, Hkv or H, Hkv or H, H)
    q, k, v, dout = (torch.randn(B, h, T, D, generator=generator, device=DEVICE).to(dtype) for h in heads)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def backward(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> Any:
    """A call of the backward alone."""
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def ours(plan: Plan) -> Callable[..., torch.Tensor]:
    """Our kernels, under a plan that is ready."""
    return lambda q, k, v: sf.attention(q, k, v, plan, backend="triton")


def sdpa(kind: str) -> Callable[..., torch.Tensor]:
    """One of torch's dense kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, kind)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def flex(plan: Plan) -> Callable[..., torch.Tensor]:
    """Compiled FlexAttention under the same mask."""
    from torch.nn.attention.flex_attention import flex_attention

    mask, compiled = plan.to_block_mask(), torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def both_ways(cases: dict[str, Callable[..., torch.Tensor]], given: list[torch.Tensor]) -> Iterator[Row]:
    """Forward and backward of each case, interleaved."""
    q, k, v, dout = given
    for name, case in list(cases.items()):
        try:
            case(q, k, v)
        except Exception as error:
            print(f"  {name} does not run: {str(error).splitlines()[0][:150]}", flush=True)
            del cases[name]
    with torch.no_grad():
        forward = times({n: lambda case=case: case(q, k, v) for n, case in cases.items()})
    back = times({n: backward(case(q, k, v), q, k, v, dout) for n, case in cases.items()})
    for name in cases:
        yield {"case": name, "ms_forward": forward[name], "ms_backward": back[name]}


# ---------------------------------------------------------------- stages


def check() -> Iterator[Row]:
    """Every kind of plan against fp64, in every dtype, and thirty repeats bit for bit."""
    import plans
    import tolerance
    from harness import inputs, run

    for dtype in (torch.float32, torch.float16) if DRY else (torch.float32, torch.float16, torch.bfloat16):
        for seed in range(1 if DRY else 6):
            for kind in plans.KINDS:
                small = {"Tq": 17, "Tk": 33} if DRY else {}
                example = plans.example(seed, kind, batch=2, heads=4, **small)
                q, k, v, dout, dlse = inputs(
                    torch.Generator().manual_seed(seed), example.plan.Tq, example.plan.Tk,
                    D=(16, 64, 80, 128, 256, 40)[seed], Dv=(16, 64, 48, 128, 64, 40)[seed], dtype=dtype,
                )  # fmt: skip
                k, v = (k[:1], v[:1]) if example.pool else (k, v)
                to = [x.to(DEVICE) for x in (q, k, v, dout, dlse)]
                row: Row = {"dtype": str(dtype)[6:], "kind": kind, "seed": seed}
                try:
                    results = [
                        run(*to[:3], example.plan.to(DEVICE), backend="triton", dout=to[3], dlse=to[4])
                        for _ in range(2 if DRY else 30 if seed == 1 else 2)
                    ]
                    got = {n: x.cpu() for n, x in results[0].items()}
                    shares = tolerance.compare(
                        got, q, k, v, example.mask, dout=dout, dlse=dlse, note=example.line
                    )
                    same = all(torch.equal(r[n], x) for r in results[1:] for n, x in results[0].items())
                    yield row | {"worst": max(shares.values()), "repeats": len(results), "same_bits": same}
                except Exception as error:
                    yield row | {"error": str(error)[:600]}


def dense() -> Iterator[Row]:
    """Dense causal attention over torch's own kernels and FlexAttention."""
    for D in (64, 128):
        for T in (64,) if DRY else (8192, 16384, 32768, 65536):
            given = tensors(1, 2 if DRY else 32, T, D, torch.float16 if DRY else torch.bfloat16)
            plan = Plan.dense(T, T, causal=True, device=DEVICE).prepare()
            cases = {"sparseflash": ours(plan)}
            if not DRY:
                cases |= {
                    "cudnn": sdpa("CUDNN_ATTENTION"),
                    "flash": sdpa("FLASH_ATTENTION"),
                    "flex": flex(plan),
                }
            size = 4 * given[0].shape[1] * T * T * D / 2
            for row in both_ways(cases, given):
                rates = {"tflops_forward": size / row["ms_forward"] / 1e9}
                rates["tflops_backward"] = 2.5 * size / row["ms_backward"] / 1e9
                yield {"T": T, "D": D, "heads": given[0].shape[1]} | row | rates


def blocks() -> Iterator[Row]:
    """Random 128 x 128 blocks of the causal half, from all of them to a tenth."""
    for D in (64, 128):
        for T in (256,) if DRY else (16384, 32768):
            heads, n = (1, 2) if DRY else (32, T // 128)
            given = tensors(1, heads, T, D, torch.float16 if DRY else torch.bfloat16)
            for density in (1.0, 0.5, 0.25, 0.1):
                generator = torch.Generator().manual_seed(1)
                keep = torch.rand(1, heads, n, n, generator=generator) < density
                keep |= torch.eye(n, dtype=torch.bool)
                plan = Plan.from_blocks(keep, Tq=T, Tk=T, causal=True).prepare().to(DEVICE)
                cases = {"sparseflash": ours(plan)}
                if not DRY:
                    cases |= {"cudnn, dense": sdpa("CUDNN_ATTENTION"), "flex": flex(plan)}
                for row in both_ways(cases, given):
                    yield {"T": T, "D": D, "heads": heads, "density": plan.density} | row


def scfa() -> Iterator[Row]:
    """QK- and hash-sparse attention with all their pre- and post-processing, forward + backward."""
    for T in (64,) if DRY else (8192, 16384, 32768):
        B, H = (1, 2) if DRY else (4, 48)
        q, k, v, dout = tensors(B, H, T, 64, torch.float16 if DRY else torch.bfloat16)
        cases: dict[str, Callable[..., torch.Tensor]] = {} if DRY else {"flash": sdpa("FLASH_ATTENTION")}
        for nb in (4, 16, 64):
            method = sf.methods.HashSparse(nb=nb)
            cases[f"hash nb {nb}"] = lambda q, k, v, m=method: m(q, k, v, backend="triton")
        for drop in (0.3, 0.5, 0.7):
            method = sf.methods.QKSparse(q_drop=drop, k_drop=drop)
            cases[f"qk drop {drop}"] = lambda q, k, v, m=method: m(q, k, v, backend="triton")
        runs = {name: forward_backward(case, q, k, v, dout) for name, case in cases.items()}
        for name, ms in times(runs).items():
            yield {"T": T, "batch": B, "heads": H, "case": name, "ms": ms}


STAGES = {stage.__name__: stage for stage in (check, dense, blocks, scfa)}


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], help="all of them by default")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry-run walks through a stage without one")
    about = machine()
    print(about, flush=True)
    for name in options.stages or STAGES:
        rows: list[Row] = []
        for row in STAGES[name]():
            print(
                name,
                *(f"{n}={x:.4g}" if isinstance(x, float) else f"{n}={x}" for n, x in row.items()),
                flush=True,
            )
            rows.append({"stage": name} | row | about)
            if not DRY:
                write(options.out / f"gpu-{name}.csv", rows)


if __name__ == "__main__":
    main()
