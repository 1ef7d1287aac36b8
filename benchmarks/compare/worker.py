"""The process that measures: one tree's `sparseflash`, asked for one round of one case at a time.

It is run as a file, with one tree's `src` first in PYTHONPATH: both trees run this same file, so it uses
nothing but the public API. A question is a line `[case, seconds]` of JSON on its input; the answer is a line
on its output: `{"ms": the fastest call of a round that takes so long}`, or `{"error": why there is none}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
CASES: dict[str, Callable[[Any, int], Run]] = {}
"""Name -> (sparseflash, how many times smaller than it should be) -> the call to time."""
MOST = 2000
"""Calls of a round, however short they are."""


def case(name: str) -> Callable[[Callable[[Any, int], Run]], Callable[[Any, int], Run]]:
    """Register a case."""

    def keep(make: Callable[[Any, int], Run]) -> Callable[[Any, int], Run]:
        CASES[name] = make
        return make

    return keep


# ---------------------------------------------------------------- what is timed


def tensors(length: int, *, dtype: torch.dtype = torch.float32, heads: int = 4) -> list[Tensor]:
    """Give q, k and v, which want gradients, and dout."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, length, 64, generator=generator).to(dtype) for _ in range(4)]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def forward(attention: Callable[..., Tensor], given: list[Tensor]) -> Run:
    """A call without gradients."""
    q, k, v = (x.detach() for x in given[:3])
    return lambda: attention(q, k, v)


def backward(attention: Callable[..., Tensor], given: list[Tensor]) -> Run:
    """The backward alone, of a forward that has run."""
    out = attention(*given[:3])
    return lambda: torch.autograd.grad(out, given[:3], given[3], retain_graph=True)


def both(attention: Callable[..., Tensor], given: list[Tensor]) -> Run:
    """Forward and backward."""
    return lambda: torch.autograd.grad(attention(*given[:3]), given[:3], given[3])


