"""Scores of pages and the best of them: three backends against the formula."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

import sparseflash as sf
from sparseflash import SparseFlashError
from sparseflash.backends import cpu
from sparseflash.selection import page_scores, top_indices, top_pages

NATIVE = pytest.mark.skipif(not cpu.status()[0], reason="the native library is not available here")
BACKENDS = ["reference", pytest.param("cpu", marks=NATIVE)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    BACKENDS.append("triton")
LAST = torch.tensor([[0, 5, 25], [30, -1, 24]])


def by_hand(q, rows, last, *, share="", parts=1, sinks=0, near=1, closed=()):
    """One page after another, in fp64."""
    (B, Hq, Tq, _), (_, Hkv, n, _) = q.shape, rows.shape
    group, pages = Hq // Hkv, -(-n // parts)
    out = torch.full((B, Hkv if share else Hq, Tq, pages), -torch.inf, dtype=torch.float64)
    for b, h, t, p in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        at, own = int(last[b % len(last), t]), dict(closed).get(h, near)
        if p > at:
            continue
        if p < sinks or p > at - own:
            out[b, h, t, p] = torch.inf
        elif h not in dict(closed):
            heads = range(h * group, (h + 1) * group) if share else [h]
            page = rows[b, h if share else h // group, p * parts : (p + 1) * parts].double()
            each = torch.stack([page @ q[b, g, t].double() for g in heads])
            out[b, h, t, p] = (each.sum(0) if share == "sum" else each.amax(0)).amax()
    return out


def drawn(generator, w=40, n=77, dtype=torch.float32, heads=(6, 3), Tq=3):
    q = torch.randn(2, heads[0], Tq, w, generator=generator).to(dtype)
    return q, torch.randn(2, heads[1], n, w, generator=generator).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", ["", "sum", "max"])
@pytest.mark.parametrize("parts, w", [(1, 1), (1, 40), (3, 128), (3, 33), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_the_formula_and_the_best_are_the_best_of_them(backend, share, parts, w, dtype, generator):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bf16")
    q, rows = drawn(generator, w, dtype=dtype)
    how = {"share": share, "parts": parts, "sinks": 1, "near": 2, "closed": ((1, 3),)}
    want, got = by_hand(q, rows, LAST, **how), page_scores(q, rows, LAST, backend=backend, **how)
    sharp = want.isfinite()
    assert torch.equal(want[~sharp], got[~sharp].double()) and bool(got[sharp].isfinite().all())
    unit = torch.finfo(torch.float32).eps * w * (q.abs().double().sum((1, 3)).max() * rows.abs().max())
    assert float(torch.where(sharp, want - got, 0).abs().max()) <= unit
    best = top_pages(q, rows, LAST, 7, backend=backend, **how)
    assert torch.equal(best, top_indices(got, 7, got != -torch.inf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_what_comes_later_may_hold_anything(backend, generator):
    q, rows = drawn(generator)
    want = page_scores(q, rows, LAST, backend=backend)
    rows = rows.mT.contiguous().mT
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(page_scores(q, rows, LAST, backend=backend), want)
    rows = rows.clone()
    rows[0, :, 26:] = rows[1, :, 31:] = torch.nan
    torch.testing.assert_close(page_scores(q, rows, LAST, backend=backend), want)
    assert torch.equal(
        top_pages(q, rows, LAST, 200, backend=backend) >= 0,
        top_indices(want, 200, want != -torch.inf) >= 0,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_that_is_no_number_is_the_last_choice(backend):
    rows = torch.tensor([1.0, torch.nan, 3.0, 2.0, 0.0]).view(1, 1, 5, 1)
    for share in ("", "max", "sum"):
        for k, want in ((2, [2, 4]), (4, [0, 2, 3, 4]), (5, [0, 1, 2, 3, 4])):
            best = top_pages(
                torch.ones(1, 2, 1, 1), rows, torch.tensor([[4]]), k, share=share, backend=backend
            )
            assert best[0, 0, 0].tolist() == want
    best = top_pages(torch.ones(1, 1, 1, 1), rows, torch.tensor([[4]]), 2, parts=2, near=0, backend=backend)
    assert best.flatten().tolist() == [1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_nothing_there_is_nothing(backend):
    q = torch.ones(2, 2, 3, 4)
    assert top_pages(q, q[:, :, :0], LAST, 3, backend=backend).shape == (2, 2, 3, 0)
    assert page_scores(q, q[:, :, :0], LAST, backend=backend).shape == (2, 2, 3, 0)
    assert page_scores(q[:0], q[:0], LAST[:1], backend=backend).shape == (0, 2, 3, 3)
    assert bool((top_pages(q, q, LAST * 0 - 1, 3, backend=backend) == -1).all())


def test_both_are_ops_of_pytorch(generator):
    q, rows = drawn(generator, 8, 9)
    ops = torch.ops.sparseflash
    last, rules = LAST.int(), torch.tensor([[1, 1], [2, 0], [1, 1]], dtype=torch.int32)
    for op in (ops.selection_page_scores, ops.selection_top_pages):
        for share, own in (("sum", rules), ("", None)):
            torch.library.opcheck(op.default, (q, rows, last, own, 2, 1, 1, share, 3, ""))
    run = torch.compile(lambda q, rows: top_pages(q, rows, LAST, 3, share="sum"), fullgraph=True)
    assert torch.equal(run(q, rows), top_pages(q, rows, LAST, 3, share="sum"))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"q": torch.ones(2, 4, 3, 40)}, "Hq a multiple of Hkv"),
        ({"rows": torch.ones(2, 3, 7, 41)}, "expected floating point"),
        ({"last": torch.ones(2, 3)}, r"expected integers \[B\|1=2, Tq=3\]"),
        ({"last": torch.ones(2, 4, dtype=torch.int64)}, r"Tq=3\]"),
        ({"k": 0}, "k=0"),
        ({"share": "mean"}, "share='mean'"),
        ({"near": -1}, "near=-1"),
        ({"sinks": 1.5}, "sinks=1.5"),
        ({"parts": 0}, "parts=0"),
        ({"closed": ((6, 1),)}, r"heads 0\.\.5"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, said, generator):
    q, rows = drawn(generator)
    with pytest.raises(SparseFlashError, match=said):
        top_pages(**({"q": q, "rows": rows, "last": LAST, "k": 3} | wrong))


@NATIVE
def test_the_c_entry_refuses_what_does_not_fit():
    from sparseflash.backends.cpu.call import View
    from sparseflash.backends.cpu.selection import PagesCall

    room = torch.ones(64, dtype=torch.int32)

    def call(**changes):
        own = PagesCall(size=ctypes.sizeof(PagesCall))
        for name, kind in PagesCall._fields_:
            if kind is ctypes.c_void_p:
                setattr(own, name, room.data_ptr())
            elif name not in ("size", "dtype", "share", "rows"):
                setattr(own, name, 1)
        own.rows = View(room.data_ptr(), 1, 1, 1, 1)
        for name, value in changes.items():
            setattr(own, name, value)
        return cpu.native().library.sf_pages(ctypes.byref(own), cpu.native().fp32)

    assert call() == 0 and call(scores=None) == 0 and call(index=None) == 0 and call(rules=None) == 0
    for name in ("B", "Hq", "Hkv", "Tq", "n", "w", "pages", "parts", "sinks", "near", "k"):
        for value in (-1, 2**62):
            assert call(**{name: value}) == 3, (name, value)
    for name in ("q", "last"):
        assert call(**{name: None}) == call(**{name: room.data_ptr() + 1}) == 3
    assert call(index=None, scores=None) == call(parts=0) == call(w=0) == call(pages=2) == 3
    assert call(dtype=3) == call(share=3) == call(share=-1) == call(threads=0) == call(size=8) == 3
    assert call(rows=View(None, 1, 1, 1, 1)) == call(rows=View(room.data_ptr() + 1, 1, 1, 1, 1)) == 3
    assert call(rows=View(room.data_ptr(), 1, 1, 2**62, 1), n=4, pages=4) == 3


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_triton_kernel_scores_alike_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "triton and not interpreter",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_plans_of_ascending_lists_are_those_of_any(generator):
    for Tq, Tk, unit, tile, causal in (
        (1, 77, 16, 1, True),
        (5, 77, 8, 2, True),
        (3, 64, 16, 3, False),
        (4, 9, 16, 1, True),
    ):
        R, C = -(-Tq // tile), -(-Tk // unit)
        index = top_indices(
            torch.rand(2, 3, R, C, generator=generator), 3, torch.rand(2, 3, R, C, generator=generator) < 0.7
        )
        frame = {
            "Tq": Tq,
            "Tk": Tk,
            "tile": tile,
            "unit": unit,
            "causal": causal,
            "q_offset": Tk - Tq if causal else 0,
        }
        plan = sf.Plan.from_keys(index, **frame, ascending=True)
        want = sf.Plan.from_keys(index, **frame)
        assert torch.equal(plan.check().to_dense(), want.to_dense())
        assert torch.equal(plan.full, want.full) and torch.equal(plan.count, want.count)
        early = sf.Plan.from_keys(index, **frame | {"q_offset": 3}, ascending=True)
        assert torch.equal(
            early.check().to_dense(), sf.Plan.from_keys(index, **frame | {"q_offset": 3}).to_dense()
        )
