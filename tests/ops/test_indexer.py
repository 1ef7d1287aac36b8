"""`indexer_topk` against its formula in fp64: the choice, its order, ties, ranges, padding, memory."""

from __future__ import annotations

import ctypes

import pytest
import torch

import sparseflash as sf
from harness import BACKENDS, EACH, EVERY, MAIN, peak_memory, randn

SHAPES = [(1, 16, 3, 1), (63, 40, 5, 16), (129, 80, 64, 33), (300, 128, 70, 200)]


def _inputs(generator, Tq, Tk=None, *, B=2, H=4, D=32, dtype=torch.float32, whole=False):
    """q, k, weights; whole numbers where sums are to be exact in any order, with many equal scores."""
    Tk = Tq if Tk is None else Tk
    shapes = ((B, H, Tq, D), (B, Tk, D), (B, H, Tq))
    if whole:
        q, k, w = (torch.randint(-2, 3, s, generator=generator).to(dtype) for s in shapes)
        return q, k, w
    q, k, w = (randn(generator, *s, dtype=dtype) for s in shapes)
    return q, k, w


def _scores(q, k, weights, dtype=torch.float64):
    """The formula."""
    products = (q.to(dtype) @ k.to(dtype)[:, None].transpose(-1, -2)).relu()
    return (products * weights.to(dtype)[..., None]).sum(1)


