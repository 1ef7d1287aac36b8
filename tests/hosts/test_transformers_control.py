"""`sparse(model, ...)`: methods in chosen layers, phases and heads of a model, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import sparseflash as sf
from sparseflash.methods.base import Method, Selection
from test_transformers import T, close, eager, model, padded, tokens
from transformer_models import FAMILIES, tiny

WINDOW = sf.methods.SinkWindow(window=20, sink_tokens=3)
HASHED = sf.methods.HashSparse(nb=4, window_heads=2, head_window=16)
BOTH = sf.methods.HashSparse(nb=4, window=9, sink_tokens=2)
FULL = (sf.methods.HashSparse(nb=1), sf.methods.SinkWindow(window=1 << 20))


def logits(one, **inputs):
    with torch.no_grad():
        return one(**inputs).logits


def own(family):
    """The family's model, on its own attention."""
    one = model(family)
    one.set_attn_implementation(FAMILIES[family][3])
    return one


def positions(mask):
    """The positions that generate() gives padded sequences."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def prefilled(one, method, ids, **inputs):
    with sf.transformers.sparse(one, prefill=method):
        return logits(one, input_ids=ids, **inputs)


@pytest.mark.parametrize("method", FULL, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt-oss", "deepseek-v3", "gemma2"])
def test_a_full_budget_is_the_model_itself(family, method):
    one = own(family)
    for inputs in ({}, {"attention_mask": padded("left")}):
        want = logits(one, input_ids=tokens(), **inputs)
        at = inputs["attention_mask"].bool() if inputs else None
        close(prefilled(one, method, tokens(), **inputs), want, at)


def test_a_method_sees_what_a_mask_of_it_lets_see():
    one = own("llama")
    mask = WINDOW.select(torch.zeros(1, 4, T, 16), torch.zeros(1, 2, T, 16)).plan.to_dense()
    want = logits(one, input_ids=tokens(), attention_mask=mask.expand(2, 1, -1, -1))
    close(prefilled(one, WINDOW, tokens()), want)
    assert float((want - logits(one, input_ids=tokens())).abs().max()) > 0.1


@pytest.mark.parametrize("method", [WINDOW, HASHED, BOTH], ids=["sink-window", "hash-sparse", "both"])
def test_padding_changes_nothing(method):
    one, mask = own("llama"), padded("left")
    got = prefilled(one, method, tokens(), **positions(mask))
    close(got[0], prefilled(one, method, tokens())[0])
    close(got[1:, T - 87 :], prefilled(one, method, tokens()[1:, T - 87 :]))
    right = prefilled(one, method, tokens(), attention_mask=padded("right"))
    close(right[1:, :87], prefilled(one, method, tokens()[1:, :87]))


@pytest.mark.parametrize("method", [WINDOW, HASHED, BOTH], ids=["sink-window", "hash-sparse", "both"])
def test_a_prompt_in_chunks_is_the_whole_prompt(method):
    one, ids, mask, cache, parts = model("llama"), tokens(), padded("left"), hf.DynamicCache(), []
    with sf.transformers.sparse(one, prefill=method):
        want = logits(one, input_ids=ids, attention_mask=mask)
        for a, b in ((0, 64), (64, 150)):
            inputs = {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b], "past_key_values": cache}
            parts.append(logits(one, **inputs))
    close(torch.cat(parts, 1), want, mask.bool())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method", [sf.methods.PrefixLM(prefix=256), sf.methods.BlockCausal(block=40), HASHED], ids=repr
)
def test_padding_of_any_kind_is_not_seen_by_any_method(method, side):
    """The model's logits at tokens, whatever stands at padding; a prefix longer than the prompts, too."""
    one, mask = own("llama"), padded(side)
    other = torch.where(mask.bool(), tokens(), 96 - tokens())
    got, same = (prefilled(one, method, ids, **positions(mask)) for ids in (tokens(), other))
    close(got, same, mask.bool())
    close(got[1:, mask[1].bool()], prefilled(one, method, tokens()[1:, mask[1].bool()]))


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_decoding_continues_what_prefill_began(how):
    """Token by token over a cache, left padding included, is what one call over all tokens gives."""
    one, ids = model("llama"), tokens()
    with sf.transformers.sparse(one, prefill=WINDOW, decode=WINDOW):
        out = one.generate(
            ids,
            attention_mask=padded("left"),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
            **how,
        )
        if "num_beams" in how:
            return
        mask = torch.nn.functional.pad(padded("left"), (0, 6), value=1)
        want = logits(one, input_ids=out.sequences, **positions(mask))
    close(torch.stack(out.logits, 1), want[:, T - 1 : -1])


