"""Caches that evict: exact over what they hold, and what each policy lets stay."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import sparseflash as sf
from sparseflash import SparseFlashError
from sparseflash.cache import (
    H2O,
    TOVA,
    AdaKV,
    Citrus,
    Everything,
    Evicting,
    ExpectedAttention,
    KNorm,
    MoA,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    Threshold,
)
from sparseflash.ops.rotary import turned

POLICIES = [
    Threshold(24, recent=4, share=0.8),
    StreamingLLM(24, sinks=3),
    MoA(rules=(((0, 0.1), (0, 0.5)),), least=8, block=4, sinks=2),
    SnapKV(24, recent=8),
    PyramidKV(24, recent=4, steep=3.0),
    AdaKV(24, recent=4),
    H2O(24, recent=12),
    TOVA(24),
    Citrus(24, recent=4),
    KNorm(24, sinks=1, recent=2),
    ExpectedAttention(24, last=16),
    SnapKV(0.4, recent=4),
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)


def drawn(generator, n, B=2, Hq=4, Hkv=2, D=16):
    return tuple(torch.randn(B, H, n, D, generator=generator) for H in (Hq, Hkv, Hkv))


def positions(cache, Tq=1):
    """The positions that each query head sees, bool [B,Hkv,Tq,tokens], by plan and places."""
    mask = cache.plan(Tq).check().to_dense()
    seen = torch.zeros(*mask.shape[:3], cache.tokens, dtype=torch.bool)
    for b, h, i, place in mask.nonzero().tolist():
        assert cache.positions[place] >= 0
        seen[b, h, i, cache.positions[place]] = True
    assert torch.equal(seen.sum(-1), mask.sum(-1))  # no position twice
    return seen


@every_policy
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.7}], ids=["", "softcap"])
def test_attention_is_exact_over_what_is_held(policy, options, generator):
    """Token by token, against dense attention with all other keys hidden; sinks and a chunk on the way."""
    cache = Evicting(policy, slack=5)
    q, k, v = drawn(generator, 60)
    dense = sf.attention(q, k, v, causal=True, **options)
    torch.testing.assert_close(cache.attend(q, k, v, **options), dense)
    sinks = torch.randn(4, generator=generator)
    for n in (1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 9, 1, 1):
        before = None if n > 5 else copy.deepcopy(cache)
        q, new_k, new_v = drawn(generator, n)
        k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        out = cache.attend(q, new_k, new_v, sink_logits=sinks, **options)
        if n != 1:
            continue
        mask = positions(cache).repeat_interleave(2, 1)
        assert bool(mask[..., -1].all())
        want = sf.attention(
            q, k, v, sf.Plan.from_mask(mask), sink_logits=sinks, backend="reference", **options
        )
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
        assert before is not None and cache.tokens == before.tokens + 1 == k.shape[2]


@every_policy
def test_no_more_is_held_than_the_budget_and_the_slack(policy, generator):
    cache = Evicting(policy, slack=5)
    sizes = set()
    for n in (100, *[1] * 23):
        cache.attend(*drawn(generator, n))
        most = cache.policy.most(torch.tensor([cache.tokens] * 2), torch.tensor([100] * 2), 2)
        most = most if isinstance(most, int) else int(most.expand(2, 2)[0].sum()) // 2
        assert int(cache.held.sum(1).max()) <= 2 * (most + 5)
        sizes.add(cache.bytes)
    assert cache.tokens == 123 and max(sizes) < 0.6 * 2 * 2 * 2 * 123 * 16 * 4


@pytest.mark.parametrize(
    "policy", [Everything(), *(dataclasses.replace(p, budget=1000) for p in POLICIES[3:])], ids=repr
)
def test_with_a_budget_for_everything_it_is_dense_attention(policy, generator):
    cache, (q, k, v) = Evicting(policy, slack=3), drawn(generator, 40)
    cache.attend(q, k, v)
    for n in (1, 1, 4, 1, 1, 10, 1):
        new = drawn(generator, n)
        q, k, v = (torch.cat(x, 2) for x in zip((q, k, v), new))
        out = cache.attend(*new)
        torch.testing.assert_close(out, sf.attention(new[0], k, v, causal=True, q_offset=k.shape[2] - n))
    cache.crop(-3)
    cache.attend(*drawn(generator, 1))
    assert cache.tokens == 40 + 19 - 3 + 1 == int(cache.held[0, 0])


def test_streaming_sees_the_first_and_the_last_whatever_is_held(generator):
    cache = Evicting(StreamingLLM(10, sinks=2), slack=4)
    cache.attend(*drawn(generator, 6))
    for t in range(7, 40):
        cache.attend(*drawn(generator, 1))
        want = [j < 2 or j >= t - 8 for j in range(t)]
        assert positions(cache)[1, 1, 0].tolist() == want


def test_moa_gives_each_head_a_window_of_its_own_and_memory_for_that(generator):
    """The rules are settled by the prompt: 100 tokens, 12 and 52 keys."""
    cache = Evicting(MoA(rules=(((0, 0.1), (2, 0.5)),), least=8, block=4, sinks=2), slack=3)
    q, k, v = drawn(generator, 100)
    cache.attend(q, k, v)
    assert cache.held.tolist() == [[12, 52]] * 2
    for t in range(101, 120):
        cache.attend(*drawn(generator, 1))
        seen = positions(cache)[0, :, 0]
        for h, span in enumerate((12, 52)):
            assert seen[h].tolist() == [j < 2 or j >= t - span + 2 for j in range(t)]
    assert cache.keys.shape[2] == 2 * (12 + 52 + 2 * 3)


def weights(q, k, rows):
    """The attention of the last rows, [B,Hq,rows,T], in fp64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
    score = q[:, :, -rows:].double() @ k.mT * q.shape[-1] ** -0.5
    T = k.shape[2]
    later = torch.arange(T) > torch.arange(T - rows, T)[:, None]
    return score.masked_fill(later, -torch.inf).softmax(-1)