def _best(scores, seen, topk):
    """The definition, by sorting (score, -index) of every row: int32 [B,Tq,topk]."""
    B, Tq, Tk = scores.shape
    index = torch.full((B, Tq, min(topk, Tk)), -1, dtype=torch.int32)
    for b, of_batch in enumerate(scores.tolist()):
        for s, own in enumerate(of_batch):
            keys = seen[b, s].nonzero()[:, 0].tolist()
            best = sorted(sorted(keys, key=lambda t: (-own[t], t))[:topk])
            index[b, s, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return index


def _causal(B, Tq, Tk, offset=0):
    return (torch.arange(Tk) <= torch.arange(Tq)[:, None] + offset).expand(B, Tq, Tk)


@EVERY
@pytest.mark.parametrize("T, D, H, topk", SHAPES)
def test_what_is_chosen_beats_what_is_not(backend, dtype, T, D, H, topk, generator):
    q, k, weights = _inputs(generator, T, H=H, D=D, dtype=dtype)
    index, got = sf.indexer_topk(q, k, weights, topk, return_scores=True, backend=backend)
    scores, seen = _scores(q, k, weights), _causal(2, T, T)
    chosen = torch.zeros(2, T, T + 1, dtype=torch.bool).scatter_(-1, index.long() % (T + 1), True)[..., :T]
    assert torch.equal(chosen.sum(-1), seen.sum(-1).clamp(max=topk)), "as many as there are, none twice"
    assert not (chosen & ~seen).any()
    # A sum of D products, and of H of these, in fp32 (independent roundings, five standard deviations).
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    terms = ((q.double() ** 2) @ (k.double() ** 2)[:, None].transpose(-1, -2)) * weights.double()[
        ..., None
    ] ** 2
    band = eps * (D + H) ** 0.5 * terms.sum(1).sqrt() + eps * scores.abs()
    worst = (scores + band).masked_fill(~chosen, torch.inf).amin(-1)
    best = (scores - band).masked_fill(chosen | ~seen, -torch.inf).amax(-1)
    assert (worst >= best).all()
    real = index >= 0
    at = index.clamp(min=0).long()
    assert ((got - scores.gather(-1, at)).abs() <= band.gather(-1, at))[real].all()
    assert (got[~real] == -torch.inf).all()
    ascending = torch.where(real, index, T).diff(dim=-1)
    assert ((ascending > 0) | ~real[..., 1:]).all()


@MAIN
def test_of_equal_scores_the_lower_index_is_chosen(backend, dtype, generator):
    for T, topk, H in ((90, 7, 3), (700, 64, 9), (400, 150, 1)):
        q, k, weights = _inputs(generator, T, B=1, H=H, D=8, dtype=dtype, whole=True)
        want = _best(_scores(q, k, weights), _causal(1, T, T), topk)
        assert torch.equal(sf.indexer_topk(q, k, weights, topk, backend=backend), want), (T, topk)


@MAIN
def test_ranges_padding_and_offsets(backend, dtype, generator):
    Tq, Tk, topk = 37, 150, 20
    q, k, weights = _inputs(generator, Tq, Tk, H=3, D=16, dtype=dtype, whole=True)
    scores = _scores(q, k, weights)
    keep = torch.rand(2, Tk, generator=generator) < 0.7
    first = torch.randint(0, 120, (1, Tq), generator=generator)
    offset = torch.tensor([113, -20])
    at = torch.arange(Tk)
    seen = (
        (at <= torch.arange(Tq)[:, None] + offset[:, None, None]) & keep[:, None] & (at >= first[..., None])
    )
    dirty = k.masked_fill(~keep[..., None], float("nan"))
    options = {"k_keep": keep, "first_key": first, "q_offset": offset, "backend": backend}
    got = sf.indexer_topk(q, dirty, weights, topk, **options)
    assert torch.equal(got, _best(scores, seen, topk))
    assert (got == -1).all(-1).any(), "a query that sees nothing is among them"
    everything = torch.ones(2, Tq, Tk, dtype=torch.bool)
    got = sf.indexer_topk(q, k, weights, topk, causal=False, scale=2.0, backend=backend)
    assert torch.equal(got, _best(scores, everything, topk))
    got = sf.indexer_topk(q, k, weights, 1000, causal=False, backend=backend)
    assert torch.equal(got, torch.arange(Tk, dtype=torch.int32).expand(2, Tq, Tk))


@MAIN
def test_what_nobody_sees_and_nan_change_nothing(backend, dtype, generator):
    T, topk = 80, 9
    q, k, weights = _inputs(generator, T, D=24, dtype=dtype)
    want = sf.indexer_topk(q, k, weights, topk, backend=backend)
    late = k.clone()
    late[:, 50:] = float("nan")
    assert torch.equal(sf.indexer_topk(q, late, weights, topk, backend=backend)[:, :50], want[:, :50])
    some = k.clone()
    some[:, 3] = float("nan")
    got = sf.indexer_topk(q, some, weights, topk, backend=backend)
    assert (got[:, topk:] != 3).all() and (got[:, 3:topk] == 3).any(-1).all()


@EACH
def test_strides_batch_and_length_do_not_show(backend, generator):
    q, k, weights = _inputs(generator, 100, B=3, H=6, D=40)
    want = sf.indexer_topk(q, k, weights, 12, backend=backend)
    back = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, weights)]
    assert torch.equal(sf.indexer_topk(*back, 12, backend=backend), want)
    turned = [x.flip(0) for x in (q, k, weights)]
    assert torch.equal(sf.indexer_topk(*turned, 12, backend=backend), want.flip(0))
    tail = sf.indexer_topk(q[:, :, 70:], k, weights[..., 70:], 12, q_offset=70, backend=backend)
    assert torch.equal(tail, want[:, 70:])
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8)):
        empty = sf.indexer_topk(
            torch.zeros(shape), torch.zeros(shape[0], 7, 8), torch.zeros(shape[:3]), 3, backend=backend
        )
        assert empty.shape == (shape[0], shape[2], 3)
    none = sf.indexer_topk(
        torch.zeros(1, 2, 5, 8), torch.zeros(1, 0, 8), torch.zeros(1, 2, 5), 3, backend=backend
    )
    assert none.shape == (1, 5, 0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
def test_the_number_of_threads_does_not_show(generator):
    q, k, weights = _inputs(generator, 600, B=1, H=8, D=64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = sf.indexer_topk(q, k, weights, 50, return_scores=True, backend="cpu")
        torch.set_num_threads(3)
        got = sf.indexer_topk(q, k, weights, 50, return_scores=True, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_it_is_an_op_that_compiles(generator):
    q, k, weights = _inputs(generator, 40, D=16)
    low, high = torch.zeros(2, 40, dtype=torch.int32), torch.arange(1, 41, dtype=torch.int32).repeat(2, 1)
    op = torch.ops.sparseflash.indexer_topk.default
    torch.library.opcheck(op, (q, k, weights, low, high, None, 5, True, ""))
    compiled = torch.compile(sf.indexer_topk, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, weights, 5), sf.indexer_topk(q, k, weights, 5))


WRONG = [
    ({"k": torch.zeros(2, 2, 9, 8)}, "expected tensors q_index"),
    ({"q": torch.zeros(2, 9, 2, 8)}, "heads come before tokens"),
    ({"k": torch.zeros(2, 9, 8).double()}, "one dtype"),
    ({"topk": 0}, "positive int"),
    ({"scale": -1.0}, "scale=-1.0"),
    ({"k_keep": torch.ones(2, 9)}, "True = a real key"),
    ({"first_key": torch.zeros(3, 9).long()}, "document of each query"),
    ({"q_offset": 0.5}, "q_offset=0.5"),
    ({"causal": 1}, "causal=1"),
]


@pytest.mark.parametrize("given, said", WRONG)
def test_errors_say_what_to_do(given, said):
    good = {"q": torch.zeros(2, 2, 9, 8), "k": torch.zeros(2, 9, 8), "w": torch.zeros(2, 2, 9), "topk": 3}
    given = good | given
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.indexer_topk(given.pop("q"), given.pop("k"), given.pop("w"), given.pop("topk"), **given)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
@pytest.mark.parametrize("entry", ["sf_indexer", "sf_indexer_loss"])
def test_the_c_entry_refuses_what_does_not_fit(entry):
    from sparseflash.backends.cpu.indexer import Call, LossCall
    from sparseflash.backends.cpu.library import native

    enter, sizes = getattr(native().library, entry), dict.fromkeys(("B", "H", "Tq", "Tk", "threads"), 1)
    if entry == "sf_indexer":
        call = Call(size=ctypes.sizeof(Call), D=8, topk=1, **sizes)
    else:
        call = LossCall(size=ctypes.sizeof(LossCall), D=8, Dm=8, Hq=1, Hkv=1, **sizes)
    assert enter(ctypes.byref(call), 0) == 3  # no tensors
    assert enter(ctypes.byref(call), 99) == 3
    call.size -= 8
    assert enter(ctypes.byref(call), 0) == 3


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
def test_memory_is_that_of_the_result(generator):
    def extra(T):
        q, k, weights = _inputs(generator, T, B=1, H=16, D=16)
        return peak_memory(lambda: sf.indexer_topk(q, k, weights, 64, backend="cpu"))

    extra(512)
    small, large = extra(2048), extra(8192)
    assert large < 8192 * (64 + 16 + 8) * 4 + (8 << 20), "index, K once more, and what does not grow"
    free = 4 << 20  # what the allocator gives back or keeps in between varies by megabytes
    assert large < 4 * small + free, "four times the tokens"
