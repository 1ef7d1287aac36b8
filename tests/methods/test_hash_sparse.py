"""Hash-sparse attention against dense masked softmax in fp64, where it is easy to be wrong."""

import pytest
import torch

import sparseflash as sf
from cases import mask_of as selected_mask
from harness import EACH
from selected import Selected, tensors
from sparseflash.selection.orders import lsh_buckets, lsh_planes
from tolerance import compare

SELECTED = Selected(sf.hash_sparse_attention, sees=lambda a, b: a == b)


# ---------------------------------------------------------------- forward and backward


@EACH
@pytest.mark.parametrize("T", [1, 63, 129, 300])
@pytest.mark.parametrize("include_self", [True, False])
def test_random_buckets_of_any_length(T, include_self, backend, generator):
    q_bucket, k_bucket = torch.randint(5, (2, 2, 4, T), generator=generator)
    SELECTED.check(tensors(generator, T), q_bucket, k_bucket, include_self, backend=backend)


@EACH
@pytest.mark.parametrize(("Tq", "Tk"), [(40, 200), (200, 40), (1, 130), (130, 1)])
def test_queries_and_keys_of_different_lengths(Tq, Tk, backend, generator):
    q_bucket = torch.randint(3, (2, 4, Tq), generator=generator)
    k_bucket = torch.randint(3, (2, 4, Tk), generator=generator)
    SELECTED.check(tensors(generator, Tq, Tk), q_bucket, k_bucket, backend=backend)


@EACH
@pytest.mark.parametrize(("q_heads", "k_heads"), [(4, 2), (1, 1), (2, 4), (4, 1)])
def test_buckets_per_query_head_per_kv_head_or_shared(q_heads, k_heads, backend, generator):
    q_bucket = torch.randint(4, (1, q_heads, 150), generator=generator)
    k_bucket = torch.randint(4, (2, k_heads, 150), generator=generator)
    SELECTED.check(tensors(generator, 150, Hkv=2), q_bucket, k_bucket, backend=backend)


