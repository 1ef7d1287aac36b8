"""Methods in padded batches of a Transformers model: every sequence is what it is alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

import harness
import sparseflash as sf
import tolerance
from cases import CASES, mask_of
from sparseflash.integrations.transformers.attention import SETTING
from sparseflash.integrations.transformers.control import Setting
from sparseflash.integrations.transformers.layers import Layer
from sparseflash.integrations.transformers.ranges import sparse_mask
from sparseflash.methods.base import Method, Selection

T, LENGTHS = 70, (70, 41, 55)
every_case = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c.slow else c for c in CASES], ids=str
)
HOLES = pytest.param("holes", marks=pytest.mark.slow)
BY_PLACE = {
    *("hash-sparse", "hash-sparse-strict", "hash-sparse-mixed", "qk-sparse"),
    *("window", "sink-window", "dilated", "strided", "documents", "grid-window-video", "bigbird-causal"),
    *("dual-chunk-attention", "quest", "quest-forced", "lserve", "moba", "double-sparsity"),
}
"""The cases whose plans say by places alone who sees whom, whatever follows."""


def padding(side, lengths=LENGTHS, total=T):
    """True where there is a token, bool [B,total]."""
    at = torch.arange(total)
    n = torch.tensor(lengths)[:, None]
    if side == "holes":  # tokens at both ends, padding between them
        return (at < n // 3) | (at >= total - (n - n // 3))
    return at >= total - n if side == "left" else at < n


def layer(method):
    """A stand-in for an attention layer under `sparse(model, prefill=method)`."""
    module = nn.Module()
    setattr(module, SETTING, Setting(Layer("layer", 0, module), prefill=method))
    return module


def attend(method, q, k, v, real=None, function=causal_mask_function, offset=0):
    """What the layer gives, [B,H,S,D]."""
    mask = sparse_mask(
        len(q), q.shape[2], k.shape[2], q_offset=offset, mask_function=function, attention_mask=real
    )
    return sf.transformers.sparse_attention(layer(method), q, k, v, mask)[0].transpose(1, 2)


def inputs(generator, B=3):
    return harness.inputs(generator, T, B=B, D=16)[:3]


def slot(x, b, real):
    """The tokens of sequence b alone, in the same slot of a batch: methods may draw by slot."""
    return x[b : b + 1, :, real].repeat(b + 1, 1, 1, 1)


def refuses(call):
    """What a method that is not for such a layer says, or None."""
    try:
        call()
    except sf.SparseFlashError as fault:
        return str(fault)


def sees_alone(method, q, k, v, causal=True, within=None):
    """Mask of a method on the last of some sequences: bool [1,H,S,T]; a causal layer cuts what looks ahead.

    But for a plan that is causal and says what is ahead (a prefix, a block): there the method's word holds.
    """
    n = q.shape[2]
    selection = method.select(q, k, {"v": v, "q_offset": 0, "layer": 0})
    plans = selection.plan if isinstance(selection.plan, tuple) else (selection.plan,)
    if method.forward_only:  # what is left out depends on what else is seen
        whole = torch.ones(n, n, dtype=torch.bool) if within is None else within
        inside = tuple(plan & sf.Plan.from_mask(whole[None, None]) for plan in plans)
        plans = method.shown(q, k, dataclasses.replace(selection, plan=inside))
        plans = plans if isinstance(plans, tuple) else (plans,)
    mask = mask_of(plans).expand(len(q), -1, -1, -1)[-1:]
    if causal and (within is not None or not all(plan.causal for plan in plans)):
        mask = mask & torch.ones(n, n, dtype=torch.bool).tril()
    return mask if within is None else mask & within


@every_case
@pytest.mark.parametrize("side", ["left", "right", HOLES])
def test_a_sequence_in_a_padded_batch_is_that_sequence_alone(case, side, generator):
    """Output and gradients, to the derived tolerance; padding, changed, changes nothing."""
    method, real = case.method(), padding(side)
    q, k, v = (x.requires_grad_() for x in inputs(generator))
    dout = torch.randn(q.shape, generator=generator) * real[:, None, :, None]
    if said := refuses(lambda: attend(method, *(x[:1] for x in (q, k, v)))):
        assert refuses(lambda: attend(method, q, k, v, real)), said
        return
    out = attend(method, q, k, v, real)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for b, keep in enumerate(real):
        one = [slot(x.detach(), b, keep).requires_grad_() for x in (q, k, v)]
        got = [x[b : b + 1, :, keep] for x in (out, *grads)]
        given = dout[b : b + 1, :, keep]
        if type(method).finish is not Method.finish:  # what it makes of the sum is no softmax
            alone = attend(method, *one)
            want = torch.autograd.grad(alone[-1:], one, given)
            torch.testing.assert_close(got, [alone[-1:], *(x[-1:] for x in want)])
            continue
        mask = sees_alone(method, *one)
        got = dict(zip(("out", "dq", "dk", "dv"), (x.detach() for x in got)))
        alone = [x.detach()[-1:] for x in one]
        tolerance.compare(got, *alone, mask, dout=given, note=f"{method!r}, {side}, {b}")
    with torch.no_grad():
        hidden = ~real[:, None, :, None]
        other = attend(method, *(torch.where(hidden, x, y) for x, y in zip((9.0, 9.0, 1e4), (q, k, v))), real)
    torch.testing.assert_close(other.masked_fill(hidden, 0), out.detach().masked_fill(hidden, 0))


@every_case
def test_a_padded_batch_of_a_bidirectional_layer_is_its_sequences_alone(case, generator):
    method, (q, k, v) = case.method(), inputs(generator)
    see = {"function": bidirectional_mask_function}
    if refuses(lambda: attend(method, q, k, v, **see)):
        assert "causal" in refuses(lambda: attend(method, q, k, v, padding("left"), **see))
        return
    for side in ("left", "right"):
        real = padding(side)
        out = attend(method, q, k, v, real, **see)
        for b, keep in enumerate(real):
            one = [slot(x, b, keep) for x in (q, k, v)]
            mask = sees_alone(method, *one, causal=False)
            tolerance.compare({"out": out[b : b + 1, :, keep]}, *(x[-1:] for x in one), mask)


@every_case
def test_a_chunk_of_padded_prompts_is_that_chunk_of_each_alone(case, generator):
    """30 queries over a cache, whose padding lies on the left; one sequence begins within the chunk."""
    method, lengths = case.method(), (70, 41, 15)
    q, k, v = inputs(generator)
    q, real = q[:, :, -30:], padding("left", lengths)
    whole = refuses(lambda: attend(method, q[:1], k[:1], v[:1], offset=T - 30))
    if whole or "q_offset" not in method.reads:
        assert refuses(lambda: attend(method, q, k, v, real, offset=T - 30))
        return
    out = attend(method, q, k, v, real, offset=T - 30)
    for b, n in enumerate(lengths):
        one = q[b : b + 1, :, -min(n, 30) :], k[b : b + 1, :, -n:], v[b : b + 1, :, -n:]
        want = attend(method, *one, offset=max(n - 30, 0))
        torch.testing.assert_close(out[b : b + 1, :, -min(n, 30) :], want)


@every_case
def test_packed_documents_are_those_documents_alone(case, generator):
    """Lengths that share a batch, and one that does not."""
    method, edges = case.method(), (0, 17, 48, 70)
    q, k, v = inputs(generator, B=1)
    cu = torch.tensor(edges, dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}

    def run():
        return sf.transformers.sparse_attention(layer(method), q, k, v, None, **packed)[0].transpose(1, 2)

    if refuses(lambda: attend(method, q, k, v)):
        assert refuses(run)
        return
    out = run()
    for a, b in itertools.pairwise(edges):
        if case.slug == "qk-sparse" and a:
            continue  # draws for each document what it draws for its slot in a batch
        want = attend(method, *(x[:, :, a:b] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, a:b], want)


@every_case
@pytest.mark.parametrize("side", ["left", HOLES])
def test_a_window_of_the_model_itself_is_kept_beside_padding(case, side, generator):
    method, (q, k, v) = case.method(), inputs(generator)
    real = padding(side)
    see = {"function": sliding_window_causal_mask_function(20)}
    if refuses(lambda: attend(method, q[:1], k[:1], v[:1], **see)):
        assert refuses(lambda: attend(method, q, k, v, real, **see))
        return
    out = attend(method, q, k, v, real, **see)
    for b, keep in enumerate(real):
        if case.slug == "qk-sparse" and b:
            continue
        at = keep.nonzero()[:, 0]  # windows are those of the row, padding included
        gap = at[:, None] - at
        one = [x[b : b + 1, :, keep] for x in (q, k, v)]
        if type(method).finish is Method.finish:
            mask = sees_alone(method, *one, within=(gap >= 0) & (gap < 20))
            tolerance.compare({"out": out[b : b + 1, :, keep]}, *one, mask)
        elif side == "left":
            torch.testing.assert_close(out[b : b + 1, :, keep], attend(method, *one, **see))


def claims_place_alone(method, q, k):
    plans = method.select(q, k).plan
    plans = plans if isinstance(plans, tuple) else (plans,)
    by_place = all(p.causal and p.q_pos is None and p.k_pos is None and p.q_offset == 0 for p in plans)
    return by_place and method.causal_selection


@every_case
def test_which_methods_claim_to_go_by_place_alone(case, generator):
    """The others are asked for the sequences of each length by themselves."""
    q, k, _ = inputs(generator, B=1)
    assert claims_place_alone(case.method(), q, k) == (str(case) in BY_PLACE)


@pytest.mark.parametrize("case", [c for c in CASES if str(c) in BY_PLACE], ids=str)
def test_a_plan_by_place_alone_does_not_depend_on_how_many_tokens_follow(case, generator):
    """What one call for all sequences of a padded batch relies on, of a method that claims it."""
    method = case.method()
    q, k, v = inputs(generator, B=1)
    whole = mask_of(method.select(q, k).plan)
    for n in (1, 2, 17, 64):
        part = mask_of(method.select(q[:, :, :n], k[:, :, :n]).plan)
        assert torch.equal(part, whole[:, :, :n, :n])


@dataclasses.dataclass(frozen=True)
class HalfOfAll(Method):
    """Sees the first half of the sequence, in all directions: a budget that follows the length."""

    def select(self, q, k, ctx=None):
        keep = torch.arange(k.shape[2]) < k.shape[2] // 2
        return Selection(sf.Plan.from_mask(keep.expand(1, 1, q.shape[2], -1)))


@pytest.mark.parametrize("function", [causal_mask_function, bidirectional_mask_function])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_method_of_ones_own_is_asked_about_the_tokens_of_each_sequence(function, side, generator):
    (q, k, v), real = inputs(generator), padding(side)
    out = attend(HalfOfAll(), q, k, v, real, function)
    for b, keep in enumerate(real):
        want = attend(HalfOfAll(), *(x[b : b + 1, :, keep] for x in (q, k, v)), function=function)
        torch.testing.assert_close(out[b : b + 1, :, keep], want)
        assert not out[b, :, ~keep].any()
