"""The Triton backend in Triton's interpreter against fp64; run in a process of its own by test_triton.py.

TRITON_INTERPRET=1 python tests/triton_cases.py --seeds 0 1
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).with_name("ops")))  # what the tests of each op hold is held here too

import plans
import sparseflash as sf
import test_linear
import test_skipping
import test_stats
import test_stick_breaking
import tolerance
from harness import inputs, randn, run, same_bits, unseen
from sparseflash.backends.triton import launch, stick
from sparseflash.backends.triton.launch import multiprocessors
from sparseflash.backends.triton.softmax import packed
from sparseflash.backends.triton.split import work_of
from test_dropout import by_number, left
from test_pair_bias import alibi, standing


def hold(seed: int, kind: str) -> str:
    """One random plan of a kind, forward and backward, with whatever options its seed draws."""
    draw, generator = random.Random(f"{seed}{kind}"), torch.Generator().manual_seed(seed)
    Tq, Tk = draw.choice((1, 15, 33)), draw.choice((16, 31, 40))
    with contextlib.nullcontext() if seed % 2 else unseen():  # as in main memory, or as on a card
        example = plans.example(seed, kind, batch=2, heads=4, Tq=Tq, Tk=Tk)
        plan = example.plan if seed % 2 else example.plan.prepare()
    dtype = draw.choice((torch.float32, torch.float16))
    q, k, v, dout, dlse = inputs(generator, plan.Tq, plan.Tk, D=draw.choice((16, 40)), Dv=24, dtype=dtype)
    k, v = (k[:1], v[:1]) if example.pool else (k, v)
    options = {
        "softcap": draw.choice((None, 3.0)),
        "scale": draw.choice((None, 0.3)),
        "key_bias": draw.choice((None, torch.randn(1, 2, plan.Tk, generator=generator))),
        "sink_logits": draw.choice((None, torch.randn(4, generator=generator))),
    }
    p, slopes = draw.choice((0.0, 0.3)), draw.choice((None, torch.rand(4), torch.rand(2, 4)))
    note = f"{example.line}; {dtype}, dropout {p}, ALiBi {slopes}, " + ", ".join(
        n for n, x in options.items() if x is not None
    )
    options = {n: x for n, x in options.items() if x is not None}
    dropped = {"dropout_p": p, "dropout_seed": seed - 2**40, "alibi_slopes": slopes}
    got = run(q, k, v, plan, backend="triton", dout=dout, dlse=dlse, **options, **dropped)
    if slopes is not None:
        options["pair_bias"] = alibi(slopes, *standing(plan))
    if p:
        options["factor"] = left(p, seed - 2**40, 2, 4, plan.Tq, plan.Tk).double() / (1 - p)
    shares = tolerance.compare(got, q, k, v, example.mask, dout=dout, dlse=dlse, note=note, **options)
    return f"{max(shares.values()):.2f} of what is allowed; {note}"


def decoded(seed: int, kind: str) -> tuple[int, int]:
    """One random plan of a kind: how many programs share a row at most, and how many heads a tile."""
    draw, generator = random.Random(f"{seed}{kind}"), torch.Generator().manual_seed(seed)
    example = plans.example(seed, kind, batch=2, heads=4, Tq=draw.choice((1, 3)), Tk=100)
    plan = example.plan
    q, k, v, *_ = inputs(generator, plan.Tq, plan.Tk, D=40, Dv=24)
    k, v = (k[:1], v[:1]) if example.pool else (k, v)
    bias = torch.randn(1, 2, plan.Tk, generator=generator)
    out, lse = sf.decode(q, k, v, plan, key_bias=bias, return_lse=True, backend="triton")
    tolerance.compare({"out": out, "lse": lse}, q, k, v, example.mask, key_bias=bias, note=example.line)
    group = packed(q, k, plan, bias)
    if not plan.tiles:  # no row is left
        return 0, group
    work = work_of(plan, 2, 4 // max(group, 1), 2 * multiprocessors(q.device))
    return int(work.lists[:, 1].max()), group


def uneven() -> str:
    """Rows of very different length, whose keys are few long spans, or many short ones."""
    q, k, v, *_ = inputs(torch.Generator().manual_seed(2), 2, 400, B=4, D=24, Dv=40)
    ends, key, low = torch.tensor([400, 1, 0, 37]), torch.arange(400), torch.arange(0, 400, 8)
    last = (ends[:, None] - 2 + torch.arange(2))[:, None, :, None]  # the newest key that a query sees
    spans = torch.stack([low.expand(4, -1), torch.minimum(low + 5, ends[:, None]).maximum(low)], -1)
    for plan, mask in (
        (sf.Plan.from_lengths(ends, Tk=400, Tq=2), key <= last),
        (
            sf.Plan.from_spans(spans[:, None, None], Tq=2, Tk=400, tile=2),
            (key % 8 < 5) & (key <= last[:, :, 1:]),
        ),
    ):
        out, lse = sf.decode(q, k, v, plan, return_lse=True, backend="triton")
        mask = mask.expand(4, 1, 2, 400)
        tolerance.compare({"out": out, "lse": lse}, q, k, v, mask, note="uneven rows")
        pieces = work_of(plan, 4, 2, 2 * multiprocessors(q.device)).lists[:, 1]
        assert pieces.max() >= 8 and pieces.min() == 1, pieces
    return "decode: rows of very different length"


def odd_units() -> str:
    """Units that are no power of two, larger and smaller than the kernels' blocks, with bits or full."""
    q, k, v, dout, _ = inputs(torch.Generator().manual_seed(0), 9, 112, B=1, H=1, Hkv=1, D=16)
    mask = torch.rand(1, 1, 9, 112, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., :40], mask[..., 48:80] = False, True
    for unit in (5, 24, 40):
        plan = sf.Plan.from_mask(mask, tile=8, unit=unit)
        got = run(q, k, v, plan, backend="triton", dout=dout)
        tolerance.compare(got, q, k, v, mask, dout=dout, note=f"bits of units of {unit}")
    keep = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    plan = sf.Plan.from_blocks(keep, Tq=9, Tk=112, tile=16, unit=48)
    seen = keep.repeat_interleave(48, -1)[..., :112].expand(1, 1, 9, 112)
    got = run(q, k, v, plan, backend="triton", dout=dout)
    tolerance.compare(got, q, k, v, seen, dout=dout, note="full units of 48")
    return "units of any size"