def best(score, budget, forced):
    """Places of the best of each row, ascending, some in any case."""
    score = score.clone()
    score[..., forced] = torch.inf
    return score.argsort(dim=-1, descending=True, stable=True)[..., :budget].sort(-1).values


def of_group(x):
    return x.view(x.shape[0], 2, -1, x.shape[-1]).mean(2)


def expected(q, k, v):
    """By the definition, one head after another."""
    out = torch.zeros(k.shape[:3], dtype=torch.float64)
    for b in range(k.shape[0]):
        for h in range(2):
            for g in range(2):
                own = q[b, 2 * h + g, -16:].double() * q.shape[-1] ** -0.5
                mean, cov = own.mean(0), torch.cov(own.T)
                keys = k[b, h].double()
                logit = keys @ mean + ((keys @ cov) * keys).sum(-1) / 2
                out[b, h] += logit.softmax(-1) / 2
    return out * v.double().norm(dim=-1)


BY_HAND = {
    SnapKV(24, recent=8, kernel=1): lambda q, k, v: best(
        of_group(weights(q, k, 8).mean(2)), 24, slice(-8, None)
    ),
    SnapKV(24, recent=8, kernel=5, sinks=2): lambda q, k, v: best(
        torch.nn.functional.avg_pool1d(of_group(weights(q, k, 8).mean(2)), 5, 1, 2),
        24,
        [0, 1, *range(-8, 0)],
    ),
    H2O(24, recent=12): lambda q, k, v: best(of_group(weights(q, k, 80).sum(2)), 24, slice(-12, None)),
    TOVA(24): lambda q, k, v: best(
        weights(q, k, 1)[:, :, 0].mean(1, keepdim=True).expand(-1, 2, -1), 24, slice(-1, None)
    ),
    KNorm(24, recent=3): lambda q, k, v: best(-k.double().norm(dim=-1), 24, slice(-3, None)),
    ExpectedAttention(24, last=16, sinks=1): lambda q, k, v: best(expected(q, k, v), 24, [0, -1]),
}


@pytest.mark.parametrize("policy", BY_HAND, ids=repr)
def test_what_stays_of_a_prompt_is_what_the_definition_says(policy, generator):
    q, k, v = drawn(generator, 80)
    cache = Evicting(policy)
    cache.attend(q, k, v)
    want = torch.zeros(2, 2, 80, dtype=torch.bool).scatter_(2, BY_HAND[policy](q, k, v), True)
    assert torch.equal(positions(cache)[:, :, 0], want)


