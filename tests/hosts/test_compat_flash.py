"""flash-attn's functions over these kernels: layouts, order of arguments, and what each of them means."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

import sparseflash as sf
from harness import randn
from sparseflash.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)


def formula(q, k, v, *, causal=False, window=(-1, -1), softcap=0.0, scale=None, low=0, slopes=None):
    """In fp64, of one sequence `[T,H,D]`: out, lse `[H,Tq]`. `low`: keys before it are not seen."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    score = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    gap = at - torch.arange(len(k))
    if slopes is not None:
        score = score - slopes.double()[:, None, None] * gap.abs()
    keep = torch.arange(len(k)) >= low
    keep = keep & (gap >= 0) if causal else keep.expand_as(gap)
    keep = keep & ((gap <= window[0]) | (window[0] < 0)) & ((-gap <= window[1]) | (window[1] < 0))
    score = score.masked_fill(~keep, -torch.inf)
    lse = score.logsumexp(-1)
    weights = torch.exp(score - torch.where(lse.isfinite(), lse, 0)[..., None])
    return torch.einsum("hqk,khd->qhd", weights, v), lse


CASES = [
    {},
    {"causal": True},
    {"causal": True, "window": (9, 0)},
    {"window": (5, 3)},
    {"window": (-1, 4)},
    {"causal": True, "softcap": 5.0, "scale": 0.3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("Tq", "Tk"), [(63, 63), (17, 80), (80, 17), (1, 129)])
def test_dense_attention_means_what_it_does_there(case, Tq, Tk, generator):
    q, k, v = randn(generator, 2, Tq, 4, 40), *(randn(generator, 2, Tk, 2, 40) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = {"softmax_scale": case.get("scale"), "softcap": case.get("softcap", 0.0)}
    given |= {"causal": case.get("causal", False), "window_size": case.get("window", (-1, -1))}
    out, lse, none = flash_attn_func(*leaves, **given, return_attn_probs=True)
    want = [formula(q[b], k[b], v[b], **case) for b in range(2)]
    wanted = torch.stack([x for x, _ in want])
    torch.testing.assert_close(out.double(), wanted, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), torch.stack([x for _, x in want]), atol=3e-6, rtol=1e-5)
    assert none is None
    dout = randn(generator, *out.shape)
    got = torch.autograd.grad(out, leaves, dout)
    exact = torch.autograd.grad(wanted, leaves, dout.double())
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=2e-5, rtol=1e-4)


def test_positional_arguments_have_the_order_of_the_original(generator):
    names = list(inspect.signature(flash_attn_func).parameters)
    assert names[:8] == "q k v dropout_p softmax_scale causal window_size softcap".split()
    assert names[8:] == "alibi_slopes deterministic return_attn_probs".split()
    q, k, v = (randn(generator, 1, 30, 2, 32) for _ in range(3))
    one = flash_attn_func(q, k, v, 0.0, 0.2, True, (7, 0), 4.0, None, False)
    other = flash_attn_func(q, k, v, softmax_scale=0.2, causal=True, window_size=(7, 0), softcap=4.0)
    assert torch.equal(one, other)
    names = list(inspect.signature(flash_attn_varlen_func).parameters)
    assert names[3:8] == "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p".split()
    names = list(inspect.signature(flash_attn_with_kvcache).parameters)
    assert (
        names[3:11]
        == ("k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table").split()
    )


def test_packed_tensors_are_their_parts(generator):
    qkv = randn(generator, 2, 50, 3, 4, 32).requires_grad_()
    out = flash_attn_qkvpacked_func(qkv, 0.0, None, True)
    assert torch.equal(out, flash_attn_func(*qkv.unbind(2), causal=True))
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert grad.shape == qkv.shape and bool(grad.abs().sum((0, 1, 3, 4)).all())
    q, kv = randn(generator, 2, 9, 4, 32), randn(generator, 2, 50, 2, 2, 32)
    assert torch.equal(
        flash_attn_kvpacked_func(q, kv, causal=True), flash_attn_func(q, *kv.unbind(2), causal=True)
    )


def test_dropout_is_drawn_and_scaled(generator):
    q, k = (randn(generator, 2, 200, 4, 32) for _ in range(2))
    v = torch.ones(2, 200, 4, 32)
    torch.manual_seed(0)
    out = flash_attn_func(q, k, v, 0.5)
    assert out.std() > 0.01 and abs(float(out.mean()) - 1) < 0.02
    torch.manual_seed(0)
    assert torch.equal(out, flash_attn_func(q, k, v, dropout_p=0.5))


