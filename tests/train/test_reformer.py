"""Reformer on our kernels: the same pairs, weights and gradients as a chunked implementation of the paper."""

import pytest
import torch

import sparseflash as sf
from sparseflash.selection.orders import sorted_order

BACKENDS = [name for name, status in sf.backend_status().items() if status.usable]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SELF = -5e4


def tied(generator, T, B=2, H=4, D=16, dtype=torch.float64):
    q = torch.randn(B, H, T, D, generator=generator, dtype=dtype).requires_grad_()
    v = torch.randn(B, H, T, D, generator=generator, dtype=dtype).requires_grad_()
    return q, torch.nn.functional.normalize(q, dim=-1), v


def chunked(q, k, v, buckets, size, across=True):
    """The paper, chunk by chunk, for one batch slot and head, T a multiple of size; rounds merged by lse."""
    T = q.shape[0]
    outs, lses = [], []
    for bucket in buckets:
        order = (bucket.long() * T + torch.arange(T)).argsort()
        chunks = order.view(-1, size)
        round_out, round_lse = torch.empty_like(v), torch.empty_like(v[:, 0])
        for c, rows in enumerate(chunks):
            cols = rows if len(chunks) == 1 else torch.cat([chunks[c - 1], rows])
            s = q[rows] @ k[cols].T * q.shape[-1] ** -0.5
            if not across:
                s = s.masked_fill(bucket[rows][:, None] != bucket[cols], float("-inf"))
            s = s.masked_fill(rows[:, None] < cols, float("-inf"))
            s = torch.where(rows[:, None] == cols, SELF, s)
            round_out[rows] = s.softmax(-1) @ v[cols]
            round_lse[rows] = s.logsumexp(-1)
        outs.append(round_out)
        lses.append(round_lse)
    share = torch.stack(lses).softmax(0)
    return (share[..., None] * torch.stack(outs)).sum(0)