def far() -> str:
    """Positions that 32 bits do not hold, or that lie further apart, however the plan says them."""
    q, k, v, dout, _ = inputs(torch.Generator().manual_seed(0), 20, 31, B=2, H=1, Hkv=1, D=16)
    end, one = 2**31, torch.tensor

    def check(plan: sf.Plan, note: object) -> None:
        got = run(q, k, v, plan, backend="triton", dout=dout)
        tolerance.compare(got, q, k, v, plan.to_dense(), dout=dout, note=f"positions from {note} on")

    for offset, window in (
        (end - 9, (end - 20, 3)),
        (end - 1, None),
        (-end, (5, end - 5)),
        (one(end - 9), (end - 20, 3)),
        (one([end - 1]), None),
        (one([-end, 3]), (5, end - 5)),
        (one([4]), (5, 0)),
    ):
        given = {"causal": window is None, "window": window, "q_offset": offset}
        check(sf.Plan.dense(20, 31, **given, tile=16), (offset, window))
    # to all the keys that lie so far away that their distance takes 33 bits, and to those beside them
    lists = sf.Plan.dense(20, 31, window=(3 * end // 2, 5), tile=16, q_offset=end - 1)
    lists = replace(lists, span_full=lists.span_full * 0)
    at = torch.cat([torch.arange(16) - end, torch.arange(15) + end - 20])[None, None].int()
    check(replace(lists, k_pos=at), "a key's own place")
    check(replace(lists, q_offset=0, q_pos=at[..., 5:25], k_pos=at), "both sides' own places")
    return "positions near 2^31"


def poisoned() -> str:
    """Keys that nobody sees hold NaN, values too, and all lies elsewhere: no result knows."""
    q, k, v, dout, _ = inputs(torch.Generator().manual_seed(0), 33, 33, D=16)
    mask = torch.rand(1, 1, 33, 33, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 7], mask[..., 20:24] = False, False
    plan = sf.Plan.from_mask(mask, tile=16, unit=16)
    clean = run(q, k, v, plan, backend="triton", dout=dout)
    for x in (k, v):
        x[:, :, 7], x[:, :, 20:24] = torch.nan, torch.inf
    q, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, dout))
    k, v = (torch.stack((x, x), -1)[..., 0] for x in (k, v))  # lanes two apart
    dirty = run(q, k, v, plan, backend="triton", dout=dout)
    assert all(torch.equal(clean[n], dirty[n]) for n in clean)
    return "the same bits with NaN in keys that nobody sees, and with other strides"


