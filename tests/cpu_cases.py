"""The native CPU backend against fp64 on small, sharp cases. Run as a program it holds one level to them:

SPARSEFLASH_CPU_LEVEL=portable python tests/cpu_cases.py --seeds 0 40
"""

import argparse
import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import plans
import sparseflash as sf
import tolerance
from sparseflash.backends import cpu
from sparseflash.backends.cpu.library import Native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 2, 15, 63, 64, 65, 100, 129, 200)
DIMS = (1, 17, 32, 40, 64, 64, 80, 128)
HEADS = ((1, 1), (2, 2), (4, 2), (6, 3), (8, 1))
LAYOUTS = ("bhsd", "bshd", "lanes apart", "shifted", "one row for all")
SCALES = (None, None, None, 0.3, -0.2, 0.0)


@contextlib.contextmanager
def using(found: Native) -> Iterator[None]:
    """The backend computes with this library instead of the one it would choose."""
    with (
        mock.patch.object(cpu.library, "native", lambda: found),
        mock.patch.object(cpu, "native", lambda: found),
    ):
        yield


@contextlib.contextmanager
def poisoned():
    """Fresh memory holds NaN, in torch's tensors and in the native scratch: reading it too early shows."""
    found = cpu.native()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    found.library.sf_poison(1)
    try:
        yield
    finally:
        found.library.sf_poison(0)
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The yardstick's own products are too small for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tensor(g: torch.Generator, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random [B,H,T,D] tensor whose memory lies in one of several ways."""
    B, H, T, D = shape
    match layout:
        case "bshd":
            x = torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2)
        case "lanes apart":
            x = torch.randn(B, H, T, 2 * D + 1, generator=g).to(dtype)[..., 1::2]
        case "shifted":
            x = torch.randn(B * H * T * D + 3, generator=g).to(dtype)[3:].view(shape)
        case "one row for all":
            x = torch.randn(1, H, 1, D, generator=g).to(dtype).expand(shape)
        case _:
            x = torch.randn(shape, generator=g).to(dtype)
    return x


@dataclass
class Case:
    """Inputs of one call, the mask it has to follow, and the line that makes it again."""

    plan: sf.Plan
    mask: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    options: dict[str, Any]
    line: str


