"""Plans of garbage through the native backend: values far out of range may give any result, but harm nothing.

python tests/cpu_fuzz.py FIRST LAST [--sanitize address,undefined]

With --sanitize the library is built with that sanitizer (whose run-time library has to be preloaded), and
conformance cases and concurrent callers run too.
"""

import argparse
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import plans
import sparseflash as sf
from sparseflash.backends import cpu
from sparseflash.backends.numerics import Softmax, Statistics

WIDE = ("span_start", "start", "bits_start")
INTS = (
    *WIDE,
    *("span_full", "span_count", "spans", "full", "count", "index", "bits", "q_order", "k_order"),
    *("q_pos", "k_pos", "k_end", "q_seg", "k_seg"),
)


def garbage(r: random.Random, g: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    """Replace some or all values, slightly or far out of range."""
    info = torch.iinfo(x.dtype)
    size = int(x.abs().max()) + 2 if x.numel() else 2
    low, high = r.choice(
        ((-2, 2 * size), (-size, size), (info.min, info.max), (info.max - 3, info.max), (-5, 0))
    )
    bad = torch.randint(low, min(high, 2**63 - 2) + 1, x.shape, generator=g, dtype=torch.int64).to(x.dtype)
    return torch.where(torch.rand(x.shape, generator=g) < r.choice((0.05, 0.5, 1.0)), bad, x)


def spoiled(seed: int, heads: int, batch: int) -> sf.Plan:
    """A random plan with some of its tensors and numbers replaced, past every check."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    unit = r.choice((1, 3, 16, 40, 64))
    good = plans.example(seed, r.choice(tuple(plans.KINDS)), batch=batch, heads=heads, unit=unit).plan
    plan = object.__new__(sf.Plan)
    for name, value in vars(good).items():
        object.__setattr__(plan, name, value)
    names = [n for n in INTS if getattr(good, n) is not None]
    for name in r.sample(names, r.randint(1, len(names))):
        object.__setattr__(plan, name, garbage(r, g, getattr(good, name)))
    if r.random() < 0.3:
        object.__setattr__(plan, "window", r.choice(((2**70, 0), (2**62, 2**62), (None, 2**63 - 1))))
        object.__setattr__(plan, "sink", r.choice((0, 2**31, 2**70)))
    if r.random() < 0.2 and not isinstance(good.q_offset, torch.Tensor):
        object.__setattr__(plan, "q_offset", r.choice((2**63 - 1, -(2**63), 2**31 - 1)))
    if r.random() < 0.1:  # lists that are long beyond what there is to name
        object.__setattr__(plan, "tile", r.choice((1, 2**31 - 1, 2**62, 0, -1)))
    if r.random() < 0.1:
        object.__setattr__(plan, "unit", r.choice((1, 2**31 - 1, 2**62, 0, -1)))
    return plan


def attempt(seed: int) -> bool:
    """Forward, backward, statistics and decode over a spoiled plan; whether it was run (or refused)."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, (Hq, Hkv) = r.choice((1, 2)), r.choice(((1, 1), (4, 2), (2, 2)))
    plan = spoiled(seed, Hq, B)
    D, Dv, dtype = r.choice((8, 17, 64)), r.choice((8, 40)), r.choice(list(cpu.CODES))
    q = torch.randn(B, Hq, plan.Tq, D, generator=g).to(dtype)
    k, v = (torch.randn(B, Hkv, plan.Tk, n, generator=g).to(dtype) for n in (D, Dv))
    bias = torch.randn(1, Hq, plan.Tk, generator=g) if r.random() < 0.4 else None
    numbers = {"scale": 0.3, "softcap": r.choice((0.0, 2.0))}
    options = {"options": Softmax(**numbers), "key_bias": bias}
    try:
        out, lse, norm = cpu.forward(q, k, v, plan, out_dtype=dtype, normed=True, **options)
        dlse = torch.randn_like(lse)
        cpu.backward(torch.randn_like(out), q, k, v, out, norm, dlse, plan, grad_dtype=None, **options)
        lengths = {"key": plan.Tk, "row": plan.Tq, "entry": 3 * plan.tiles, "diagonal": plan.Tq + plan.Tk - 1}
        for over, width in lengths.items():
            asked = Statistics(over=over, peak=r.random() < 0.5, width=max(width, 0), **numbers)
            cpu.stats(q, k, norm, plan, asked, key_bias=bias)
        for x in ((k, v), [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]):
            cpu.decode(q, *x, (plan, plan), sink_logits=None, **options)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def make_lists(seed: int) -> None:
    """Read a mask, list units of any numbers, transpose lists of any values: all of it or a refusal."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    Tq, Tk, tile, unit = (r.choice((1, 2, 20, 63, 64, 65, 128, 300)) for _ in range(4))
    mask = torch.rand(2, 1, Tq, Tk, generator=g) < r.choice((0.01, 0.5, 0.99))
    cpu.lists.read_mask(r.choice((mask, mask.mT.contiguous().mT, mask[:, :, :1].expand_as(mask))), tile, unit)
    grid = {"Tq": Tq, "Tk": Tk, "tile": tile, "unit": unit, "causal": r.random() < 0.5}
    shape = (2, 1, -(-Tq // tile))
    listed = torch.rand(*shape, -(-Tk // unit), generator=g) < 0.5
    cpu.lists.list_units(listed, **grid, unique=True)
    units = torch.randint(-1, listed.shape[-1], (*shape, 7), generator=g).to(
        r.choice((torch.int32, torch.int64))
    )
    units = garbage(r, g, units) if r.random() < 0.3 else units
    try:
        made = cpu.lists.list_units(units, **grid, unique=r.random() < 0.5)
        lists = [made[n].reshape(2, -1) for n in ("start", "full", "count")]
        spoiled = [garbage(r, g, x) if r.random() < 0.2 else x for x in (*lists, made["index"])]
        cpu.lists.transpose(*spoiled, listed.shape[-1])
    except ValueError:
        return


def callers() -> None:
    """Several Python threads, each with the pool or alone, forward and backward."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 400, 64, generator=g)
    keep = torch.rand(2, 1, 2, 400, generator=g) < 0.5
    jobs = [sf.Plan.dense(400, 400, causal=True), sf.Plan.from_keep(keep[0], keep[1])]
    options = {"options": Softmax(0.125, 0.0), "key_bias": torch.zeros(1, 2, 400)}

    def work(n: int) -> list[torch.Tensor]:
        plan = jobs[n % 2]
        out, lse, norm = cpu.forward(q, k, v, plan, out_dtype=q.dtype, normed=True, **options)
        return [out, lse, *cpu.backward(v, q, k, v, out, norm, None, plan, grad_dtype=None, **options)]

    want = [work(0), work(1)]
    with ThreadPoolExecutor(4) as pool:
        for n, got in enumerate(pool.map(work, range(24))):
            assert all(torch.equal(a, b) for a, b in zip(want[n % 2], got, strict=True))
    print("24 callers agree")


def stored(seed: int) -> None:
    """Decode over records, of which some hold random bytes, to the last byte of their tensor."""
    g = torch.Generator().manual_seed(seed)
    D, T, kept = (int(torch.randint(1, n, (), generator=g)) for n in (200, 150, 10))
    D = D if kept % 2 else 64 * (1 + D // 64)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    q = torch.randn(1, 4, 1, D, generator=g).to(dtype)
    rows = [torch.randn(1, 2, T, D, generator=g).to(dtype) for _ in range(2)]
    k, v = (sf.records.pack(x, sparsity=kept / 10, int8=seed % 5 == 0) for x in rows)
    for x in (k, v):
        lies = torch.rand(x.data.shape[:3], generator=g) < 0.2
        noise = torch.randint(0, 256, x.data.shape, dtype=torch.uint8, generator=g)
        x.data.copy_(torch.where(lies[..., None], noise, x.data))
    sf.decode(q, k, v)


def main() -> None:
    """Run the seeds that were asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--sanitize", default="")
    parser.add_argument("--threads", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cpu.call.SMALL = 0  # threads even for the smallest call
    if given.sanitize:
        extra = (
            "-O1",
            "-g",
            f"-fsanitize={given.sanitize}",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
        )
        cpu.build.COMMON = (*cpu.build.COMMON, *extra)
    ran = sum(attempt(seed) for seed in range(given.first, given.last))
    total = given.last - given.first
    for seed in range(given.first, given.last):
        make_lists(seed)
        stored(seed)
    print(f"{total} plans of garbage, {ran} of them run, none harmful, by {cpu.status()[1]}")
    if given.sanitize:
        import cpu_cases
        import cpu_limits

        callers()
        print(f"{cpu_limits.hold()} calls at the limits of the ops right")
        cases = cpu_cases.sharp()
        for seed, fixed in cases:
            cpu_cases.check(cpu_cases.case(seed, **fixed))
        print(f"{len(cases)} cases right")
    sys.exit(0)


if __name__ == "__main__":
    main()
