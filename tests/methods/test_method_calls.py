"""What a method is told, what it may say, and what a session keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparseflash as sf
from harness import inputs
from sparseflash import Plan, SparseFlashError
from sparseflash.methods import Method, Selection, Session


@dataclasses.dataclass(frozen=True)
class Told(Method):
    """Keeps what it was told, and counts its calls by layer."""

    width: int = 16
    reads = ("scale", "softcap", "q_offset", "state", "layer", "branch", "rope")

    def select(self, q, k, ctx=None):
        ctx = ctx or {}
        plan = Plan.dense(
            q.shape[2], k.shape[2], causal=True, window=(self.width - 1, 0), q_offset=ctx.get("q_offset", 0)
        )
        return Selection(plan, state={"calls": (ctx.get("state") or {"calls": 0})["calls"] + 1, **ctx})


@dataclasses.dataclass(frozen=True)
class Observing(Told):
    """Wants the lse of its last call back."""

    def observe(self, q, k, out, lse, selection, ctx):
        return selection.state | {"lse": lse}


@dataclasses.dataclass(frozen=True)
class Flipped(Method):
    """Attends other rows than it was given."""

    def select(self, q, k, ctx=None):
        v = (ctx or {})["v"]
        turned = tuple(x.flip(2) for x in (q, k, v))
        return Selection(Plan.dense(q.shape[2], k.shape[2]), inputs=turned)

    def finish(self, out, lse, v, selection):
        assert torch.equal(v, selection.inputs[2])
        return out.flip(2), lse.flip(2)


def test_a_method_takes_dropout(generator):
    q, k, v, _, _ = inputs(generator, 60)
    window = sf.methods.Window(16)
    given = {"dropout_p": 0.3, "dropout_seed": 8}
    want = sf.attention(q, k, v, window.select(q, k).plan, **given)
    assert torch.equal(window(q, k, v, **given), want)
    assert torch.equal(Session(window)(q, k, v, **given), want)
    assert not torch.equal(window(q, k, v), want)


def test_a_method_takes_what_attention_takes(generator):
    q, k, v, _, _ = inputs(generator, 20, 60)
    given = {
        "scale": 0.3,
        "softcap": 5.0,
        "sink_logits": torch.randn(q.shape[1], generator=generator),
        "key_bias": torch.randn(1, 1, 60, generator=generator),
    }
    got = Told(width=8)(q, k, v, q_offset=40, return_lse=True, **given)
    plan = Plan.dense(20, 60, causal=True, window=(7, 0), q_offset=40)
    want = sf.attention(q, k, v, plan, return_lse=True, **given)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_method_is_told_what_its_attention_is_told(generator):
    q, k, v, _, _ = inputs(generator, 20, 20)
    told = Told().call(q, k, v, scale=0.3, softcap=5.0, ctx={"layer": 7}).state
    assert told["scale"] == 0.3 and told["softcap"] == 5.0 and told["layer"] == 7
    assert Told().call(q, k, v).state["scale"] == q.shape[-1] ** -0.5


def test_a_bias_of_the_call_is_added_to_that_of_the_method(generator):
    @dataclasses.dataclass(frozen=True)
    class Biased(Method):
        def select(self, q, k, ctx=None):
            return Selection(
                Plan.dense(q.shape[2], k.shape[2]), key_bias=torch.ones(1, 1, k.shape[2]).cumsum(-1)
            )

    q, k, v, _, _ = inputs(generator, 9, 9)
    bias = torch.randn(1, 1, 9, generator=generator)
    want = sf.attention(q, k, v, key_bias=bias + torch.arange(1, 10))
    torch.testing.assert_close(Biased()(q, k, v, key_bias=bias), want)


def test_a_method_may_attend_other_rows_than_it_was_given(generator):
    q, k, v, _, _ = inputs(generator, 20, 20)
    torch.testing.assert_close(Flipped()(q, k, v), sf.attention(q, k, v))


# ---------------------------------------------------------------- sessions


def test_a_session_keeps_a_state_for_each_layer_branch_and_slot(generator):
    q, k, v, _, _ = inputs(generator, 20, 20)
    session, other = Session(Told()), Session(Told())
    for _ in range(3):
        for layer in (0, 1):
            session(q, k, v, layer=layer)
    session(q, k, v, layer=0, branch="unguided")
    session(q, k, v, layer=0, slot=5)
    other(q, k, v, layer=0)

    def calls(of, **where):
        return of.context(where)["state"]["calls"]

    assert [calls(session, layer=n) for n in (0, 1)] == [3, 3]
    assert calls(session, layer=0, branch="unguided") == calls(session, layer=0, slot=5) == 1
    assert calls(other, layer=0) == 1 and len(session) == 4
    assert torch.equal(session(q, k, v, layer=0), Told()(q, k, v))
    session.reset()
    assert len(session) == 0 and "state" not in session.context({"layer": 0})


def test_a_session_keeps_what_a_method_observes(generator):
    q, k, v, _, _ = inputs(generator, 20, 20)
    session = Session(Observing())
    _, lse = session(q, k, v, layer=2, return_lse=True)
    assert torch.equal(session.context({"layer": 2})["state"]["lse"], lse)


# ---------------------------------------------------------------- settings by head

BY_HEAD = {
    "sink-window": {"window": (8, 16, 8, 40), "sink_tokens": (0, 0, 4, 4)},
    "hash-sparse": {"nb": (2, 4, 4, 8)},
    "reformer": {"bucket": (8, 8, 16, 32)},
    "dilated": {"dilation": (1, 2, 3, 3), "window": (5, 9, 9, 9)},
    "bigbird": {"random_blocks": (0, 1, 2, 2), "block": 8},
}


@pytest.mark.parametrize("slug", BY_HEAD)
def test_a_setting_may_be_one_value_for_each_query_head(slug, generator):
    """Each head is what it is with a method of its own; seeded ones draw by the number of the head."""
    q, k, v, _, _ = inputs(generator, 70, 70, B=2, H=4, Hkv=4)
    spread = BY_HEAD[slug]
    method = sf.methods.get(slug, **spread)
    assert eval(repr(method), vars(sf.methods)) == method and hash(method) == hash(
        sf.methods.get(slug, **spread)
    )
    out, lse = method(q, k, v, return_lse=True)
    for own, heads in sf.methods.heads.groups(sf.methods.heads.apart(method)):
        want = own(*(x[:, heads] for x in (q, k, v)), return_lse=True)
        for got, one in zip((out, lse), want, strict=True):
            torch.testing.assert_close(got[:, heads], one, rtol=1e-5, atol=1e-5)


def test_settings_by_head_follow_query_heads_of_a_group(generator):
    q, k, v, _, _ = inputs(generator, 50, 50, B=2, H=4, Hkv=2)
    out = sf.methods.SinkWindow(window=(4, 8, 16, 32))(q, k, v)
    for h, width in enumerate((4, 8, 16, 32)):
        one = sf.methods.SinkWindow(window=width)(
            *(x[:, n : n + 1] for x, n in ((q, h), (k, h // 2), (v, h // 2)))
        )
        torch.testing.assert_close(out[:, h : h + 1], one)


def test_settings_that_do_not_fit_the_heads_are_refused(generator):
    q, k, v, _, _ = inputs(generator, 9, 9, H=4, Hkv=2)
    with pytest.raises(SparseFlashError, match="settings for 3 heads, q has 4"):
        sf.methods.Window(window=(4, 8, 16))(q, k, v)
    with pytest.raises(SparseFlashError, match="window=0"):
        sf.methods.Window(window=(4, 0, 4, 4))
    with pytest.raises(SparseFlashError, match="one value for each query head"):
        sf.methods.SinkWindow(window=(4, 8), sink_tokens=(1, 2, 3))


@pytest.mark.parametrize("count", [2, 5, 130])
def test_queries_over_a_cache_choose_the_pages_that_each_would_alone(count, generator):
    q, k, _, _, _ = inputs(generator, count, 190, H=4, Hkv=2)
    method = sf.methods.Quest(budget=24, page=8)
    at = 190 - count
    plan = method.select(q, k, {"q_offset": at}).plan
    assert float(plan.kept) < 0.6
    for n in {0, 1, count // 2, count - 1}:
        one = method.select(q[:, :, n : n + 1], k, {"q_offset": at + n}).plan
        assert torch.equal(plan.to_dense()[:, :, n], one.to_dense()[:, :, 0])


def test_pages_are_counted_from_the_first_key_that_is_no_padding(generator):
    from sparseflash.methods.reading import plan_of_pages

    first, page, Tk = torch.tensor([[0], [5]]), 8, 50
    chosen = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(12)]).view(2, 2, 3, 3)
    chosen[0, 0, 0, 1] = -1
    at = torch.arange(Tk)
    want = torch.zeros(2, 2, 3, Tk, dtype=torch.bool)
    for b, h, i, n in torch.cartesian_prod(*map(torch.arange, chosen.shape)).tolist():
        begin = int(first[b]) + page * int(chosen[b, h, i, n])
        if chosen[b, h, i, n] >= 0:
            want[b, h, i] |= (at >= begin) & (at < begin + page) & (at <= 47 + i)
    plan = plan_of_pages(chosen.sort(-1).values, page, Tk, 47, first)
    assert torch.equal(plan.check().to_dense(), want)