def test_adaptive_budgets_keep_the_best_of_all_heads(generator):
    q, k, v = drawn(generator, 80)
    k[:, 1] *= 6  # a head that looks at few
    cache = Evicting(AdaKV(24, recent=4, kernel=1, safe=0.25))
    cache.attend(q, k, v)
    score = of_group(weights(q, k, 4).mean(2))
    score[..., -4:] = torch.inf
    kept = positions(cache)[:, :, 0]
    assert kept.sum((1, 2)).tolist() == [48, 48] and bool((kept.sum(-1) >= 6).all())
    assert kept[:, 0].sum() > kept[:, 1].sum()
    for b in range(2):
        worst, rest = score[b][kept[b]].min(), score[b][~kept[b]].max()
        assert worst >= rest or int(kept[b, 1].sum()) == 6


def test_a_threshold_keeps_the_fewest_keys_that_hold_the_share(generator):
    """A head that looks at few keys keeps few; the memory of a head is that of its keys."""
    q, k, v = drawn(generator, 80)
    k[:, 1] *= 6
    cache = Evicting(Threshold(share=0.7, recent=4, kernel=1), slack=3)
    cache.attend(q, k, v)
    mass = of_group(weights(q, k, 4).mean(2))
    kept = positions(cache)[:, :, 0]
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own, some = mass[b, h], kept[b, h]
        assert bool(some[-4:].all()) and float(own[some].sum()) >= 0.7
        chosen = some.clone()
        chosen[-4:] = False
        if chosen.any():  # without the worst of them it would be less
            assert float(own[some].sum() - own[chosen].min()) < 0.7
            assert own[chosen].min() >= own[~some].max()
    assert int(kept[:, 1].sum()) < int(kept[:, 0].sum()) // 2
    assert cache.keys.shape[2] == int(kept.sum()) + 4 * 3


def test_budgets_of_a_pyramid_fall_and_keep_their_mean():
    policy = PyramidKV(1000, recent=10)
    each = [policy.of_layer(n, 10).budget for n in range(10)]
    assert each == sorted(each, reverse=True) and abs(sum(each) / 10 - 1000) < 1 and each[-1] == 50


def test_column_sums_are_those_of_all_queries_so_far(generator):
    """Of a prompt, a chunk and single tokens, while nothing has been let go."""
    cache, (q, k, v) = Evicting(H2O(500, recent=1), slack=40), drawn(generator, 30)
    cache.attend(q, k, v)
    for n in (1, 7, 1, 50):
        new = drawn(generator, n)
        q, k, v = (torch.cat(x, 2) for x in zip((q, k, v), new))
        cache.attend(*new)
    want = of_group(weights(q, k, q.shape[2]).sum(2)) * 2
    start, used = cache.tensors()["start"], cache.held
    got = [
        cache.tensors()["mass"][s : s + n] for s, n in zip(start.flatten().tolist(), used.flatten().tolist())
    ]
    torch.testing.assert_close(torch.stack(got).view(2, 2, -1).double(), want, atol=1e-4, rtol=1e-4)


@every_policy
def test_what_was_let_go_may_hold_anything(policy, generator):
    one, other = Evicting(policy, slack=5), Evicting(policy, slack=5)
    for n in (60, *[1] * 8):
        new = drawn(generator, n)
        out = [cache.attend(*new) for cache in (one, other)]
        assert torch.equal(*out)
        free = other.positions < 0
        other.keys[0, 0, free] = other.values[0, 0, free] = torch.nan


@every_policy
def test_rows_of_the_batch_go_their_own_ways(policy, generator):
    cache = Evicting(policy, slack=5)
    cache.attend(*drawn(generator, 60))
    cache.attend(*drawn(generator, 1))
    other = copy.deepcopy(cache)
    cache.select_rows(torch.tensor([1, 1, 0]))
    new = drawn(generator, 1)
    out = cache.attend(*(x[[1, 1, 0]] for x in new))
    torch.testing.assert_close(out, other.attend(*new)[[1, 1, 0]])
    cache.batch_repeat_interleave(2)
    assert cache.attend(*drawn(generator, 1, B=6)).shape[0] == 6