@pytest.mark.parametrize("method", [WINDOW, [HASHED, None, WINDOW, HASHED]], ids=["window", "by head"])
def test_packed_documents_are_the_same_as_apart(method):
    """Lengths of 1, 63, 25, ... in two rows of one length; output and gradients."""
    edges = ([0, 1, 64, 89, 150], [0, 40, 150])
    one, ids = model("llama"), tokens()
    at = torch.stack([torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(row)]) for row in edges])
    with sf.transformers.sparse(one, prefill=method):
        together = one(input_ids=ids, position_ids=at, use_cache=False).logits
        apart = [
            torch.cat(
                [one(input_ids=x[None, a:b], use_cache=False).logits for a, b in itertools.pairwise(row)], 1
            )
            for x, row in zip(ids, edges)
        ]
        apart = torch.cat(apart)
        cu = torch.tensor(edges[0], dtype=torch.int32)
        by_edges = logits(one, input_ids=ids[:1], use_cache=False, position_ids=at[:1], cu_seq_lens_q=cu)
    close(together.detach(), apart.detach())
    close(by_edges, apart[:1].detach())
    want, got = (torch.autograd.grad(x.square().mean(), list(one.parameters())) for x in (apart, together))
    for x, y in zip(got, want, strict=True):
        close(x, y)


@pytest.mark.parametrize(
    "inputs, unlike",
    [
        ({"position_ids": torch.arange(T)[None]}, {"position_ids": torch.arange(T)[None] % 50}),
        pytest.param(
            {"attention_mask": padded("left")}, {"attention_mask": padded("holes")}, marks=pytest.mark.slow
        ),
    ],
    ids=["whole", "padded"],
)
def test_a_model_under_a_method_compiles(inputs, unlike):
    """Fullgraph, gradients too; what its trace took for granted the graph checks."""
    torch._dynamo.reset()
    one, ids = tiny("llama", num_hidden_layers=1).train(), tokens()
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")

    def gradients(run, **inputs):
        one.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
        return [x.grad.clone() for x in one.parameters()]

    with sf.transformers.sparse(one, prefill=HASHED):
        for got, want in zip(gradients(compiled, **inputs), gradients(one, **inputs), strict=True):
            close(got, want)
        with pytest.raises(RuntimeError, match="one document a row"):
            gradients(compiled, **unlike)
    torch._dynamo.reset()