@pytest.mark.parametrize(
    ("rounds", "size", "across", "planes"),
    [
        (1, 16, True, "shared"),
        (1, 32, False, "per-head"),
        (3, 16, True, "per-head"),
        (2, 16, False, "shared"),
        (4, 48, True, "shared"),
        (1, 96, True, "shared"),
    ],
)
def test_it_is_the_chunked_algorithm_forward_and_backward(rounds, size, across, planes, generator):
    q, k, v = tied(generator, 96, B=1, H=2)
    method = sf.methods.Reformer(size, rounds, seed=3, planes=planes, attend_across_buckets=across)
    buckets, k_buckets = method.buckets(q, k)
    assert torch.equal(buckets, k_buckets)
    got = method(q, k, v, backend="reference")
    want = torch.stack(
        [
            torch.stack(
                [chunked(q[b, h], k[b, h], v[b, h], buckets[:, b, h], size, across) for h in range(2)]
            )
            for b in range(1)
        ]
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    dout = torch.randn(got.shape, generator=generator, dtype=got.dtype)
    for a, b in zip(
        *(torch.autograd.grad(x, (q, v), dout, retain_graph=True) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@every_backend
def test_two_chunks_of_half_the_length_are_dense_without_self(backend, generator):
    q, k, v = (x.float() for x in tied(generator, 128))
    out = sf.methods.Reformer(bucket=64)(q, k, v, backend=backend)
    s = (q @ k.mT) / 4
    s = s.masked_fill(torch.ones(128, 128).triu(1).bool(), float("-inf"))
    s = torch.where(torch.eye(128).bool(), SELF, s)
    torch.testing.assert_close(out, s.softmax(-1) @ v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0], rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("T", [1, 2, 31, 33, 65, 130, 200])
def test_any_length_and_grouped_heads(T, backend, generator):
    """Chunks of what there is, the last one short: every query sees its own and the previous chunk."""
    q = torch.randn(2, 4, T, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, T, 16, generator=generator)
    method = sf.methods.Reformer(bucket=32, seed=1, planes="per-head")
    (plan,) = method.select(q, k).plan
    plan.check()
    q_bucket, k_bucket = (x[0] for x in method.buckets(q, k))

    def chunk(bucket):
        place = torch.empty(bucket.shape, dtype=torch.long)
        return place.scatter_(-1, sorted_order(bucket).long(), torch.arange(T).expand(bucket.shape)) // 32

    q_chunk, k_chunk = chunk(q_bucket), chunk(k_bucket).repeat_interleave(2, 1)
    back = (q_chunk[..., :, None] - k_chunk[..., None, :]) % -(-T // 32)
    mask = (back <= 1) & torch.ones(T, T, dtype=torch.bool).tril(-1)
    assert torch.equal(plan.to_dense(), mask)
    out, lse = method(q, k, v, return_lse=True, backend=backend)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    s = ((q @ k.mT) / 4).masked_fill(~mask, float("-inf"))
    alone = ~mask.any(-1)
    want = torch.where(alone[..., None], v, s.softmax(-1).nan_to_num(0) @ v)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(lse == float("-inf"), alone)


@every_backend
def test_a_query_that_sees_nothing_else_passes_its_value_and_gradient(backend, generator):
    q, k, v = (x.detach().float().requires_grad_() for x in tied(generator, 70))
    method = sf.methods.Reformer(bucket=8, attend_across_buckets=False)
    out, lse = method(q, k, v, return_lse=True, backend=backend)
    alone = lse == float("-inf")
    assert alone[:, :, 0].all() and 0 < alone.float().mean() < 1
    assert torch.equal(out[alone], v[alone])
    (dv,) = torch.autograd.grad(out[alone].sum(), v)
    assert torch.equal(dv, alone[..., None].float().expand_as(v))


def test_pairs_found_in_several_rounds_count_several_times(generator):
    """So the merged rounds are a softmax with multiplicities, and not the softmax over the union."""
    q, k, v = (x.detach() for x in tied(generator, 96))
    plans = sf.methods.Reformer(16, rounds=3).select(q, k).plan
    times = sum(p.to_dense().double() for p in plans)
    assert times.max() > 1
    s = (q @ k.mT) / 4
    weight = s.exp() * times
    want = (weight @ v) / weight.sum(-1, keepdim=True)
    union = (s.exp() * (times > 0)) @ v / (s.exp() * (times > 0)).sum(-1, keepdim=True)
    some = times.any(-1)
    got = sf.attention(q, k, v, plans, backend="reference")
    parts = [sf.attention(q, k, v, p, return_lse=True, backend="reference") for p in plans]
    torch.testing.assert_close(got[some.expand(2, 4, -1)], want[some.expand(2, 4, -1)])
    torch.testing.assert_close(got, sf.merge(parts)[0])
    assert not torch.allclose(got[some.expand(2, 4, -1)], union[some.expand(2, 4, -1)], atol=1e-3)


def test_unbalanced_buckets_are_not_covered_and_more_rounds_cover_more(generator):
    q = torch.nn.functional.normalize(torch.randn(1, 2, 1024, 16, generator=generator) + 1.5, dim=-1)
    exact = sf.methods.HashSparse(nb=16)
    buckets = exact.ids(q, q)
    assert sf.methods.coverage(exact.select(q, q).plan, *buckets) == 1.0
    one = sf.methods.Reformer(64)
    assert sf.methods.coverage(one.select(q, q).plan, *(x[0] for x in one.buckets(q, q))) < 0.9
    seen = [sf.methods.coverage(sf.methods.Reformer(64, n).select(q, q).plan, *buckets) for n in (1, 2, 4)]
    assert seen[0] < seen[1] < seen[2] < 1
    all_in_one = torch.zeros(1, 1, 1024, dtype=torch.long)
    share = sf.methods.coverage(
        one.select(q, q, {"q_bucket": all_in_one[None], "k_bucket": all_in_one[None]}).plan,
        all_in_one,
        all_in_one,
    )
    assert share == pytest.approx(3 * 64 / 1024, rel=0.1)


def test_the_past_moves_with_the_future_as_sorting_makes_it(generator):
    """What hash-sparse does not do: a later vector shifts the borders of earlier chunks."""
    q, k, v = (x.detach().float() for x in tied(generator, 200))
    q2 = torch.cat([q[:, :, :150], torch.randn(2, 4, 50, 16, generator=generator)], 2)
    k2 = torch.nn.functional.normalize(q2, dim=-1)
    for method, still in ((sf.methods.Reformer(16), False), (sf.methods.HashSparse(nb=8), True)):
        a, b = (method(x, y, v)[:, :, :150] for x, y in ((q, k), (q2, k2)))
        assert torch.allclose(a, b, atol=1e-5) == still
        assert method.causal_selection == still


def test_what_is_refused(generator):
    q, k, v = (x.detach().float() for x in tied(generator, 32))
    with pytest.raises(sf.SparseFlashError, match="32 queries, 20 keys"):
        sf.methods.Reformer()(q, k[:, :, :20], v[:, :, :20])
    bucket = torch.zeros(1, 2, 4, 32, dtype=torch.long)
    with pytest.raises(sf.SparseFlashError, match="belong together"):
        sf.methods.Reformer()(q, k, v, ctx={"q_bucket": bucket})
    with pytest.raises(sf.SparseFlashError, match=r"expected integers \[rounds=2, .* got \[1, 2, 4, 32\]"):
        sf.methods.Reformer(rounds=2)(q, k, v, ctx={"q_bucket": bucket, "k_bucket": bucket})
    ids = torch.tensor([-1, -2, 2**40])[torch.randint(3, (1, 2, 4, 32), generator=generator)]
    given = {"q_bucket": ids, "k_bucket": ids}
    (plan,) = sf.methods.Reformer(8, attend_across_buckets=False).select(q, k, given).plan
    same = ids[0][..., :, None] == ids[0][..., None, :]
    assert not (plan.to_dense() & ~same).any()
