"""Rounds of a chat: what one layer chooses is what the layers above it read, turn after turn."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from sparseflash.methods import RoundAttention, Session

STARTS = (0, 7, 20, 29)


def drawn(generator, n, B=2, D=16):
    return tuple(torch.randn(B, H, n, D, generator=generator) for H in (4, 2, 2))


def turns(session, tokens, layers, generator=None):
    """Calls of one turn each, every layer in order; the plans of the layers of the last one."""
    q, k, v = tokens
    for a, b in zip(STARTS, (*STARTS[1:], q.shape[2])):
        plans = []
        for layer in layers:
            ctx = session.context({"layer": layer, "q_offset": a})
            found = session.method.select(q[:, :, a:b], k[:, :, :b], ctx)
            session.keep(ctx, found.state)
            plans.append(found.plan.check())
    return plans


def test_the_watershed_chooses_by_the_mass_of_the_question_and_those_above_read(generator):
    q, k, v = drawn(generator, 40)
    plans = turns(Session(RoundAttention(watershed=1, share=0.3)), (q, k, v), (0, 1, 2, 3))
    dense = sf.Plan.dense(11, 40, causal=True, q_offset=29).to_dense()
    assert torch.equal(plans[0].to_dense(), dense) and torch.equal(plans[1].to_dense(), dense)
    logits = q[:, :, 29:].double() @ k.double().repeat_interleave(2, 1).mT / 4
    mass = logits.masked_fill(~dense, -torch.inf).softmax(-1).sum((1, 2))
    by_round = torch.stack([mass[:, a:b].sum(-1) for a, b in zip(STARTS, STARTS[1:])], -1)
    for b in range(2):
        order = by_round[b].argsort(descending=True).tolist()
        kept, sofar = {0}, 0.0
        for r in order:
            if sofar < 0.3 * by_round[b].sum():
                kept.add(r)
            sofar += float(by_round[b, r])
        want = dense.clone()[0, 0]
        for r in set(range(3)) - kept:
            want[:, STARTS[r] : STARTS[r + 1]] = False
        for plan in plans[2:]:
            found = plan.to_dense()[b % plan.to_dense().shape[0], 0]
            assert torch.equal(found, want)
    assert not torch.equal(plans[2].to_dense()[0], plans[0].to_dense()[0])


def test_a_round_that_the_question_looks_at_is_found_whatever_was_read_before(generator):
    """And it may be another one at the next turn: nothing is forgotten. Shuffled borders lose it."""
    q, k, v = drawn(generator, 60, B=1)
    look = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    session = Session(RoundAttention(watershed=0, share=0.8))
    starts = (0, 10, 20, 30, 40, 50)
    for n, wanted in ((40, 1), (50, 3)):
        own = k.clone()
        own[:, :, starts[wanted] + 4] += 30 * look
        question = q[:, :, n : n + 10] + 3 * look
        ctx = session.context({"layer": 0, "q_offset": n})
        ctx["state"] = sf.methods.Rounds(tuple(x for x in starts if x < n), None)
        found = session.method.select(question, own[:, :, : n + 10], ctx).state
        assert found.kept[0].nonzero()[:, 0].tolist() == [0, wanted]


def test_decoding_goes_on_with_the_choice_of_the_turn_and_a_crop_takes_rounds_back(generator):
    q, k, v = drawn(generator, 44)
    session = Session(RoundAttention(watershed=0, share=0.3))
    plan = turns(session, (q[:, :, :40], k[:, :, :40], v), (0, 1))[1]
    for t in range(40, 44):
        found = session.select(q[:, :, t : t + 1], k[:, :, : t + 1], {"layer": 1, "q_offset": t}).plan
        row = found.to_dense()[:, :, 0]
        assert torch.equal(row[..., :40], plan.to_dense()[:, :, -1]) and bool(row[..., 29:].all())
    state = session.context({"layer": 0})["state"]
    assert state.starts == STARTS
    back = session.select(q[:, :, 20:25], k[:, :, :25], {"layer": 0, "q_offset": 20}).state
    assert back.starts == STARTS[:3] and back.kept.shape == (2, 2)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_out_and_gradients_are_those_of_dense_attention_without_the_other_rounds(share, generator):
    q, k, v = (x.requires_grad_() for x in drawn(generator, 45))
    method = RoundAttention(rounds=STARTS, share=share)
    plan = method.select(q, k).plan
    mask = plan.to_dense()
    assert bool((mask == torch.ones(45, 45).tril().bool()).all()) is (share == 1)
    ours = torch.autograd.grad(method(q, k, v).square().sum(), (q, k, v))
    twin = sf.attention(*(x.double() for x in (q, k, v)), sf.Plan.from_mask(mask), backend="reference")
    want = torch.autograd.grad(twin.square().sum(), (q, k, v))
    for a, b in zip(ours, want):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=2e-5)


def test_what_is_no_chat_is_refused(generator):
    for given in ((3, 5), (0, 5, 5), [0, 4]):
        with pytest.raises(sf.SparseFlashError, match="ascending positions"):
            RoundAttention(rounds=given)
    q, k, _ = drawn(generator, 9)
    with pytest.raises(sf.SparseFlashError, match="rounds are those of one chat"):
        RoundAttention().select(q, k, {"q_offset": torch.zeros(2, dtype=torch.int32)})


def test_calibration_finds_the_layer_from_which_on_all_look_alike():
    """Likeness of distributions over rounds, to those of the layers above: 1 less the total variation."""
    from sparseflash.bench.rounds import likeness, watershed

    one, other = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    near = torch.tensor([0.6, 0.3, 0.1])
    mass = {n: x.view(1, 3) for n, x in enumerate((one, other, near, one))}
    found = likeness(mass)
    assert found[0] == pytest.approx((0.4 + 0.9 + 1.0) / 3) and found[2] == pytest.approx(0.9)
    assert watershed(found, 0.85) == 2 and watershed(found, 0.3) == 0
    with pytest.raises(sf.SparseFlashError, match="no layer"):
        watershed(found, 0.95)


def test_calibration_weighs_rounds_as_dense_softmax_does():
    transformers = pytest.importorskip("transformers")
    from sparseflash.bench.rounds import masses

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, vocab_size=97, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(80)[None] % 97
    found = masses(model, ids, range(0, 80, 20))
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    for number, weight in enumerate(weights):
        last = weight[0, :, 60:].mean((0, 1)).view(4, 20).sum(-1)[:3]
        torch.testing.assert_close(found[number][-1, :3], last / last.sum(), atol=1e-5, rtol=1e-4)