def large() -> str:
    """Logits of 1e3 and 1e9, and biases that all keys have: maximum and log-sum stay apart here too."""
    causal, near = sf.Plan.dense(17, 17, causal=True), sf.Plan.dense(17, 17, causal=True, window=(5, 0))
    mask, bias = (
        torch.ones(1, 1, 17, 17).bool().tril(),
        torch.full((1, 1, 17), torch.finfo(torch.float32).min),
    )
    for n, size in enumerate((1e3, 1e9, 1)):
        generator = torch.Generator().manual_seed(n)
        q, k, v, dout, _ = inputs(generator, 17, B=1, H=2, Hkv=1, D=16)
        q, k, sinks = q * size**0.5, k * size**0.5, {"sink_logits": size * randn(generator, 2)}
        for given in (
            (sinks, {"scale": -0.25}) if size > 1 else ({"key_bias": bias}, {"key_bias": bias * 1e-29})
        ):
            plan = (near, causal - near) if given is sinks else causal
            got = run(q, k, v, plan, backend="triton", dout=dout, **given)
            tolerance.compare(got, q, k, v, mask, dout=dout, large=True, **given)
        out, lse = sf.decode(q[:, :, -1:], k, v, return_lse=True, backend="triton", **sinks)
        tolerance.compare({"out": out, "lse": lse}, q[:, :, -1:], k, v, mask[:, :, -1:], large=True, **sinks)
    return "large logits as exact as an eager softmax"


def partial() -> str:
    """Two pieces in fp32, merged and summed, are one call in fp16; delta stands for out."""
    q, k, v, dout, dlse = inputs(torch.Generator().manual_seed(3), 9, 21, D=16, dtype=torch.float16)
    pieces = [
        (slice(a, e), sf.Plan.dense(9, e - a, causal=True, q_offset=12 - a)) for a, e in ((0, 5), (5, 21))
    ]
    given = {"backend": "triton", "out_dtype": torch.float32, "return_lse": True}
    out, lse = sf.merge([sf.attention(q, k[:, :, s], v[:, :, s], plan, **given) for s, plan in pieces])
    given = {"delta": (dout * out).sum(-1), "dlse": dlse, "grad_dtype": torch.float32, "backend": "triton"}
    parts = [
        sf.attention_backward(dout, q, k[:, :, s], v[:, :, s], None, lse, plan, **given) for s, plan in pieces
    ]
    got = {"out": out, "dq": parts[0][0] + parts[1][0]}
    got |= {f"d{name}": torch.cat([part[n] for part in parts], 2) for n, name in ((1, "k"), (2, "v"))}
    assert {x.dtype for x in got.values()} == {torch.float32}
    got = {name: x.half() for name, x in got.items()} | {"lse": lse}
    mask = sf.Plan.dense(9, 21, causal=True, q_offset=12).to_dense()
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)
    return "partial results in fp32"


def skipping() -> str:
    """Chunks far below what their rows have met are left out; a large threshold leaves out none."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = test_skipping.planted(generator, 90, torch.float16, B=1, H=2, Hkv=1, D=16)
    plan, given = sf.Plan.dense(90, 90, causal=True, tile=32), {"return_lse": True, "backend": "triton"}
    out, lse = sf.attention(q, k, v, plan, **given)
    again, same, none = sf.attention(q, k, v, plan, skip_below=1e4, return_skipped=True, **given)
    assert torch.equal(out, again) and torch.equal(lse, same) and not none[..., 1].any()
    _, part, some = sf.attention(q, k, v, plan, skip_below=6.0, return_skipped=True, **given)
    assert 0 < int(some[..., 1].sum()) < int(some[..., 0].sum())
    assert float((lse - part).max()) < 90 * 2.72**-6
    return f"(chunks, skipped): {some.sum((0, 1)).tolist()}"


def linear(seed: int) -> None:
    """Linear attention of one token, of a ragged chunk, and over two segments."""
    generator = torch.Generator().manual_seed(seed)
    for T, dtype in ((1, torch.float16), (63, torch.float32), (300, torch.float16)):
        shape = {"B": 1, "H": 2, "Hkv": 1, "D": 40, "Dv": 24}
        test_linear.hold("triton", generator, T, **shape, dtype=dtype)


def wide() -> str:
    """Heads of 512, and of absorbed latent attention, whose last dimensions have a product of their own."""
    worst, generator = 0.0, torch.Generator().manual_seed(5)
    keep = torch.rand(1, 1, 20, 33, generator=generator) < 0.4
    for D, Dv in ((512, 512), (300, 512), (576, 512), (513, 16)):
        q, k, v, dout, dlse = inputs(generator, 20, 33, B=1, H=2, Hkv=1, D=D, Dv=Dv)
        slopes = {"dout": dout, "dlse": dlse} if D <= 512 else {}
        for plan in (
            sf.Plan.dense(20, 33, causal=True, q_offset=13),
            sf.Plan.from_mask(keep, tile=16, unit=16),
        ):
            got = run(q, k, v, plan, backend="triton", **slopes)
            shares = tolerance.compare(got, q, k, v, plan.to_dense(), note=f"D {D}, Dv {Dv}", **slopes)
            worst = max(worst, *shares.values())
        last, length = q[:, :, -2:], torch.tensor([33])
        found, want = (sf.decode(last, k, v, length, backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    for call, said in (
        (
            lambda: run(q, k, v, plan, backend="triton", dout=dout),
            "gradients of head dimension 513 do not run",
        ),
        (lambda: sf.attention(q, k, k, plan, backend="triton"), "values of 513 dimensions"),
        (
            lambda: sf.attention_stats(q, k, dlse, plan, over="key", backend="triton"),
            "statistics of head dimension 513",
        ),
    ):
        try:
            call()
        except sf.BackendError as error:
            assert said in str(error), error
        else:
            raise AssertionError(f"not refused: {said}")
    return f"wide heads: {worst:.2f} of what is allowed"


def numbered() -> str:
    """Tokens and heads of many, by their numbers."""
    by_number("triton", torch.Generator().manual_seed(8))
    return "some tokens and heads of many draw as all do"


def apart() -> str:
    """dK and dV of launches of their own have the bits of those of one; AMD's wide fp32 is refused."""
    generator = torch.Generator().manual_seed(6)
    q, k, v, dout, dlse = inputs(generator, 20, 33, B=1, H=2, Hkv=1, D=24, Dv=40)
    plan = sf.Plan.from_mask(torch.rand(1, 2, 20, 33, generator=generator) < 0.4, tile=16, unit=16)
    bias = torch.randn(1, 2, 33, generator=generator)
    given = {
        "backend": "triton",
        "dout": dout,
        "dlse": dlse,
        "key_bias": bias,
        "softcap": 5.0,
        "dropout_p": 0.2,
    }
    one, crowded = run(q, k, v, plan, dropout_seed=3, **given), launch.Arguments.crowded
    launch.Arguments.crowded = True
    try:
        same_bits(run(q, k, v, plan, dropout_seed=3, **given), one)
    finally:
        launch.Arguments.crowded = crowded
    q, k, v, dout, dlse = inputs(generator, 3, 3, B=1, H=1, Hkv=1, D=300, Dv=16)
    card, launch.target = launch.target, lambda: ("hip", 0)
    try:
        run(q, k, v, sf.Plan.dense(3, 3), backend="triton", dout=dout)
    except sf.BackendError as error:
        assert "gradients of head dimension 300 in float32" in str(error), error
    else:
        raise AssertionError("not refused: gradients of wide heads in fp32 on an AMD card")
    finally:
        launch.target = card
    return "dK and dV apart: the same bits"