@every_policy
def test_padding_is_not_kept_and_a_padded_sequence_is_what_it_is_alone(policy, generator):
    both, alone = Evicting(policy, slack=5), Evicting(policy, slack=5)
    q, k, v = drawn(generator, 60)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[1, :13] = False
    among = sf.Plan.from_mask(real[:, None, None] & torch.ones(60, 60, dtype=torch.bool).tril())
    k[1, :, :13] = v[1, :, :13] = 1e4
    both.attend(q, k, v, among=among, real=real)
    alone.attend(*(x[1:, :, 13:] for x in (q, k, v)))
    for _ in range(9):
        new = drawn(generator, 1)
        out = both.attend(*new)
        torch.testing.assert_close(out[1:], alone.attend(*(x[1:] for x in new)))
    assert torch.equal(positions(both)[1:, ..., 13:], positions(alone))


def test_tokens_that_nothing_was_let_go_for_may_be_cropped(generator):
    cache = Evicting(SnapKV(24, recent=8), slack=6)
    cache.attend(*drawn(generator, 60))
    new = [drawn(generator, 1) for _ in range(8)]
    other = copy.deepcopy(cache)
    for x in new[:3]:
        cache.attend(*x)
    cache.crop(61)
    with pytest.raises(SparseFlashError, match="let go of keys at 60 tokens"):
        cache.crop(59)
    assert cache.tokens == 61
    want = [other.attend(*x) for x in (new[0], *new[4:])]
    for x, y in zip(new[4:], want[1:]):
        torch.testing.assert_close(cache.attend(*x), y)