def case(seed: int, **fixed: Any) -> Case:
    """A random case; `fixed` sets what is not to be drawn."""
    r, g = random.Random(f"case {seed}"), torch.Generator().manual_seed(seed)
    B = fixed.get("B", r.choice((1, 1, 2, 3)))
    Hq, Hkv = fixed.get("heads", r.choice(HEADS))
    kind = fixed.get("kind", r.choice(tuple(plans.KINDS)))
    Tq = fixed.get("Tq", r.choice(LENGTHS))
    Tk = fixed.get("Tk", r.choice((Tq, Tq, r.choice(LENGTHS))))
    unit = fixed.get("unit", r.choice((1, 3, 16, 40, 64, 128)))
    example = plans.example(seed, kind, batch=B, heads=Hq, Tq=Tq, Tk=Tk, tile=fixed.get("tile"), unit=unit)
    Tk, plan, mask = example.plan.Tk, example.plan, example.mask
    D = fixed.get("D", r.choice(DIMS))
    Dv = fixed.get("Dv", r.choice((D, D, r.choice(DIMS))))
    dtype = fixed.get("dtype", r.choice(DTYPES))
    layouts = [fixed.get("layout", r.choice(LAYOUTS)) for _ in range(4)]
    scale = fixed.get("scale", r.choice(SCALES))
    if plan.tile <= 8 and (LAYOUTS[-1] in layouts[:2] or scale == 0):  # added up in turn: equal terms drift
        layouts[3] = LAYOUTS[0]
    q = tensor(g, layouts[0], (B, Hq, Tq, D), dtype)
    k = tensor(g, layouts[1], (B, Hkv, Tk, D), dtype)
    v = tensor(g, layouts[2], (B, Hkv, Tk, Dv), dtype)
    dout = tensor(g, layouts[3], (B, Hq, Tq, Dv), dtype)
    dlse = torch.randn(B, Hq, Tq, generator=g) if fixed.get("dlse", r.random() < 0.6) else None
    options: dict[str, Any] = {"scale": scale}
    if fixed.get("softcap", r.random() < 0.3):
        options["softcap"] = r.choice((0.5, 5.0, 30.0))
    if fixed.get("key_bias", r.random() < 0.4) and Tk and B:
        own = r.choice([h for h in range(1, Hq + 1) if Hq % h == 0])
        options["key_bias"] = torch.randn(r.choice((1, B)), own, Tk, generator=g)
    if r.random() < 0.5:  # what no query of a group sees may hold anything
        seen = mask.expand(B, -1, -1, -1)[:, torch.arange(Hq) * mask.shape[1] // Hq].any(2)
        unseen = ~seen.view(B, Hkv, Hq // Hkv, Tk).any(2)[..., None]
        bad = r.choice((float("nan"), float("inf")))
        k, v = torch.where(unseen, bad, k), torch.where(unseen, bad, v)
    line = f"cpu_cases.case({seed}, **{fixed}): {example.line}"
    return Case(plan, mask, q, k, v, dout, dlse, options, line)


def run(c: Case, backend: str | None = "cpu") -> dict[str, Tensor]:
    """Out, lse and all gradients."""
    leaves = {"q": c.q, "k": c.k, "v": c.v}
    options = dict(c.options)
    if "key_bias" in options:
        leaves["bias"] = options["key_bias"]
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    if "bias" in leaves:
        options["key_bias"] = leaves["bias"]
    with poisoned() if backend == "cpu" else contextlib.nullcontext():
        out, lse = sf.attention(
            leaves["q"], leaves["k"], leaves["v"], c.plan, return_lse=True, backend=backend, **options
        )
        ends, slopes = ((out,), (c.dout,)) if c.dlse is None else ((out, lse), (c.dout, c.dlse))
        grads = torch.autograd.grad(ends, list(leaves.values()), slopes)
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        **{f"d{n}": x for n, x in zip(leaves, grads, strict=True)},
    }


def check(c: Case) -> dict[str, float]:
    """Hold one case to the derived tolerance."""
    got = run(c)
    with one_thread():
        return tolerance.compare(
            got, c.q, c.k, c.v, c.mask, dout=c.dout, dlse=c.dlse, note=c.line, **c.options
        )


def check_stats(c: Case) -> None:
    """Sums and maxima of the weights, for an lse that is the case's own, against the reference in fp64."""
    q, k, v = (x.double() for x in (c.q, c.k, c.v))
    _, lse = sf.attention(q, k, v, c.plan, return_lse=True, backend="reference", **c.options)
    for over, reduce in itertools.product(("key", "row", "entry", "diagonal"), ("sum", "max")):
        want, got = (
            sf.attention_stats(*x, lse, c.plan, over=over, reduce=reduce, backend=backend, **c.options)
            for backend, x in (("reference", (q, k)), ("cpu", (c.q, c.k)))
        )
        error = (got.double() - want.double()).abs()
        assert bool((error <= 2e-5 * (1 + want)).all()), (
            f"{over} {reduce}: off by {error.max():.3g}, {c.line}"
        )


def hold(cases: Iterable[tuple[int, dict[str, Any]]]) -> tuple[int, list[str]]:
    """Check cases by seed and what is fixed; how many there were, and what was wrong."""
    wrong, n = [], 0
    for seed, fixed in cases:
        n += 1
        try:
            check(case(seed, **fixed))
        except AssertionError as error:
            wrong.append(str(error))
    return n, wrong


def sharp() -> list[tuple[int, dict[str, Any]]]:
    """Cases that random drawing might miss, as seeds and what is fixed: every kind and dtype, odd shapes."""
    kinds, units = tuple(plans.KINDS), (1, 16, 40, 64)
    found = []
    for n, (Tq, D, Dv) in enumerate(((1, 17, 64), (63, 40, 17), (129, 64, 64), (129, 80, 40))):
        for m, dtype in enumerate(DTYPES):
            for i in range(3):
                at = n + m + i
                found.append(
                    {
                        "kind": kinds[(3 * n + 4 * m + i) % len(kinds)],
                        "unit": units[at % 4],
                        "Tq": Tq,
                        "D": D,
                        "Dv": Dv,
                        "dtype": dtype,
                        "heads": HEADS[at % len(HEADS)],
                        "softcap": i == 1,
                        "key_bias": i == 2,
                    }
                )
    found.append({"kind": "dense", "Tq": 65, "D": 256, "Dv": 256, "heads": (8, 1), "B": 1})
    found += [{"kind": "dense", "Tq": 129, "D": 64, "scale": 0.0, "dtype": x} for x in DTYPES]
    found += [{"kind": kind, "Tq": 0} for kind in ("dense", "keep", "lists")]
    found += [{"kind": "dense", "Tq": 5, "Tk": 0}, {"kind": "buckets", "B": 0, "Tq": 9}]
    return [(1000 + n, fixed) for n, fixed in enumerate(found)]


def main() -> None:
    """Check the sharp cases and a range of random ones at the level that the environment names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 40))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    n, wrong = hold([*sharp(), *((seed, {}) for seed in range(*given.seeds))])
    print("\n\n".join(wrong), file=sys.stderr)
    print(f"{n - len(wrong)} of {n} cases right, {cpu.status()[1]}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