def turned() -> str:
    """Sticks under a scale below 0."""
    generator = torch.Generator().manual_seed(7)
    leaves = [randn(generator, 1, 2, 20, 16).requires_grad_() for _ in "qkv"]
    found = {}
    for backend in ("triton", "reference"):
        out = sf.stick_breaking(*leaves, scale=-0.3, backend=backend)
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    torch.testing.assert_close(*found.values(), rtol=1e-5, atol=1e-5)
    return "sticks under a scale below 0"


def main() -> None:
    """Every kind of plan for every seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 1))
    first, last = parser.parse_args().seeds
    shared = [decoded(seed, kind) for seed in range(first, last) for kind in plans.KINDS]
    assert sum(n > 1 for n, _ in shared) > len(shared) // 4, f"hardly any plan was shared: {shared}"
    assert sum(n > 1 for _, n in shared) >= 3, f"hardly any group was packed: {shared}"
    waves = []

    def at_once(q, plan, slots, count=stick.at_once):
        waves.append((plan.tiles, count(q, plan, slots)))
        return waves[-1][1]

    stick.at_once = at_once
    print(f"decode: (programs that share keys, heads that share a tile): {shared}", flush=True)
    for seed in range(first, last):
        for n, kind in enumerate(plans.KINDS):
            if n % 3 == seed % 3:  # the interpreter takes seconds for each
                kept = torch.float16 if n % 2 else torch.float32
                test_stick_breaking.hold("triton", kind, seed, (1, 17), (16, 31), kept)
            test_stats.hold("triton", kind, seed, (1, 17), (16, 31), (test_stats.OVER[(n + seed) % 4],))
        linear(seed)
    print("linear attention: that of the sum over pairs", flush=True)
    print(f"statistics, sticks: those of the dense weights; (tiles, at once): {waves}", flush=True)
    assert first or any(tiles > wave for tiles, wave in waves), "no stick was broken in several waves"
    for seed in range(first, last):
        for kind in plans.KINDS:
            began = time.perf_counter()
            print(f"{kind}: {hold(seed, kind)} ({time.perf_counter() - began:.1f} s)", flush=True)
    if not first:
        print(
            odd_units(),
            uneven(),
            large(),
            far(),
            partial(),
            skipping(),
            wide(),
            apart(),
            numbered(),
            turned(),
            sep="\n",
            flush=True,
        )
    print(poisoned(), flush=True)


if __name__ == "__main__":
    main()