def test_training_under_a_method_has_exact_gradients():
    """Against autograd through the stock model under the dense mask of the method; checkpointed too."""
    one, ids = tiny("llama").train(), tokens()
    mask = WINDOW.select(torch.zeros(1, 4, T, 16), torch.zeros(1, 2, T, 16)).plan.to_dense()

    def gradients(**inputs):
        one.zero_grad()
        one(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
        return {n: x.grad.clone() for n, x in one.named_parameters()}

    want = gradients(attention_mask=mask.expand(2, 1, -1, -1))
    for checkpointed in (False, True):
        if checkpointed:
            one.gradient_checkpointing_enable()
        with sf.transformers.sparse(one, prefill=WINDOW):
            got = gradients()
        for name, x in want.items():
            close(got[name], x, what=name)


def test_layers_and_heads_have_methods_of_their_own():
    one, ids = own("llama"), tokens()
    dense, all_of_it = logits(one, input_ids=ids), prefilled(one, WINDOW, ids)
    with sf.transformers.sparse(one, prefill=WINDOW, layers=[]):
        close(logits(one, input_ids=ids), dense)
    with sf.transformers.sparse(one, prefill={0: WINDOW, 1: [WINDOW] * 4}):
        close(logits(one, input_ids=ids), all_of_it)
    with sf.transformers.sparse(one, prefill=WINDOW, layers="*layers.1.*"):
        by_name = logits(one, input_ids=ids)
    with sf.transformers.sparse(one, prefill={1: WINDOW}):
        close(logits(one, input_ids=ids), by_name)
    assert float((by_name - all_of_it).abs().max()) > 0.1 < float((by_name - dense).abs().max())

    q, k, v = torch.randn(1, 4, 90, 16), *torch.randn(2, 1, 2, 90, 16)
    layer = sf.transformers.attention_layers(one)[0].module
    with sf.transformers.sparse(one, prefill=[WINDOW, None, sf.methods.HashSparse(nb=4), None]):
        got = sf.transformers.sparse_attention(layer, q, k, v, None)[0].transpose(1, 2)
    plain = sf.attention(q, k, v, causal=True)
    close(got[:, [1, 3]], plain[:, [1, 3]])
    close(got[:, :1], WINDOW(q, k, v)[:, :1])


@pytest.mark.parametrize("order", [(0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 1, 1), (2, 1, 2, 0)])
def test_heads_of_unlike_methods_keep_their_own_sinks(order):
    """GPT-OSS: four heads on two heads of keys, a sink for each."""
    layer = sf.transformers.attention_layers(own("gpt-oss"))[0].module
    q, k, v = torch.randn(2, 4, 90, 16), *torch.randn(2, 2, 2, 90, 16)
    sinks = torch.tensor([-2.0, 0.0, 1.5, 4.0])
    methods = [WINDOW, sf.methods.Strided(stride=4), None]
    with sf.transformers.sparse(model("gpt-oss"), prefill=[methods[n] for n in order], layers=[0]):
        got, _ = sf.transformers.sparse_attention(layer, q, k, v, None, s_aux=sinks)
    for head, n in enumerate(order):
        keep = torch.ones(90, 90, dtype=torch.bool).tril()
        if methods[n] is not None:
            keep = methods[n].select(q, k).plan.to_dense()[:, :1]
        want = eager(q[:, [head]], k[:, [head // 2]], v[:, [head // 2]], keep, sinks[[head]])
        close(got[:, :, [head]], want)


def test_everything_is_restored():
    one = tiny("llama")
    before = {name: vars(m).copy() for name, m in one.named_modules()}

    def untouched():
        for name, m in one.named_modules():
            left = {n: x for n, x in vars(m).items() if x is not None or n in before[name]}
            assert left.keys() == before[name].keys(), name
        return one.config._attn_implementation == "sdpa"

    with sf.transformers.sparse(one, prefill=WINDOW):
        outer = logits(one, input_ids=tokens())
        with sf.transformers.sparse(one, prefill=HASHED, layers=[1]):
            assert float((logits(one, input_ids=tokens()) - outer).abs().max()) > 0.1
        close(logits(one, input_ids=tokens()), outer)
    assert untouched()
    with pytest.raises(RuntimeError, match="on purpose"):
        with sf.transformers.sparse(one, prefill=WINDOW):
            raise RuntimeError("on purpose")
    assert untouched()
    with pytest.raises(sf.SparseFlashError):
        with sf.transformers.sparse(one, prefill=WINDOW, layers=[7]):
            pass
    assert untouched()


@dataclasses.dataclass(frozen=True)
class NoOffset(Method):
    """A method that says that it knows of caches, and does not."""

    reads = ("q_offset",)

    def select(self, q, k, ctx=None):
        return Selection(sf.Plan.dense(q.shape[2], k.shape[2], causal=True))


def test_what_is_not_defined_is_refused():
    def refuses(message, one, prefill=None, inputs=None, **options):
        with pytest.raises(sf.SparseFlashError, match=message):
            with sf.transformers.sparse(one, prefill=prefill, **options):
                logits(one, **(inputs or {"input_ids": tokens()}))

    llama = model("llama")
    refuses("for training, prefill, not for decode", llama, decode=HASHED)
    refuses("expected a method", llama, prefill=7)
    refuses("prefill='hash-sparse': expected a method", llama, prefill="hash-sparse")
    refuses("9 is none of LlamaForCausalLM: it has .0, 1.", llama, prefill=WINDOW, layers=[9])
    refuses(re.escape("the layers [1], which are not among [0]"), llama, prefill={1: WINDOW}, layers=0)
    refuses("3 methods for 4 query heads", llama, prefill=[WINDOW] * 3)
    refuses("has a window of its own", model("mistral"), prefill=WINDOW)
    dilated, ids = sf.methods.Dilated(causal=True), tokens()
    for method, said in (
        (NoOffset(), "does not take queries that begin behind"),
        (dilated, "q_offset.*Dilated does not read it and takes it to be 0"),
    ):
        cache = hf.DynamicCache(config=llama.config)
        logits(llama, input_ids=ids[:, :60], past_key_values=cache)
        refuses(said, llama, method, {"input_ids": ids[:, 60:], "past_key_values": cache})
    packed = {"input_ids": tokens(1), "position_ids": torch.arange(T)[None] % 50, "use_cache": False}
    refuses("packed documents, with a window", model("mistral"), WINDOW, packed, layers="*")
    with pytest.raises(sf.SparseFlashError, match=r"packed documents, report\(\)"):
        with sf.transformers.sparse(llama, prefill=WINDOW):
            sf.transformers.report(llama, **packed)
    bart, window = model("bart"), sf.methods.Window(window=8, causal=False)
    across = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=2), "attention_mask": padded("right")}
    with torch.no_grad(), sf.transformers.sparse(bart, prefill=window, layers="*encoder_attn"):
        with pytest.raises(sf.SparseFlashError, match="another sequence, with padding there"):
            bart(**across)
    bert = model("bert")
    with pytest.raises(sf.SparseFlashError, match="layer.0.*bidirectional.*causal=False"):
        with sf.transformers.sparse(bert, prefill=WINDOW):
            bert(input_ids=tokens())
    bloom = hf.BloomModel(hf.BloomConfig(hidden_size=32, n_head=2, n_layer=1, vocab_size=97))
    refuses("BloomAttention compute attention themselves", bloom, prefill=WINDOW)


def test_a_windowed_layer_keeps_its_window():
    one, window = model("gemma2"), sf.methods.SinkWindow(window=40, sink_tokens=0)
    got = prefilled(one, {0: window}, tokens())  # layer 0 has a window of 24 and softcap
    one.set_attn_implementation("sparse")
    close(got, logits(one, input_ids=tokens()))


def test_a_report_has_density_recall_and_time_of_every_head():
    one, ids = own("llama"), tokens()
    with sf.transformers.sparse(one, prefill=[WINDOW, WINDOW, None, FULL[0]], layers=[1]):
        found = sf.transformers.report(one, input_ids=ids)
    assert [row.index for row in found] == [0, 1]
    dense, row = found
    assert set(dense.methods) == {"dense"} and dense.density == dense.recall == (1.0,) * 4
    pairs = sum(min(i + 1, 20) + min(max(i - 19, 0), 3) for i in range(T)) / (T * (T + 1) / 2)
    for head, want in enumerate((pairs, pairs, 1, 1)):
        assert row.density[head] == pytest.approx(want, rel=1e-6)
    assert 0.05 < min(row.recall[:2]) <= max(row.recall[:2]) < 0.95
    assert row.recall[2:] == pytest.approx((1, 1), abs=1e-5)
    assert min(row.seconds, row.dense_seconds) > 0 and "SinkWindow" in str(found)

    with sf.transformers.sparse(one, prefill=WINDOW, layers=[1]):  # padding counts for nothing
        (_, padded_row) = sf.transformers.report(one, **positions(padded("left")), input_ids=ids)
    short = sum(min(i + 1, 20) + min(max(i - 19, 0), 3) for i in range(87))
    share = (short + pairs * T * (T + 1) / 2) / (87 * 88 / 2 + T * (T + 1) / 2)
    assert padded_row.density[0] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("against", [None, "sdpa", "eager"])
def test_verify_compares_with_what_it_is_told_to(against):
    one = own("llama")
    for set_, want in (("eager", "eager"), ("sdpa", "sdpa"), ("sparse", "eager")):
        one.set_attn_implementation(set_)
        with pytest.raises(sf.SparseFlashError, match=f"differs from '{against or want}'"):
            sf.transformers.verify(one, prefill=WINDOW, layers=[1], against=against, input_ids=tokens())
        assert one.config._attn_implementation == set_


def test_verify_names_the_first_layer_that_differs():
    one, inputs = own("gemma2"), {"input_ids": tokens(), "attention_mask": padded("left")}
    assert len(sf.transformers.verify(one, **inputs)) == 2
    assert len(sf.transformers.verify(one, prefill=FULL[0], layers=[1], **inputs)) == 2
    with pytest.raises(
        sf.SparseFlashError, match=r"layers\.1\.self_attn is the first layer .* 1 layers before"
    ):
        sf.transformers.verify(one, prefill=WINDOW, layers=[1], **inputs)
    assert one.config._attn_implementation == "eager"
    with sf.transformers.sparse(one, prefill=WINDOW):  # what is set elsewhere does not matter
        sf.transformers.verify(one, **inputs)


@pytest.mark.parametrize(("numbers", "want"), [((5, 2), (5, 2)), ((3, 3), (0, 1)), ((None, 4), (0, 1))])
def test_layers_have_their_own_numbers_where_these_tell_them_apart(numbers, want):
    """Hybrid models number all their layers, of which few attend."""
    one = tiny("llama")
    layers = [x.module for x in sf.transformers.attention_layers(one)]
    for layer, number in zip(layers, numbers):
        layer.layer_idx = number
    assert tuple(x.index for x in sf.transformers.attention_layers(one)[:2]) == want