def test_plain_torch_appends_and_decodes_by_the_plan(generator):
    """Without `attend`: several tokens at once, each up to its own place."""
    cache = Evicting(Everything(), slack=2)
    q, k, v = drawn(generator, 9)
    cache.append(k[:, :, :6], v[:, :, :6])
    cache.append(k[:, :, 6:], v[:, :, 6:])
    out = sf.decode(q[:, :, 6:], cache.keys, cache.values, cache.plan(3))
    torch.testing.assert_close(out, sf.attention(q[:, :, 6:], k, v, causal=True, q_offset=6))
    cache.reset()
    assert cache.tokens == 0 and cache.bytes == 0


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: SnapKV(0), "budget=0"),
        (lambda: SnapKV(1.5), "budget=1.5"),
        (lambda: SnapKV(10, recent=11), "at least sinks"),
        (lambda: SnapKV(recent=0), "recent=0"),
        (lambda: StreamingLLM(sinks=-1), "sinks=-1"),
        (lambda: MoA(), "rules=\\(\\): expected"),
        (lambda: MoA(rules=((0, 0.1), (2, 0.5))), "of each layer"),
        (lambda: PyramidKV(steep=0.5), "steep=0.5"),
        (lambda: AdaKV(safe=2.0), "safe=2.0"),
        (lambda: Threshold(share=0.0), "share=0.0"),
        (lambda: Evicting("snapkv"), "policy='snapkv'"),
        (lambda: Evicting(SnapKV(), slack=0), "slack=0"),
        (lambda: sf.cache.policy("snap"), "policies: adakv"),
        (lambda: sf.cache.policy("snapkv", windo=3), "has no windo"),
        (
            lambda: Evicting(MoA(rules=(((0, 1),),))).attend(*drawn(torch.Generator(), 9)),
            "1 KV heads: the layer has 2",
        ),
        (
            lambda: Evicting(SnapKV()).attend(*[x.requires_grad_() for x in drawn(torch.Generator(), 9)]),
            "no gradients",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(SparseFlashError, match=said):
        wrong()


def test_every_policy_has_a_name_a_paper_and_a_test():
    assert {type(sf.cache.policy(name)) for name in sf.cache.names() if name != "moa"} == {
        type(policy) for policy in POLICIES if not isinstance(policy, MoA)
    }
    for policy in POLICIES:
        paper = type(policy).paper.removeprefix("arXiv ")
        assert paper and paper in type(policy).__doc__ and eval(repr(policy)) == policy


@pytest.mark.parametrize("asked", [False, True])
def test_a_question_decides_what_stays_of_a_text_that_does_not_look_there(asked, generator):
    """One key that only the question asks for; it is not kept itself."""
    cache = Evicting(Citrus(40, recent=24), slack=4)
    look = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    across = torch.eye(16) - look.outer(look)
    question = drawn(generator, 5, B=1)
    question = (question[0] + 60 * look, *question[1:])
    for n in range(8):
        q, k, v = drawn(generator, 24, B=1)
        q, k = q @ across, k @ across
        if n == 2:
            k[:, :, 7] += 8 * look
        if asked and n:
            cache.asking = True
            cache.attend(*question)
            cache.asking = False
        cache.attend(q, k, v)
    assert cache.tokens == 8 * 24 and cache.held.tolist() == [[40, 40]]
    held = cache.plan().check().to_dense()[0, :, 0]
    each = [set(cache.positions[own].tolist()) for own in held]
    assert each[0] == each[1] >= set(range(7 * 24, 8 * 24))  # the newest chunk, in all heads
    assert (2 * 24 + 7 in each[0]) is asked


@pytest.mark.parametrize("policy", [Citrus(40, recent=16), StreamingLLM(24), SnapKV(24, recent=8)], ids=repr)
def test_what_is_asked_leaves_nothing_behind_and_sees_what_is_held(policy, generator):
    cache = Evicting(policy, slack=4)
    for _ in range(3):
        cache.attend(*drawn(generator, 30))
    before, (q, k, v) = copy.deepcopy(cache), drawn(generator, 6)
    cache.asking = True
    out = cache.attend(q, k, v)
    cache.asking = False
    assert cache.tokens == 90 and torch.equal(cache.held, before.held)
    for name in ("keys", "values", "positions"):  # as bytes: room that is not used yet may hold any, NaN too
        own, was = (getattr(x, name).view(torch.uint8) for x in (cache, before))
        assert torch.equal(own, was)
    torch.testing.assert_close(out, before.attend(q, k, v))


def test_the_mass_of_a_question_is_that_of_its_dense_softmax(generator):
    cache = Evicting(Citrus(1000), slack=1)
    q, k, v = drawn(generator, 50)
    cache.attend(q, k, v)
    new = drawn(generator, 7)
    cache.asking = True
    cache.attend(*new, softcap=5.0, scale=0.3)
    logits = new[0] @ torch.cat([k, new[1]], 2).repeat_interleave(2, 1).mT * 0.3
    logits = (5 * (logits / 5).tanh()).masked_fill(torch.ones(7, 57).triu(51).bool(), -torch.inf)
    want = logits.double().softmax(-1)[..., :50].sum(2).view(2, 2, 2, 50).sum(2)
    held = cache._held(1.0, None)
    torch.testing.assert_close(held.mass.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", [TOVA(24), H2O(24, recent=12), SnapKV(24, recent=8), AdaKV(24, recent=4)])
def test_renumbered_keys_lie_where_they_would_without_the_others(policy, generator):
    """Attention is that of the keys that are held, unrotated, at the places 0, 1, ... behind each other."""
    rope = 1.0 / 100.0 ** (torch.arange(8) / 8)
    cache = Evicting(dataclasses.replace(policy, renumber=True), slack=5, rope=rope)

    def at(x, place):
        return turned(x, -torch.as_tensor(place).view(1, -1), [rope])

    raw = drawn(generator, 60)
    cache.attend(at(raw[0], range(60)), at(raw[1], range(60)), raw[2])
    k, v = raw[1], raw[2]
    for n in range(60, 90):
        q, new_k, new_v = drawn(generator, 1)
        k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        out = cache.attend(at(q, [n]), at(new_k, [n]), new_v)
        seen = positions(cache)
        for b in range(2):
            for h in range(2):
                own = seen[b, h, 0].nonzero()[:, 0]
                where = torch.arange(len(own))
                keys, values = at(k[b : b + 1, h : h + 1, own], where), v[b : b + 1, h : h + 1, own]
                query = at(q[b : b + 1, 2 * h : 2 * h + 2], [len(own) - 1])
                want = sf.attention(query, keys, values, backend="reference")
                torch.testing.assert_close(out[b : b + 1, 2 * h : 2 * h + 2], want, atol=1e-4, rtol=1e-4)
    assert int(cache.held.max()) <= 24 * 2 + 5


def test_renumbering_takes_the_frequencies_and_padding_on_the_left(generator):
    rope = torch.ones(8)
    with pytest.raises(SparseFlashError, match="inverse frequencies"):
        Evicting(TOVA(24, renumber=True))
    with pytest.raises(SparseFlashError, match="no other does"):
        Evicting(TOVA(24), rope=rope)
    cache = Evicting(TOVA(24, renumber=True), rope=rope)
    with pytest.raises(SparseFlashError, match="padding_side"):
        cache.attend(*drawn(generator, 9), real=torch.arange(9).expand(2, 9) < 7)