def _hard(kind, generator, T=270):
    """Buckets that look for trouble, [2, 2, T] for queries and keys."""
    t = torch.arange(T)
    draw = torch.randint(6, (2, 2, T), generator=generator)
    match kind:
        case "disjoint":
            return draw, draw + 100
        case "single":  # the first tokens alone
            return t.clamp(max=40).expand(2, 2, T), t.clamp(max=50).expand(2, 2, T)
        case "one":
            return torch.zeros(2, 2, 2, T, dtype=torch.long).unbind()
        case "unequal":  # one bucket with nearly all, and heads with other numbers of buckets
            skew = (draw == 0).long()
            skew[:, 1] = t // 3
            return skew, skew.flip(1)
        case "blocks":  # bucket edges at tile edges, and one past them
            return (t // 128).expand(2, 2, T), ((t + 1) // 128).expand(2, 2, T)
        case "late-keys":  # where queries of a bucket end, its keys begin
            return (t % 2 + 2 * (t >= T // 2)).expand(2, 2, T), (t % 2 + 2 * (t < T // 2)).expand(2, 2, T)
        case "descending":  # bucket order against time order
            return ((T - t) // 50).expand(2, 2, T), ((T - t) // 70).expand(2, 2, T)


@EACH
@pytest.mark.parametrize(
    "kind", ["disjoint", "single", "one", "unequal", "blocks", "late-keys", "descending"]
)
@pytest.mark.parametrize("include_self", [True, False])
def test_buckets_that_look_for_trouble(kind, include_self, backend, generator):
    q_bucket, k_bucket = _hard(kind, generator)
    got = SELECTED.check(
        tensors(generator, 270, Hq=2, Hkv=2), q_bucket, k_bucket, include_self, backend=backend
    )
    if kind == "disjoint":
        assert all(got[name].abs().max() == 0 for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("heads", [0, 1, 4])
@pytest.mark.parametrize("include_self", [True, False])
def test_queries_that_begin_later_are_the_last_rows_of_all(include_self, heads, generator):
    q, k, *_ = tensors(generator, 200)
    method = sf.methods.HashSparse(nb=4, include_self=include_self, window_heads=heads, head_window=20)
    whole = method.select(q, k).plan.to_dense().expand(2, 4, -1, -1)
    for begin in (130, torch.tensor(130)):
        plan = method.select(q[:, :, 130:], k, {"q_offset": begin}).plan.check()
        assert torch.equal(plan.to_dense().expand(2, 4, -1, -1), whole[:, :, 130:])


def pairs_lost_by_one_start(q_bucket, k_bucket, block):
    """Visible pairs that a backward loses which takes time to rise from block to block of the sorted queries:
    for each block of sorted keys it begins behind the last query block that lies wholly before them."""

    def sorted_by_bucket(bucket):
        order = bucket.sort(stable=True).indices
        return bucket[order].split(block), order.split(block)

    lost = 0
    q_label, q_time = sorted_by_bucket(q_bucket)
    k_label, k_time = sorted_by_bucket(k_bucket)
    for label, time in zip(k_label, k_time, strict=True):
        near = [n for n, x in enumerate(q_label) if x.max() >= label.min() and x.min() <= label.max()]
        early = [n for n in near if q_time[n].max() < time.min()]
        for n in near:
            if early and n <= early[-1]:
                see = (q_label[n][:, None] == label) & (q_time[n][:, None] >= time)
                lost += int(see.sum())
    return lost


@EACH
def test_gradients_survive_a_query_block_that_is_too_early_for_its_keys(backend, generator):
    """A block of keys holds the tail of bucket 0 and the head of 1; the queries of 1 all come first."""
    T = 512
    t = torch.arange(T)
    q_bucket = torch.where(t < 256, 1, 0)
    k_bucket = torch.where(t < 128, 2, torch.where(t < 128 + 192, 0, 1))
    assert pairs_lost_by_one_start(q_bucket, k_bucket, 128) > 0
    got = SELECTED.check(tensors(generator, T), q_bucket[None, None], k_bucket[None, None], backend=backend)
    assert got["dv"].abs().max() > 0


@EACH
@pytest.mark.parametrize("phase", [0.25, 0.5, 0.75])
def test_gradients_survive_queries_and_keys_that_drift_apart(phase, backend, generator):
    """Buckets of both sides move with time, out of step: public kernels lose part of the gradients here."""
    T, nb = 512, 8
    t = torch.arange(T) / T
    noise = 0.3 * torch.rand(2, T, generator=generator)
    q_bucket, k_bucket = (((t + x) * nb).long() % nb for x in (phase + noise[0], noise[1]))
    assert pairs_lost_by_one_start(q_bucket, k_bucket, 16) > 0
    given = tensors(generator, T, B=1, Hq=2, Hkv=1)
    SELECTED.check(given, q_bucket[None, None], k_bucket[None, None], backend=backend)


# ---------------------------------------------------------------- invariance


@EACH
def test_names_of_buckets_do_not_matter(backend, generator):
    given = tensors(generator, 300)
    q_bucket, k_bucket = torch.randint(6, (2, 2, 4, 300), generator=generator)
    plain = SELECTED.run(*given, q_bucket, k_bucket, backend=backend)
    for ids in (
        torch.randperm(6, generator=generator),
        torch.tensor([-(2**31), 2**31 - 1, 10**9, -1, -2, 0]),
        torch.tensor([2**62, -(2**62), 2**31, 2**33 + 1, 2**33 + 2, -5]),
    ):
        named = SELECTED.run(*given, ids[q_bucket], ids[k_bucket], backend=backend)
        for name, x in plain.items():  # rows move to other tiles: sums over a tile's keys may round otherwise
            torch.testing.assert_close(named[name], x)
    small = SELECTED.run(*given, q_bucket.to(torch.uint8), k_bucket.to(torch.int16), backend=backend)
    assert all(torch.equal(small[n], plain[n]) for n in plain)


@EACH
def test_another_bucket_may_hold_anything(backend, generator):
    q, k, v, dout = tensors(generator, 300)
    q_bucket, k_bucket = torch.randint(4, (2, 2, 4, 300), generator=generator)
    clean = SELECTED.run(q, k, v, dout, q_bucket, k_bucket, backend=backend)
    for poison in (float("nan"), float("inf")):
        k2, v2 = (torch.where((k_bucket == 2)[..., None], poison, x) for x in (k, v))
        q2, dout2 = (torch.where((q_bucket == 2)[..., None], poison, x) for x in (q, dout))
        dirty = SELECTED.run(q2, k2, v2, dout2, q_bucket, k_bucket, backend=backend)
        for name in clean:
            other = (k_bucket if name in ("dk", "dv") else q_bucket) != 2
            assert torch.equal(clean[name][other], dirty[name][other]), name


@EACH
def test_heads_and_batch_slots_commute(backend, generator):
    q, k, v, dout = tensors(generator, 200)
    q_bucket, k_bucket = torch.randint(4, (2, 2, 4, 200), generator=generator)
    plain = SELECTED.run(q, k, v, dout, q_bucket, k_bucket, backend=backend)
    heads, slots = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0])
    moved = SELECTED.run(*(x[slots][:, heads] for x in (q, k, v, dout, q_bucket, k_bucket)), backend=backend)
    for name, x in plain.items():
        torch.testing.assert_close(moved[name], x[slots][:, heads])


def test_the_buckets_that_are_refused(generator):
    q, k, v, _ = tensors(generator, 20)
    bucket = torch.zeros(2, 4, 20, dtype=torch.long)
    attend = sf.hash_sparse_attention
    with pytest.raises(sf.PlanError, match=r"q_bucket has dtype torch.float32: expected integer"):
        attend(q, k, v, bucket.float(), bucket)
    with pytest.raises(sf.PlanError, match=r"k_bucket has dtype torch.float64.*NaN"):
        attend(q, k, v, bucket, bucket.double() * float("nan"))
    with pytest.raises(sf.PlanError, match="k_bucket has dtype torch.bool"):
        attend(q, k, v, bucket, bucket.bool())
    with pytest.raises(sf.PlanError, match=r"k_bucket: \[2, 4, 19\]; expected \[2\|1, H\|1, 20\]"):
        attend(q, k, v, bucket, bucket[..., :19])
    with pytest.raises(sf.PlanError, match=r"q_bucket: \[2, 3, 20\]; .* divisor of the 4 query heads"):
        attend(q, k, v, bucket[:, :3], bucket)
    with pytest.raises(sf.SparseFlashError, match="belong together"):
        sf.methods.HashSparse()(q, k, v, ctx={"q_bucket": bucket})
    with pytest.raises(sf.SparseFlashError, match="window_heads=5: q has 4 heads"):
        sf.methods.HashSparse(window_heads=5)(q, k, v)


# ---------------------------------------------------------------- hashing


def test_planes_are_unit_columns_fixed_by_the_seed():
    planes = lsh_planes(24, 10, heads=3, rounds=2, seed=5)
    assert planes.shape == (2, 3, 24, 5) and planes.dtype == torch.float32
    torch.testing.assert_close(planes.norm(dim=-2), torch.ones(2, 3, 5))
    torch.manual_seed(99)
    assert torch.equal(planes, lsh_planes(24, 10, heads=3, rounds=2, seed=5))
    assert not torch.equal(planes, lsh_planes(24, 10, heads=3, rounds=2, seed=6))
    for wrong in (0, 1, 7, 8.0):
        with pytest.raises(sf.SparseFlashError, match="even number"):
            lsh_planes(24, wrong)


@pytest.mark.parametrize("nb", [2, 14, 600])
@pytest.mark.parametrize(("H", "h"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_a_bucket_is_the_first_largest_of_both_signs(H, h, nb, generator, monkeypatch):
    x = torch.randn(2, H, 70, 12, generator=generator)
    x[0, 0, :3], x[1, -1, 5] = 0.0, x[1, -1, 4] * 1000
    planes = lsh_planes(12, nb, heads=h, seed=1)[0]
    y = torch.einsum("bhtd,hdc->bhtc", x, planes.repeat_interleave(H // h, 0))
    want = torch.cat([y, -y], -1).argmax(-1)
    got = lsh_buckets(x, planes)
    assert got.dtype == torch.int32 and torch.equal(got.long(), want)
    assert torch.equal(got[0, 0, :3], torch.zeros(3, dtype=torch.int32)) and got[1, -1, 4] == got[1, -1, 5]
    monkeypatch.setattr("sparseflash.selection.orders.CHUNK", 64)  # pieces of one token
    assert torch.equal(got, lsh_buckets(x, planes))
    ties = torch.ones(1, 1, 4, 12)
    flat = torch.ones(1, 12, nb // 2) / 12**0.5
    assert torch.equal(lsh_buckets(ties, flat), torch.zeros(1, 1, 4, dtype=torch.int32))
    assert torch.equal(lsh_buckets(-ties, flat), torch.full((1, 1, 4), nb // 2, dtype=torch.int32))
    nan = torch.full((1, 1, 2, 12), float("nan"))
    assert ((lsh_buckets(nan, planes[:1]) >= 0) & (lsh_buckets(nan, planes[:1]) < nb)).all()


def test_tied_queries_and_normalised_keys_share_their_buckets(generator):
    q = 5 * torch.randn(2, 4, 500, 64, generator=generator)
    k = torch.nn.functional.normalize(q, dim=-1)
    q_bucket, k_bucket = sf.methods.HashSparse(nb=32).ids(q, k)
    assert (q_bucket == k_bucket).float().mean() > 0.999
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = sf.methods.HashSparse(nb=32).ids(q, k)
    assert torch.equal(again[0], q_bucket) and torch.equal(again[1], k_bucket)


def test_planes_per_head_or_shared_and_inside_a_group(generator):
    x = torch.randn(1, 1, 300, 16, generator=generator)
    q, k = x.expand(1, 4, -1, -1), x.expand(1, 2, -1, -1)
    own, k_own = sf.methods.HashSparse(nb=8).ids(q, k)
    assert torch.equal(own[:, 0], own[:, 1]) and torch.equal(own[:, 2], k_own[:, 1])
    assert not torch.equal(own[:, 1], own[:, 2])
    shared, k_shared = sf.methods.HashSparse(nb=8, planes="shared").ids(q, k)
    assert (shared == shared[:, :1]).all() and torch.equal(k_shared[:, 1], shared[:, 0])


def test_a_needle_is_always_reached_however_far(generator):
    k = torch.nn.functional.normalize(torch.randn(1, 4, 1024, 32, generator=generator), dim=-1)
    far = (torch.rand(1, 4, 1024, generator=generator) * (torch.arange(1024) + 1)).long()
    q = k.gather(2, far[..., None].expand_as(k)) * 90  # of the direction of one earlier key, anywhere
    method = sf.methods.HashSparse(nb=32)
    q_bucket, k_bucket = method.ids(q, k)
    mask = method.select(q, k).plan.to_dense()
    future = torch.ones(1024, 1024).triu(1).bool()
    target = (q @ k.mT).masked_fill(future, float("-inf")).argmax(-1)
    same = q_bucket == k_bucket.gather(-1, target)  # a key of the query's direction: but for rounding, always
    assert same.float().mean() > 0.999
    assert mask.gather(-1, target[..., None])[..., 0][same].all()


# ---------------------------------------------------------------- window heads beside hashed ones


@EACH
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(
    ("Hq", "Hkv", "n"), [(4, 4, 1), (4, 2, 1), (4, 2, 2), (6, 2, 4), (2, 1, 2), (4, 4, 4)]
)
def test_the_last_heads_are_causal_windows(Hq, Hkv, n, include_self, backend, generator):
    q, k, v, dout = tensors(generator, 150, B=1, Hq=Hq, Hkv=Hkv)
    method = sf.methods.HashSparse(nb=4, window_heads=n, head_window=50, include_self=include_self)
    mask = SELECTED.mask(*method.ids(q, k), Hq, include_self)
    gap = torch.arange(150)[:, None] - torch.arange(150)
    mask[:, Hq - n :] = (gap < 50) & (gap >= (0 if include_self else 1))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = method(*leaves, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, leaves, dout)
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))
    compare(got, *(x.detach() for x in (q, k, v)), mask, dout=dout)
    plan = method.select(q, k).plan.check()
    assert isinstance(plan, sf.Plan)


def test_window_heads_ignore_given_buckets(generator):
    q, k, v, _ = tensors(generator, 200, Tk=150)
    q_bucket = torch.randint(5, (1, 1, 200), generator=generator)
    k_bucket = torch.randint(5, (2, 4, 150), generator=generator)
    method = sf.methods.HashSparse(window_heads=2, head_window=30)
    plan = method.select(q, k, {"q_bucket": q_bucket, "k_bucket": k_bucket}).plan.check()
    mask = SELECTED.mask(q_bucket, k_bucket, 4).expand(2, -1, -1, -1).clone()
    gap = torch.arange(200)[:, None] - torch.arange(150)
    mask[:, 2:] = (gap < 30) & (gap >= 0)
    assert torch.equal(plan.to_dense(), mask)


# ---------------------------------------------------------------- what it costs, what it covers


@pytest.mark.parametrize(("nb", "least"), [(8, 0.82), (16, 0.65)])
def test_little_of_the_visited_area_is_masked(nb, least, generator):
    """Visible pairs over visited area: T = 16k, iid buckets of queries and keys, tiles of 128."""
    T = 16_384
    plan = sf.Plan.from_buckets(*torch.randint(nb, (2, 1, 1, T), generator=generator), buckets=nb)
    assert plan.tile == 128
    visible = plan.density * T * (T + 1) / 2
    assert visible / (plan.work * T * T) >= least


def brute_coverage(mask, q_bucket, k_bucket, include_self=False):
    target = SELECTED.mask(q_bucket, k_bucket, mask.shape[1], include_self).expand_as(mask)
    return int((mask & target).sum()) / int(target.sum())


@pytest.mark.parametrize("nb", [2, 8, 64])
def test_every_pair_of_equal_buckets_is_covered(nb, generator):
    q, k, *_ = tensors(generator, 700, Hkv=2)
    method = sf.methods.HashSparse(nb=nb)
    for include_self in (True, False):
        plan = method.select(q, k).plan
        assert sf.methods.coverage(plan, *method.ids(q, k), include_self=include_self) == 1.0


def test_coverage_is_what_counting_gives(generator):
    """For plans of spans, of gathered units with bits, and for a union of several."""
    q_bucket, k_bucket = torch.randint(5, (2, 2, 4, 300), generator=generator)
    keep = torch.rand(2, 2, 2, 300, generator=generator) > 0.5
    some = sf.Plan.from_keep(*keep)
    bits = sf.Plan.from_mask(torch.rand(1, 4, 300, 300, generator=generator) < 0.3)
    window = sf.Plan.dense(300, 300, causal=True, window=(40, 0))
    for plan in (some, bits, window):
        mask = plan.to_dense().repeat_interleave(4 // plan.to_dense().shape[1], 1).expand(2, -1, -1, -1)
        want = brute_coverage(mask, q_bucket, k_bucket)
        assert 0 < want < 1
        assert sf.methods.coverage(plan, q_bucket, k_bucket) == pytest.approx(want, rel=1e-9)
    union = some.to_dense().repeat_interleave(2, 1) | window.to_dense()
    want = brute_coverage(union, q_bucket, k_bucket)
    assert sf.methods.coverage((some, window), q_bucket, k_bucket) == pytest.approx(want, rel=1e-9)
    alone = torch.arange(300).expand(1, 1, 300)
    assert sf.methods.coverage(window, alone, alone) == 1.0  # no pair to miss


# ---------------------------------------------------------------- a window in every head


@EACH
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(
    ("window", "heads", "sinks"), [(2, 0, 0), (40, 0, 3), (40, 2, 0), (40, 2, 5), (500, 0, 0)]
)
def test_every_head_sees_its_last_keys_and_behind_them_its_bucket(
    window, heads, sinks, include_self, backend, generator
):
    """One softmax over both, each pair once: output and all gradients against the mask."""
    q, k, v, dout = tensors(generator, 150, B=1, Hq=4, Hkv=2)
    own = {"window_heads": heads, "head_window": 9, "include_self": include_self}
    method = sf.methods.HashSparse(nb=4, window=window, sink_tokens=sinks, **own)
    least = 0 if include_self else 1
    gap = torch.arange(150)[:, None] - torch.arange(150)
    first = torch.arange(150) < sinks
    mask = SELECTED.mask(*method.ids(q, k), 4, include_self) | (gap < window) | first
    mask &= gap >= least
    mask[:, 4 - heads :] = ((gap < 9) | first) & (gap >= least)
    assert torch.equal(selected_mask(method.select(q, k).plan), mask)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = method(*leaves, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, leaves, dout)
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))
    compare(got, *(x.detach() for x in (q, k, v)), mask, dout=dout)


@pytest.mark.parametrize("at", [0, 37, torch.tensor([5, 90])])
@pytest.mark.parametrize("local", [1, 13])
def test_buckets_with_a_window_are_their_union(local, at, generator):
    ids = torch.randint(5, (2, 3, 70), generator=generator)
    k_ids = torch.randint(5, (2, 1, 160), generator=generator)
    for include_self in (True, False):
        plan = sf.Plan.from_buckets(ids, k_ids, local=local, q_offset=at, include_self=include_self)
        position = torch.arange(70)[:, None] + torch.as_tensor(at).reshape(-1, 1, 1, 1)
        gap = position - torch.arange(160)
        want = ((ids[..., None] == k_ids[..., None, :]) | (gap < local)) & (gap >= int(not include_self))
        assert torch.equal(plan.to_dense().expand_as(want), want)
        assert int(sum(one.check().to_dense().expand_as(want).sum() for one in plan)) == int(want.sum())
    with pytest.raises(sf.PlanError, match="local=3: a window of last keys wants causal=True"):
        sf.Plan.from_buckets(ids, k_ids, local=3, causal=False)


@pytest.mark.parametrize("top", [1, 2])
def test_centroids_find_what_a_hash_of_untied_keys_does_not(top, generator):
    """Keys around eight directions, queries that ask for one each, turned far away from it."""
    centre = torch.nn.functional.normalize(torch.randn(8, 32, generator=generator), dim=-1)
    group = torch.randint(8, (1, 2, 600), generator=generator)
    k = 6 * centre[group] + 0.3 * torch.randn(1, 2, 600, 32, generator=generator)
    away = torch.randn(1, 2, 1, 32, generator=generator)
    q = 3 * centre[group.roll(7, -1)] + 6 * (away - (away @ centre.T @ torch.linalg.pinv(centre.T)))
    own = {"nb": 8, "buckets": "kmeans", "top": top}
    method = sf.methods.HashSparse(**own)
    recall = {
        name: float(sf.recall(q, k, one.select(q, k).plan).mean())
        for name, one in (("kmeans", method), ("lsh", sf.methods.HashSparse(nb=8)))
    }
    assert recall["kmeans"] > max(0.5, recall["lsh"] + 0.2), recall  # .54 to .83, and .05 to .33, over seeds
    q_ids, k_ids = method.ids(q, k)
    ranks = q_ids[None] if top == 1 else q_ids
    want = (ranks[..., None] == k_ids[:, :, None]).any(0) & torch.ones(600, 600, dtype=torch.bool).tril()
    assert torch.equal(selected_mask(method.select(q, k).plan), want)
    assert not method.causal_selection and sf.methods.HashSparse().causal_selection


def test_planes_drawn_anew_at_each_step_are_the_same_within_it(generator):
    q, k, _, _ = tensors(generator, 100)
    fixed, anew = sf.methods.HashSparse(nb=8), sf.methods.HashSparse(nb=8, resample=True)
    first, again, second = (anew.select(q, k, {"step": n}).plan.to_dense() for n in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(anew.select(q, k).plan.to_dense(), fixed.select(q, k).plan.to_dense())
    assert torch.equal(fixed.select(q, k, {"step": 9}).plan.to_dense(), fixed.select(q, k).plan.to_dense())


def test_the_old_name_of_window_heads_means_what_it_did():
    with pytest.warns(DeprecationWarning, match="window_heads"):
        old = sf.methods.HashSparse(nb=4, causal_heads=2, window=40)
    assert old == sf.methods.HashSparse(nb=4, window_heads=2, head_window=40)
    with pytest.warns(DeprecationWarning):
        assert sf.methods.get("hash-sparse", causal_heads=1) == sf.methods.HashSparse(window_heads=1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"buckets": "kmean"}, "buckets='kmean': expected one of lsh, kmeans"),
        ({"top": 2}, "a hash has one bucket"),
        ({"top": 9, "nb": 8, "buckets": "kmeans"}, "top=9: there are 8 buckets"),
        ({"window": -1}, "window=-1"),
        ({"window": 1, "include_self": False}, "shows no key"),
        ({"sink_tokens": 4}, "sink_tokens=4: they are seen beside a window"),
    ],
)
def test_what_a_window_and_buckets_may_not_be(wrong, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.methods.HashSparse(**wrong)