@pytest.mark.parametrize("causal", [False, True])
def test_biases_by_distance(causal, generator):
    q, k, v = randn(generator, 2, 40, 4, 32), *(randn(generator, 2, 90, 4, 32) for _ in range(2))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    out = flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes)
    want = torch.stack([formula(q[b], k[b], v[b], causal=causal, slopes=slopes)[0] for b in range(2)])
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)
    ends, k_ends = torch.tensor([0, 40, 80]), torch.tensor([0, 90, 180])
    flat = (x.flatten(0, 1) for x in (q, k, v))
    packed = flash_attn_varlen_func(*flat, ends, k_ends, causal=causal, alibi_slopes=slopes)
    torch.testing.assert_close(packed, out.flatten(0, 1), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_sequences_are_each_their_own(case, generator):
    q_ends, k_ends = torch.tensor([0, 20, 20, 63]), torch.tensor([0, 31, 40, 90])
    q, k, v = randn(generator, 63, 4, 40), *(randn(generator, 90, 2, 40) for _ in range(2))
    given = {"softmax_scale": case.get("scale"), "softcap": case.get("softcap", 0.0)}
    given |= {"causal": case.get("causal", False), "window_size": case.get("window", (-1, -1))}
    out, lse, _ = flash_attn_varlen_func(q, k, v, q_ends, k_ends, 43, 50, **given, return_attn_probs=True)
    for (a, b), (c, d) in zip(itertools.pairwise(q_ends), itertools.pairwise(k_ends), strict=True):
        want, norm = formula(q[a:b], k[c:d], v[c:d], **case)
        torch.testing.assert_close(out[a:b].double(), want, atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(lse[:, a:b].double(), norm, atol=3e-6, rtol=1e-5)


def paged(x, table, size, pages):
    """Keys `[B,T,H,D]` laid into pages."""
    pool = torch.full((pages, size, *x.shape[2:]), float("nan"))
    for b, row in enumerate(table.tolist()):
        for n, page in enumerate(row):
            part = x[b, n * size : (n + 1) * size]
            pool[page, : len(part)] = part
    return pool


@pytest.mark.parametrize("window", [(-1, -1), (9, 0), (20, 3)])
def test_pages_are_read_where_a_table_says(window, generator):
    table, lengths = torch.tensor([[3, 0, 5], [1, 4, 2]]), torch.tensor([40, 19])
    k, v = (randn(generator, 2, 48, 2, 32) for _ in range(2))
    k_pages, v_pages = (paged(x, table, 16, 6) for x in (k, v))
    q, ends = randn(generator, 12, 4, 32), torch.tensor([0, 5, 12])
    k_ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    given = {"block_table": table, "window_size": window}
    out = flash_attn_varlen_func(q, k_pages, v_pages, ends, k_ends, causal=True, **given)
    for b, (a, e) in enumerate(itertools.pairwise(ends)):
        n = int(lengths[b])
        want, _ = formula(q[a:e], k[b, :n], v[b, :n], causal=True, window=window)
        torch.testing.assert_close(out[a:e].double(), want, atol=3e-6, rtol=1e-5)
    with pytest.raises(sf.SparseFlashError, match="with block_table: expected causal=True"):
        flash_attn_varlen_func(q, k_pages, v_pages, ends, k_ends, block_table=table)


# ---------------------------------------------------------------- with a cache


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("Tq", [1, 5, 33])
def test_a_cache_is_written_and_attended(case, Tq, generator):
    cache_k, cache_v = (randn(generator, 3, 100, 2, 32) for _ in range(2))
    before = cache_k.clone(), cache_v.clone()
    q, k, v = randn(generator, 2, Tq, 4, 32), *(randn(generator, 2, Tq, 2, 32) for _ in range(2))
    used, rows, pad = torch.tensor([60, 7]), torch.tensor([2, 0]), torch.tensor([3, 0])
    given = {"softmax_scale": case.get("scale"), "softcap": case.get("softcap", 0.0)}
    given |= {"causal": case.get("causal", False), "window_size": case.get("window", (-1, -1))}
    out, lse = flash_attn_with_kvcache(
        q,
        cache_k,
        cache_v,
        k,
        v,
        cache_seqlens=used.int(),
        cache_batch_idx=rows,
        cache_leftpad=pad,
        return_softmax_lse=True,
        **given,
    )
    for b in range(2):
        n, row = int(used[b]), int(rows[b])
        for cache, new, old in ((cache_k, k, before[0]), (cache_v, v, before[1])):
            assert torch.equal(cache[row, n : n + Tq], new[b])
            assert torch.equal(cache[row, :n], old[row, :n]) and torch.equal(
                cache[row, n + Tq :], old[row, n + Tq :]
            )
        end = n + Tq
        want, norm = formula(q[b], cache_k[row, :end], cache_v[row, :end], low=int(pad[b]), **case)
        torch.testing.assert_close(out[b].double(), want, atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(lse[b].double(), norm, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [(-1, -1), (9, 0)])
def test_a_paged_cache_is_written_and_attended(window, generator):
    table, used = torch.tensor([[3, 0, 5], [1, 4, 2]]), torch.tensor([30, 15])
    k, v = (randn(generator, 2, 48, 2, 32) for _ in range(2))
    k_pages, v_pages = (paged(x, table, 16, 6) for x in (k, v))
    q, new = randn(generator, 2, 3, 4, 32), randn(generator, 2, 3, 2, 32)
    given = {"cache_seqlens": used, "block_table": table, "causal": True, "window_size": window}
    out = flash_attn_with_kvcache(q, k_pages, v_pages, new, new, **given)
    for b in range(2):
        n = int(used[b])
        keys, values = (torch.cat([x[b, :n], new[b]]) for x in (k, v))
        want, _ = formula(q[b], keys, values, causal=True, window=window)
        torch.testing.assert_close(out[b].double(), want, atol=3e-6, rtol=1e-5)
    assert torch.equal(k_pages[0, 14:16], new[0, :2]) and torch.equal(k_pages[5, 0], new[0, 2])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_new_keys_are_rotated_by_their_positions(interleaved, causal, generator):
    angle = torch.arange(64)[:, None] / 10 ** torch.linspace(0, 2, 8)
    cache_k, cache_v = (randn(generator, 1, 64, 2, 32) for _ in range(2))
    q, k, v = randn(generator, 1, 4, 4, 32), *(randn(generator, 1, 4, 2, 32) for _ in range(2))

    def turned(x, at):
        parts = torch.view_as_complex(
            x[..., :16].unflatten(-1, (8, 2)).contiguous()
            if interleaved
            else torch.stack(x[..., :16].chunk(2, -1), -1).contiguous()
        )
        parts = torch.view_as_real(parts * torch.polar(torch.ones_like(angle), angle)[at][:, None])
        flat = parts.flatten(-2) if interleaved else torch.cat(parts.unbind(-1), -1)
        return torch.cat([flat, x[..., 16:]], -1)

    at = torch.arange(20, 24)
    keys, values = torch.cat([cache_k[0, :20], turned(k[0], at)]), torch.cat([cache_v[0, :20], v[0]])
    want, _ = formula(turned(q[0], at if causal else torch.full((4,), 20)), keys, values, causal=causal)
    out = flash_attn_with_kvcache(
        q, cache_k, cache_v, k, v, angle.cos(), angle.sin(), 20, causal=causal, rotary_interleaved=interleaved
    )
    torch.testing.assert_close(out[0].double(), want, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": None}, "k without v"),
        ({"rotary_cos": torch.ones(9, 4)}, "rotary_cos without rotary_sin"),
        ({"cache_seqlens": 62}, "3 new keys behind 62 in a cache of 64: make it larger"),
        ({"window_size": 4}, "window_size=4: expected .left, right."),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes \[3\]: expected \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, said, generator):
    given = {
        "q": randn(generator, 1, 3, 4, 32),
        "k": randn(generator, 1, 3, 2, 32),
        "v": randn(generator, 1, 3, 2, 32),
    }
    given |= {"k_cache": torch.zeros(1, 64, 2, 32), "v_cache": torch.zeros(1, 64, 2, 32), "cache_seqlens": 5}
    with pytest.raises(sf.SparseFlashError, match=said):
        flash_attn_with_kvcache(**(given | change))
    with pytest.raises(sf.SparseFlashError, match=r"expected \[B,T,3,H,D\]"):
        flash_attn_qkvpacked_func(torch.zeros(1, 5, 2, 4, 32))
