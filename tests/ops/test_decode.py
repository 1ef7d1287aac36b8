"""Few queries over key caches: contiguous, ragged, paged, with a shared prefix."""

from __future__ import annotations

import pytest
import torch

import plans
import sparseflash as sf
import tolerance
from harness import BACKENDS, EACH, EVERY, FAST, MAIN, inputs, run, same_bits
from sparseflash import Plan, PlanError, SparseFlashError
from sparseflash.backends.numerics import Softmax


def decode(q, k, v, plan=None, **options):
    out, lse = sf.decode(q, k, v, plan, return_lse=True, **options)
    return {"out": out, "lse": lse}


def seen(lengths, Tq, Tk):
    """The mask of the last Tq queries of each sequence: [B,1,Tq,Tk]."""
    last = lengths.view(-1, 1, 1, 1) - Tq + torch.arange(Tq)[:, None]
    return torch.arange(Tk) <= last


SHAPES = (
    # Tq, Tk, H, Hkv, D, Dv
    (1, 1, 4, 2, 40, 40),
    (1, 63, 2, 2, 80, 40),
    (1, 700, 8, 1, 128, 128),
    (3, 129, 6, 2, 40, 80),
    (2, 600, 7, 1, 33, 7),
    (16, 300, 4, 4, 64, 64),
    (150, 300, 2, 1, 32, 32),
)


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sequence_sees_its_own_length_and_nothing_behind_it(shape, backend, dtype, generator):
    Tq, Tk, H, Hkv, D, Dv = shape
    q, k, v, _, _ = inputs(generator, Tq, Tk, B=3, H=H, Hkv=Hkv, D=D, Dv=Dv, dtype=dtype)
    lengths = torch.tensor([0, (Tk + 1) // 2, Tk])
    mask = seen(lengths, Tq, Tk)
    assert torch.equal(Plan.from_lengths(lengths, Tk=Tk, Tq=Tq).check().to_dense(), mask)
    unused = (torch.arange(Tk) >= lengths[:, None])[:, None, :, None]
    got = decode(
        q, k.masked_fill(unused, torch.nan), v.masked_fill(unused, torch.nan), lengths, backend=backend
    )
    assert not got["out"][0].any() and (got["lse"][0] == -torch.inf).all()
    tolerance.compare(got, q, k, v, mask)


@MAIN
def test_bias_softcap_sinks_and_scale_are_those_of_attention(backend, dtype, generator):
    q, k, v, _, _ = inputs(generator, 2, 400, dtype=dtype)
    lengths = torch.tensor([400, 77])
    bias = torch.randn(2, 4, 400, generator=generator)
    options = {
        "key_bias": bias,
        "softcap": 3.0,
        "scale": -0.3,
        "sink_logits": torch.randn(4, generator=generator),
    }
    got = decode(q, k, v, lengths, backend=backend, **options)
    tolerance.compare(got, q, k, v, seen(lengths, 2, 400), **options)


@MAIN
def test_any_plan_decodes(backend, dtype, seed):
    """Spans, units, bits, orders, segments, windows, pools: random plans, NaN in keys that nobody sees."""
    for n in range(8):
        pool = n % 2 == 0
        example = plans.example(seed + n, "pool" if pool else None, batch=2, heads=4)
        generator = torch.Generator().manual_seed(seed + n)
        q, k, v, _, _ = inputs(generator, example.plan.Tq, example.plan.Tk, D=40, dtype=dtype)
        hidden = ~example.mask.any(-2).any(1).expand(2, -1)
        if pool:
            k, v, hidden = k[:1], v[:1], hidden.all(0, keepdim=True)
        nan = [x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v)]
        got = decode(q, *nan, example.plan, backend=backend)
        tolerance.compare(got, q, k, v, example.mask, note=example.line)


def paged(generator, lengths, page, spare, Tq=1, shared=0, **sizes):
    """A pool whose pages are shuffled, the first `shared` pages common to all; q, k, v, table, mask."""
    B, n = len(lengths), -(-int(lengths.max()) // page)
    pages = shared + B * (n - shared) + spare
    order = torch.randperm(pages, generator=generator)
    own = order[shared : shared + B * (n - shared)].view(B, n - shared)
    table = torch.cat([order[:shared].expand(B, -1), own], 1)
    q, k, v, _, _ = inputs(generator, Tq, pages * page, B=B, **sizes)
    mask = torch.zeros(B, 1, Tq, pages * page, dtype=torch.bool)
    inside = seen(lengths, Tq, n * page)
    slot = (table[..., None] * page + torch.arange(page)).view(B, 1, 1, n * page).expand(-1, -1, Tq, -1)
    mask.scatter_(-1, slot, inside)
    return q, k[:1].clone(), v[:1].clone(), table, mask


@EVERY
def test_a_paged_cache_with_pages_in_common(backend, dtype, generator):
    lengths = torch.tensor([40, 95, 33])
    q, k, v, table, mask = paged(generator, lengths, 16, 3, Tq=2, shared=2, dtype=dtype)
    free = ~mask.any(0).any(0).any(0)
    plan = Plan.from_pages(table, lengths, page_size=16, Tk=k.shape[2], Tq=2)
    assert torch.equal(plan.check().to_dense(), mask)
    nan = [x.masked_fill(free[:, None], torch.nan) for x in (k, v)]
    tolerance.compare(decode(q, *nan, plan, backend=backend), q, k, v, mask)


@EVERY
@pytest.mark.parametrize("page", [16, 40])
def test_pages_that_each_head_chose_behind_a_first_one(backend, dtype, page, generator):
    """Null pages before the first and beyond the length; a choice in any order, holes in it."""
    lengths, first = torch.tensor([3 * page + 5, 7 * page, page - 2, 0]), torch.tensor([1, 2, 0, 0])
    q, k, v, table, mask = paged(generator, lengths, page, 2, H=4, Hkv=2, dtype=dtype)
    choice = torch.stack([torch.randperm(7, generator=generator)[:5] for _ in range(8)]).view(4, 2, 5)
    choice[:, 1, 2] = -1
    at = torch.arange(7)
    table[(at < first[:, None]) | (at * page >= lengths[:, None])] = -1
    kept = (choice[..., None] == at).any(-2) & (at >= first[:, None, None])  # [B,H,n]
    want = torch.zeros(4, 2, k.shape[2] // page, dtype=torch.bool)
    for b, h, n in kept.nonzero().tolist():
        if table[b, n] >= 0:
            want[b, h, table[b, n]] = True
    want = mask & want.repeat_interleave(page, -1)[:, :, None]
    given = {"page_size": page, "Tk": k.shape[2], "first_page": first}
    plan = Plan.from_pages(table, lengths, choice=choice, **given)
    assert torch.equal(plan.check().to_dense(), want)
    free = ~want.any(0).any(1)
    nan = [x.masked_fill(free[:, :, None], torch.nan) for x in (k, v)]
    tolerance.compare(decode(q, *nan, plan, backend=backend), q, k, v, want.repeat_interleave(2, 1))
    every = Plan.from_pages(table, lengths, **given)
    whole = Plan.from_pages(table, lengths, choice=at.expand(4, 1, 7), **given)
    assert torch.equal(every.check().to_dense(), whole.to_dense())


@MAIN
@pytest.mark.parametrize("chosen", [False, True])
def test_sequences_with_different_numbers_of_queries_in_one_call(backend, dtype, chosen, generator):
    """A chunk of a prompt, one token, a few, none; a page that stands at two places."""
    page, lengths, counts = 16, torch.tensor([70, 33, 100, 20]), torch.tensor([45, 1, 5, 0])
    q, k, v, table, _ = paged(generator, lengths, page, 1, dtype=dtype)
    table[1, 1] = table[0, 3]
    q = torch.randn(1, 4, int(counts.sum()), q.shape[-1], generator=generator).to(dtype)
    edges = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    choice = torch.randint(0, 7, (4, 1, 1), generator=generator) if chosen else None
    mask = torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for b, (length, n) in enumerate(zip(lengths.tolist(), counts.tolist())):
        for i in range(n):
            for place in range(length - n + i + 1):
                if choice is None or place // page == int(choice[b, 0, 0]):
                    row = int(edges[b]) + i
                    mask[0, 0, row, table[b, place // page] * page + place % page] = True
    plan = Plan.from_pages(table, lengths, page_size=page, Tk=k.shape[2], cu_seqlens_q=edges, choice=choice)
    assert torch.equal(plan.check().to_dense(), mask)
    tolerance.compare(decode(q, k, v, plan, backend=backend), q, k, v, mask)
    tolerance.compare(run(q, k, v, plan, backend=backend), q, k, v, mask)


@MAIN
@pytest.mark.parametrize(
    "page, left, sinks", [(16, 20, 0), (16, 31, 5), (40, 0, 40), (16, 500, 3), (1, 9, 2)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_window_and_first_tokens_over_pages(backend, dtype, packed, page, left, sinks, generator):
    """Chunks, single tokens, more queries than keys; nothing is read of pages that are out of sight."""
    lengths = torch.tensor([6 * page + 3, 5, 3 * page, 0]).clamp(max=7 * page)
    counts = torch.tensor([35, 1, 5, 0])
    q, k, v, table, _ = paged(generator, lengths, page, 3, Tq=3, dtype=dtype)
    at = torch.arange(7 * page)
    slot = (table[..., None] * page + torch.arange(page)).flatten(1)
    each = counts if packed else torch.full((4,), 3)
    mask = torch.zeros(int(each.sum()), k.shape[2], dtype=torch.bool)
    own = torch.cat([torch.arange(n) for n in each.tolist()]) + (lengths - each).repeat_interleave(each)
    of = torch.arange(4).repeat_interleave(each)
    sees = (at <= own[:, None]) & ((at >= own[:, None] - left) | (at < sinks))
    mask.scatter_(1, slot[of], sees)
    mask = mask[None, None] if packed else mask.view(4, 1, 3, -1)
    if packed:
        q = torch.randn(1, 4, int(each.sum()), q.shape[-1], generator=generator).to(dtype)
    table[~(mask.flatten(0, 2).any(0)[slot].view(4, 7, page).any(-1))] = -1
    queries = {"cu_seqlens_q": torch.nn.functional.pad(each.cumsum(0), (1, 0))} if packed else {"Tq": 3}
    given = {"page_size": page, "Tk": k.shape[2], "window": (left, 0), "sink_tokens": sinks} | queries
    plan = Plan.from_pages(table, lengths, **given)
    assert torch.equal(plan.check().to_dense(), mask)
    nan = [x.masked_fill(~mask.flatten(0, 2).any(0)[:, None], torch.nan) for x in (k, v)]
    tolerance.compare(decode(q, *nan, plan, backend=backend), q, k, v, mask)
    tolerance.compare(run(q, *nan, plan, backend=backend), q, k, v, mask)
    every = Plan.from_pages(table, lengths, choice=torch.arange(7).expand(4, 1, 7), **given)
    assert torch.equal(every.check().to_dense(), mask)


def test_what_a_pool_holds_beside_its_pages_costs_nothing():
    """No tensor of the plan grows with the pool."""
    table = torch.arange(8).view(2, 4)
    sizes = {
        Tk: sum(
            x.numel()
            for x in Plan.from_pages(table, torch.tensor([64, 50]), page_size=16, Tk=Tk).tensors().values()
        )
        for Tk in (128, 1 << 20)
    }
    assert sizes[128] == sizes[1 << 20] < 100


@MAIN
def test_a_prefix_that_all_sequences_share_is_one_list(backend, dtype, generator):
    """A prefix of batch size 1 and what each sequence has of its own; more rows than one pass takes."""
    B, prefix, each = 11, 320, 24
    q, k, v, _, _ = inputs(generator, 1, prefix + B * each, B=B, H=8, Hkv=2, dtype=dtype)
    k, v = k[:1], v[:1]
    start = prefix + each * torch.arange(B)
    ends = torch.stack([start, start + each], -1).view(B, 1, 1, 1, 2)
    common = Plan.from_spans(torch.tensor([0, prefix]).view(1, 1, 1, 1, 2), Tq=1, Tk=k.shape[2])
    own = Plan.from_spans(ends, Tq=1, Tk=k.shape[2])
    mask = common.to_dense() | own.to_dense()
    sinks = torch.randn(8, generator=generator)
    got = decode(q, k, v, (common, own), sink_logits=sinks, backend=backend)
    tolerance.compare(got, q, k, v, mask, sink_logits=sinks)
    nothing = Plan.from_lengths(torch.zeros(B, dtype=torch.int64), Tk=k.shape[2])
    same_bits(decode(q, k, v, (common, nothing, own), sink_logits=sinks, backend=backend), got)


@EACH
def test_a_unit_that_is_longer_than_all_keys_takes_no_more_work_than_they(backend, generator):
    q, k, v, _, _ = inputs(generator, 3, 50)
    units = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    plan = Plan.from_keys(units, Tq=3, Tk=50, tile=4, unit=2**31 - 1)
    tolerance.compare(decode(q, k, v, plan, backend=backend), q, k, v, plan.to_dense())


@EACH
def test_one_token_at_a_time_gives_the_rows_of_the_prefill(backend, generator):
    q, k, v, _, _ = inputs(generator, 70)
    whole = dict(zip(("out", "lse"), sf.attention(q, k, v, causal=True, return_lse=True, backend=backend)))
    for t in (0, 1, 63, 69):
        got = decode(q[:, :, t : t + 1], k, v, torch.full((2,), t + 1), backend=backend)
        for name, x in got.items():
            torch.testing.assert_close(x, whole[name][:, :, t : t + 1], atol=2e-6, rtol=2e-6)


@MAIN
def test_order_of_the_batch_and_layout_of_the_cache_do_not_show(backend, dtype, generator):
    """Nor does how many heads that lie side by side are read together, for which the threads count too."""
    q, k, v, _, _ = inputs(generator, 2, 600, B=3, H=12, Hkv=6, D=72, dtype=dtype)
    lengths, swap = torch.tensor([600, 5, 259]), torch.tensor([2, 0, 1])
    want = decode(q, k, v, lengths, backend=backend)
    got = decode(q[swap], k[swap], v[swap], lengths[swap], backend=backend)
    same_bits(got, {n: x[swap] for n, x in want.items()})
    before = torch.get_num_threads()
    try:
        for to, back in (((0, 2, 1, 3), (0, 2, 1, 3)), ((0, 3, 1, 2), (0, 2, 3, 1))):  # BSHD; lanes far apart
            laid = [x.permute(to).contiguous().permute(back) for x in (q, k, v)]
            for threads in (1, before):
                torch.set_num_threads(threads)
                same_bits(decode(*laid, lengths, backend=backend), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no native library here")
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_the_number_of_threads_does_not_show(dtype, generator):
    q, k, v, _, _ = inputs(generator, 1, 3000, B=3, H=8, D=64, dtype=dtype)
    lengths = torch.tensor([3000, 1, 1200])
    plans = Plan.from_lengths(lengths, Tk=3000), Plan.from_lengths(lengths[:1], Tk=3000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(decode(q, k, v, plans, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        same_bits(got, found[0])


def test_it_is_an_op_that_compiles(generator):
    q, k, v, _, _ = inputs(generator, 1, 64)
    lengths = torch.tensor([64, 9])

    def step(q, k, v, lengths):
        return sf.decode(q, k, v, lengths)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, lengths), step(q, k, v, lengths))
    from sparseflash.plan.flat import flatten

    tensors, ints = flatten(Plan.from_lengths(lengths, Tk=64))
    torch.library.opcheck(
        torch.ops.sparseflash.decode.default, (q, k, v, None, None, tensors, ints, *Softmax(0.1, 0.0))
    )


@pytest.mark.parametrize(
    "lengths, said",
    [
        (torch.tensor([65, 1]), "0..64"),
        (torch.tensor([-1, 1]), "0..64"),
        (torch.tensor([1.0, 2.0]), "expected integers"),
        (torch.tensor([True, False]), "expected a Plan"),
        (torch.tensor([1, 2, 3]), "B=2"),
        (torch.tensor([[1], [2]]), "B=2"),
        ([1, 2], "lengths are a tensor of integers"),
        (Plan.dense(1, 63), "make one for these"),
    ],
    ids=str,
)
def test_lengths_that_make_no_sense_are_refused(lengths, said, generator):
    q, k, v, _, _ = inputs(generator, 1, 64)
    with pytest.raises(SparseFlashError, match=said):
        sf.decode(q, k, v, lengths)


@pytest.mark.parametrize(
    "table, lengths, sizes, said",
    [
        ([[0, 4]], [3], {}, "pages 0..4"),
        ([[0, -1]], [3], {}, "pages -1..0"),
        ([[0, 1]], [5], {}, "0..4"),
        ([[0, 0]], [3], {}, "stands twice"),
        ([[0, 1]], [3], {"choice": torch.tensor([[[0, 0]]])}, "stands twice"),
        ([[0, 1]], [3], {"choice": torch.tensor([[[2]]])}, "choice holds 2..2"),
        ([[0, 1]], [3], {"choice": torch.tensor([[0]])}, "choice"),
        ([[0, 1]], [3], {"first_page": -1}, "first_page=-1"),
        ([[0, 1]], [3], {"first_page": torch.tensor([1, 0])}, "first_page"),
        ([[0, 1]], [3], {"window": (2, 1)}, "expected .left, 0."),
        ([[0, 1]], [3], {"window": 2}, "window=2"),
        ([[0, 1]], [3], {"sink_tokens": -1}, "sink_tokens=-1"),
        ([[0, 1]], [3], {"cu_seqlens_q": torch.tensor([0, 1, 2])}, "cu_seqlens_q is for 2 sequences"),
        ([[0, 1]], [3, 3], {}, "1 sequences, lengths for 2"),
        ([[0, 1]], [3], {"Tk": 7}, "multiple of page_size"),
        ([[0, 1]], [3], {"page_size": 0}, "page_size=0"),
        ([[0.0, 1.0]], [3], {}, "expected integers"),
        ([0, 1], [3], {}, "expected integers"),
    ],
    ids=str,
)
def test_page_tables_that_make_no_sense_are_refused(table, lengths, sizes, said):
    sizes = {"page_size": 2, "Tk": 8} | sizes
    with pytest.raises(PlanError, match=said):
        Plan.from_pages(torch.tensor(table), torch.tensor(lengths), **sizes)


def test_gradients_are_asked_of_attention(generator):
    q, k, v, _, _ = inputs(generator, 1, 8)
    with pytest.raises(SparseFlashError, match="sparseflash.attention"):
        sf.decode(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert not sf.decode(q, k, v).requires_grad


@pytest.mark.parametrize("Tq", [1, 2, 128, 200])
def test_tiles_hold_as_many_queries_as_there_are(Tq):
    lengths = torch.tensor([300, 250])
    table = torch.arange(40).view(2, 20)
    for plan in (
        Plan.from_lengths(lengths, Tk=300, Tq=Tq),
        Plan.from_pages(table, lengths, page_size=16, Tk=640, Tq=Tq),
    ):
        assert plan.tile == min(Tq, 128) and plan.tiles == -(-Tq // 128)


@pytest.mark.parametrize("Tq", [1, 5, 16, 40])
@pytest.mark.parametrize("length", [97, 109, 112])
def test_all_pages_chosen_is_no_choice_though_the_last_is_hardly_begun(length, Tq):
    table, sizes = torch.arange(7).flip(0)[None], {"page_size": 16, "Tk": 112, "Tq": Tq}
    every = Plan.from_pages(table, torch.tensor([length]), **sizes)
    chosen = Plan.from_pages(table, torch.tensor([length]), choice=torch.arange(7)[None, None], **sizes)
    assert torch.equal(chosen.check().to_dense(), every.check().to_dense())