def some_blocks(length: int) -> Tensor:
    """Return blocks of 64, about one of eight, and all of the diagonal."""
    blocks = -(-length // 64)
    some = torch.rand(1, 4, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.125
    return some | torch.eye(blocks, dtype=torch.bool)


def edges(length: int) -> Tensor:
    """Return the edges of eight documents."""
    return torch.linspace(0, length, 9).int()


for dtype in (torch.float32, torch.bfloat16):
    for way in (forward, backward):
        label = f"dense causal, {'fp32' if dtype == torch.float32 else 'bf16'}, {way.__name__}"

        @case(label)
        def _(sf: Any, small: int, dtype: torch.dtype = dtype, way: Any = way) -> Run:
            given = tensors(2048 // small, dtype=dtype)
            return way(lambda q, k, v: sf.attention(q, k, v, causal=True), given)


for way in (forward, backward):

    @case(f"dense causal, BTHD memory, 12 heads, fp32, {way.__name__}")
    def _(sf: Any, small: int, way: Any = way) -> Run:
        *given, dout = tensors(2048 // small, heads=12)
        apart = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given]
        return way(lambda q, k, v: sf.attention(q, k, v, causal=True), [*apart, dout])


for way in (forward, backward):

    @case(f"blocks of 64, one of eight, fp32, {way.__name__}")
    def _(sf: Any, small: int, way: Any = way) -> Run:
        length = 2048 // small
        plan = sf.Plan.from_blocks(some_blocks(length), Tq=length, Tk=length, tile=64, unit=64, causal=True)
        return way(lambda q, k, v: sf.attention(q, k, v, plan), tensors(length))


@case("documents, fp32, forward + backward")
def _(sf: Any, small: int) -> Run:
    plan = sf.Plan.from_documents(edges(4096 // small), causal=True)
    return both(lambda q, k, v: sf.attention(q, k, v, plan), tensors(4096 // small))


@case("hash-sparse, fp32, forward + backward")
def _(sf: Any, small: int) -> Run:
    return both(sf.methods.HashSparse(nb=16), tensors(4096 // small))


@case("qk-sparse, fp32, forward + backward")
def _(sf: Any, small: int) -> Run:
    return both(sf.methods.QKSparse(0.5, 0.5), tensors(2048 // small))


@case("linear attention, fp32, forward + backward")
def _(sf: Any, small: int) -> Run:
    return both(lambda q, k, v: sf.linear_attention(q, k, v), tensors(4096 // small))


@case("stick-breaking, fp32, forward + backward")
def _(sf: Any, small: int) -> Run:
    return both(lambda q, k, v: sf.stick_breaking(q, k, v), tensors(2048 // small))


for name in (
    "minference",
    "flexprefill",
    "pbs-attn",
    "anchor-attention",
    "xattention",
    "flashprefill",
    "block-topk",
):

    @case(f"selection: {name}, 6 heads over 2")
    def _(sf: Any, small: int, name: str = name) -> Run:
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, 4096 // small, 64, generator=generator) for heads in (6, 2))
        method = sf.methods.get(name)
        return lambda: method.select(q, k)


def cache(length: int, dtype: torch.dtype = torch.float32, group: int = 4) -> list[Tensor]:
    """Give the last token of four sequences, and their caches."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8 * group, 1, 64), (4, 8, length, 64), (4, 8, length, 64))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


for dtype in (torch.float32, torch.bfloat16):

    @case(f"decode, {'fp32' if dtype == torch.float32 else 'bf16'}, 4 x 8192 keys")
    def _(sf: Any, small: int, dtype: torch.dtype = dtype) -> Run:
        given = cache(8192 // small, dtype)
        return lambda: sf.decode(*given)


@case("selection: quest, a token over 4 x 8192 keys")
def _(sf: Any, small: int) -> Run:
    q, k, _ = cache(8192 // small)
    method = sf.methods.get("quest", budget=512 // small)
    return lambda: method.select(q, k, {"q_offset": k.shape[2] - 1})


@case("decode, fp32, pages of 16")
def _(sf: Any, small: int) -> Run:
    length = 4096 // small
    q, k, v = cache(length)
    table = torch.randperm(length // 4, generator=torch.Generator().manual_seed(0)).view(4, -1)
    k, v = (x.reshape(1, -1, 8, 64).transpose(1, 2) for x in (k, v))
    plan = sf.Plan.from_pages(table, torch.full((4,), length), page_size=16, Tk=k.shape[2])
    return lambda: sf.decode(q, k, v, plan)


@case("call overhead: decode, 64 keys")
def _(sf: Any, small: int) -> Run:
    given = cache(64)
    return lambda: sf.decode(*given)


@case("call overhead: T = 128, causal, forward")
def _(sf: Any, small: int) -> Run:
    return forward(lambda q, k, v: sf.attention(q, k, v, causal=True), tensors(128, heads=1))


@case("call overhead: T = 128, causal, forward + backward")
def _(sf: Any, small: int) -> Run:
    return both(lambda q, k, v: sf.attention(q, k, v, causal=True), tensors(128, heads=1))


@case("call overhead: T = 128, a plan at hand, forward")
def _(sf: Any, small: int) -> Run:
    plan = sf.Plan.dense(128, 128, causal=True, window=(31, 0))
    return forward(lambda q, k, v: sf.attention(q, k, v, plan), tensors(128, heads=1))


@case("call overhead: T = 128, hash-sparse, forward + backward")
def _(sf: Any, small: int) -> Run:
    return both(sf.methods.HashSparse(nb=4), tensors(128))


@case("call overhead: T = 128, attention_varlen, forward")
def _(sf: Any, small: int) -> Run:
    q, k, v = (x.detach()[0].transpose(0, 1).contiguous() for x in tensors(128)[:3])
    cu = edges(128)
    return lambda: sf.attention_varlen(q, k, v, cu, cu, causal=True)


@case("plan: dense with window and sinks")
def _(sf: Any, small: int) -> Run:
    length = 8192 // small
    return lambda: sf.Plan.dense(length, length, causal=True, window=(255, 0), sink_tokens=4)


@case("plan: documents")
def _(sf: Any, small: int) -> Run:
    cu = edges(8192 // small)
    return lambda: sf.Plan.from_documents(cu, causal=True)


@case("plan: 16 buckets")
def _(sf: Any, small: int) -> Run:
    bucket = torch.randint(0, 16, (1, 4, 8192 // small), generator=torch.Generator().manual_seed(0))
    return lambda: sf.Plan.from_buckets(bucket, bucket)


@case("plan: blocks of 64")
def _(sf: Any, small: int) -> Run:
    length = 8192 // small
    some = some_blocks(length)
    return lambda: sf.Plan.from_blocks(some, Tq=length, Tk=length, tile=64, unit=64, causal=True)


@case("plan: a mask")
def _(sf: Any, small: int) -> Run:
    length = 1024 // small
    mask = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.1
    return lambda: sf.Plan.from_mask(mask)


def two_plans(sf: Any, length: int) -> tuple[Any, Any]:
    """Return a plan of ranges, and one of blocks that has to be walked pair by pair."""
    some = some_blocks(length)[:, :1]
    window = sf.Plan.dense(length, length, causal=True, window=(255, 0))
    return window, sf.Plan.from_blocks(some, Tq=length, Tk=length, tile=64, unit=64)


@case("plan: window & documents, as ranges")
def _(sf: Any, small: int) -> Run:
    window, _ = two_plans(sf, 4096 // small)
    documents = sf.Plan.from_documents(edges(4096 // small), causal=True)
    return lambda: window & documents


@case("plan: window & blocks, pair by pair")
def _(sf: Any, small: int) -> Run:
    window, blocks = two_plans(sf, 2048 // small)
    return lambda: window & blocks


@case("plan: window - blocks")
def _(sf: Any, small: int) -> Run:
    window, blocks = two_plans(sf, 2048 // small)
    return lambda: window - blocks


# ---------------------------------------------------------------- the process


class Rounds:
    """Measures: a case is made and warmed up when it is first asked for, and kept."""

    def __init__(self, sf: Any, small: int) -> None:
        self.sf, self.small = sf, small
        self.kept: dict[str, Run] = {}
        self.failed: dict[str, str] = {}

    def fastest(self, name: str, seconds: float) -> float:
        """Milliseconds of a call: the fastest of one round, which begins with one that does not count.

        The others of a round are slower by what else the machine does, and that is no call's fault.
        """
        if name not in self.kept:
            self.kept[name] = CASES[name](self.sf, self.small)
            end = time.perf_counter() + seconds
            self.kept[name]()
            while time.perf_counter() < end:
                self.kept[name]()
        run, times = self.kept[name], []
        run()  # brings back what the other process has driven out of the caches
        end = time.perf_counter() + seconds
        while not times or (len(times) < MOST and time.perf_counter() < end):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times) * 1e3

    def answer(self, name: str, seconds: float) -> dict[str, Any]:
        """The same, or why there is no figure: an older tree may lack what a case calls."""
        if name not in self.failed:
            try:
                return {"ms": self.fastest(name, seconds)}
            except Exception as error:  # an older tree may fail in any way
                said = (str(error).strip() or "without a word").splitlines()[0]
                self.failed[name] = f"{type(error).__name__}: {said}"
        return {"error": self.failed[name]}


def serve(small: int, threads: int) -> None:
    """Answer questions until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    if threads:
        torch.set_num_threads(threads)
    import sparseflash as sf

    where = sys.modules["sparseflash"].__file__
    status = getattr(sf, "backend_status", sf.backends)()  # an older tree has the older name
    backend = next((name for name, x in status.items() if x.usable), "none")
    print(json.dumps({"path": where, "backend": backend, "threads": torch.get_num_threads()}), file=answers)
    rounds = Rounds(sf, small)
    for line in sys.stdin:
        print(json.dumps(rounds.answer(*json.loads(line))), file=answers)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
