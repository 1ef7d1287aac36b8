"""Served by vLLM: what its batches become, on a pool of our own; and vLLM itself, where it is installed."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import transformers

import sparseflash as sf
import tolerance
from benchmarks.experiments import serving
from harness import randn
from sparseflash.cache import StreamingLLM
from sparseflash.integrations.vllm import KEY, VARIABLE, Layer, Pool, Settings, Step, asked, register
from sparseflash.integrations.vllm.refusals import check_batch, check_layer, check_model
from sparseflash.methods import BlockTopK, LServe, MInference, Quest

REPO = Path(__file__).resolve().parents[2]

H, HKV, D = 4, 2, 32


class Server:
    """Requests in the blocks of one pool, in no order; what nobody has written is NaN."""

    def __init__(self, generator, blocks=40, block=16, dtype=torch.float32):
        self.generator, self.block, self.dtype = generator, block, dtype
        memory = torch.full((blocks, block, HKV, 2 * D), torch.nan, dtype=dtype)
        self.cache = memory.transpose(1, 2)  # [blocks, heads, tokens, keys and values], tokens at one stride
        self.free = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()  # block 0 is nobody's
        self.blocks, self.keys, self.values = {}, {}, {}

    def new(self, name, prefix=None, tokens=0):
        """A request, that may begin with whole blocks of another."""
        shared = tokens // self.block
        assert tokens % self.block == 0
        self.blocks[name] = self.blocks[prefix][:shared] if prefix else []
        none = torch.zeros(0, HKV, D, dtype=self.dtype)
        self.keys[name] = self.keys[prefix][:tokens] if prefix else none
        self.values[name] = self.values[prefix][:tokens] if prefix else none

    def end(self, name):
        """The request is over, and others get its blocks."""
        self.free += self.blocks.pop(name)

    def step(self, **tokens):
        """(Step, key, value) of so many tokens of each request, in this order."""
        table, slots, news = [], [], []
        for name, n in tokens.items():
            new = randn(self.generator, 2, n, HKV, D, dtype=self.dtype)
            news.append(new)
            at = torch.arange(len(self.keys[name]), len(self.keys[name]) + n)
            while len(self.blocks[name]) * self.block < int(at[-1]) + 1:
                self.blocks[name].append(self.free.pop(0))
            table.append(self.blocks[name])
            slots.append(torch.tensor(self.blocks[name])[at // self.block] * self.block + at % self.block)
            self.keys[name] = torch.cat([self.keys[name], new[0]])
            self.values[name] = torch.cat([self.values[name], new[1]])
        key, value = torch.cat(news, 1)
        wide = max(map(len, table)) + 3
        rows = torch.tensor([own + [0] * (wide - len(own)) for own in table], dtype=torch.int32)
        starts = torch.tensor([0, *tokens.values()]).cumsum(0).int()
        lengths = torch.tensor([len(self.keys[name]) for name in tokens], dtype=torch.int32)
        return Step(starts, lengths, rows, torch.cat(slots), self.block), key, value


def serve(server, layer, **tokens):
    """One step of a layer: its queries and outputs `[tokens, H, D]`, by request."""
    step, key, value = server.step(**tokens)
    pool = Pool.of(server.cache, D)
    q = randn(server.generator, step.tokens, H, D, dtype=server.dtype)
    out = torch.full_like(q, torch.nan)
    layer.write(pool, key, value, step)
    layer(pool, q, step, out)
    ends = torch.tensor([0, *tokens.values()]).cumsum(0).tolist()
    return {name: (q[a:b], out[a:b]) for name, a, b in zip(tokens, ends, ends[1:])}


def check(server, found, sees=lambda at, key: key >= 0, **options):
    """Hold what a step gave to attention in fp64 over the keys of each request; `sees` beside causality."""
    for name, (q, out) in found.items():
        k, v = (x[name].transpose(0, 1)[None] for x in (server.keys, server.values))
        at = torch.arange(k.shape[2] - len(q), k.shape[2])[:, None]
        key = torch.arange(k.shape[2])
        mask = ((key <= at) & sees(at, key))[None, None]
        tolerance.compare({"out": out.transpose(0, 1)[None]}, q.transpose(0, 1)[None], k, v, mask, **options)


STEPS = (
    {"a": 40},
    {"a": 1, "b": 17, "c": 63},
    {"b": 30, "a": 1, "c": 1},
    {"a": 1, "b": 1, "c": 1},
    {"d": 1, "c": 90, "a": 16, "b": 1},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 20, 500])
def test_prompts_and_single_tokens_of_requests_are_exact_in_one_step(dtype, window, generator):
    """With windows, sinks, a cap and a scale; requests come, share, go, and others get their blocks."""
    server = Server(generator, dtype=dtype)
    options = {"scale": 0.3, "softcap": 8.0, "sink_logits": randn(generator, H)}
    layer = Layer(Settings(), 0.3, 8.0, window, options["sink_logits"])
    sees = (lambda at, key: key > at - window) if window else (lambda at, key: key >= 0)
    for name in "abcd":
        server.new(name)
    for tokens in STEPS:
        check(server, serve(server, layer, **tokens), sees, **options)
    server.new("e", prefix="a", tokens=32)
    server.end("b")
    server.end("d")
    server.new("f")
    for tokens in ({"f": 70, "e": 1}, {"e": 25, "f": 1, "a": 1, "c": 1}):
        check(server, serve(server, layer, **tokens), sees, **options)


def test_blocks_that_have_left_a_window_may_be_null(generator):
    """vLLM puts block 0 in their place, as often as it likes."""
    server, layer = Server(generator), Layer(Settings(), D**-0.5, None, 20)
    server.new("a")
    serve(server, layer, a=100)
    server.blocks["a"][:4] = [0] * 4
    check(server, serve(server, layer, a=5), lambda at, key: key > at - 20)
    check(server, serve(server, layer, a=1), lambda at, key: key > at - 20)


READERS = [
    Quest(budget=48, page=16),
    Quest(budget=32, page=8, sinks=1, near=2, share=""),
    LServe(budget=64, page=16, part=8, streaming=(1,), local=2),
]


@pytest.mark.parametrize("method", READERS, ids=str)
@pytest.mark.parametrize("block", [16, 32])
def test_what_a_method_reads_of_a_pool_is_what_it_reads_of_a_sequence(method, block, generator):
    """Its summaries follow what is written, whoever had the pages before and whoever else reads them."""
    server, layer = Server(generator, block=block), Layer(Settings(decode=method), D**-0.5)
    for name in "abc":
        server.new(name)
    fewer = 0
    for tokens in (
        {"a": 150, "b": 9},
        {"a": 1, "b": 120, "c": 31},
        {"c": 1, "a": 1, "b": 1},
        *[{"b": 1, "a": 1, "c": 1}] * 4,
    ):
        for name, (q, out) in serve(server, layer, **tokens).items():
            k, v = (x[name].transpose(0, 1)[None] for x in (server.keys, server.values))
            if len(q) > 1:
                check(server, {name: (q, out)})
                continue
            plan = method.select(q.transpose(0, 1)[None], k, {"q_offset": k.shape[2] - 1}).plan
            mask = plan.to_dense()
            fewer += int((~mask).sum())
            got = {"out": out.transpose(0, 1)[None]}
            tolerance.compare(got, q.transpose(0, 1)[None], k, v, mask)
        if tokens == {"c": 1, "a": 1, "b": 1}:
            server.end("b")
            server.new("b", prefix="a", tokens=96)
            server.free.reverse()
    assert fewer, "nothing was left out"


def test_all_pages_are_all_keys(generator):
    server, layer = Server(generator), Layer(Settings(decode=Quest(budget=10_000)), D**-0.5)
    for name in "ab":
        server.new(name)
    for tokens in ({"a": 75, "b": 3}, {"a": 1, "b": 40}, {"a": 1, "b": 1}):
        check(server, serve(server, layer, **tokens))


def test_streaming_llm_sees_first_tokens_and_last_ones_in_single_steps(generator):
    server = Server(generator)
    layer = Layer(Settings(decode=StreamingLLM(budget=40, sinks=5)), D**-0.5)
    for name in "ab":
        server.new(name)
    check(server, serve(server, layer, a=120, b=7))
    for _ in range(20):
        found = serve(server, layer, a=1, b=1)
        check(server, found, lambda at, key: (key > at - 35) | (key < 5))


@pytest.mark.parametrize(
    "method", [MInference(vertical=9, slash=2, near=1, sinks=3), BlockTopK(blocks=1, block=16)]
)
def test_chunks_of_prompts_are_selected_for_one_by_one(method, generator):
    """What a method gives of a request's own queries and keys, wherever they lie, whoever is beside."""
    server, layer = Server(generator, blocks=60), Layer(Settings(prefill=method), D**-0.5)
    for name in "abc":
        server.new(name)
    kept = []
    for tokens in ({"a": 270, "b": 40}, {"c": 25, "a": 60, "b": 1}, {"a": 1, "b": 70, "c": 1}):
        for name, (q, out) in serve(server, layer, **tokens).items():
            if len(q) == 1:
                check(server, {name: (q, out)})
                continue
            k, v = (x[name].transpose(0, 1)[None] for x in (server.keys, server.values))
            plan = method.select(q.transpose(0, 1)[None], k, {"q_offset": k.shape[2] - len(q)}).plan
            kept.append(plan.density)
            got = {"out": out.transpose(0, 1)[None]}
            tolerance.compare(got, q.transpose(0, 1)[None], k, v, plan.to_dense())
    assert min(kept) < 0.6


def test_layers_with_a_window_of_their_own_stay_exact(generator):
    method = {"decode": Quest(budget=16), "prefill": BlockTopK(blocks=1, block=16)}
    server, layer = Server(generator), Layer(Settings(**method), D**-0.5, None, 50)
    server.new("a")
    for tokens in ({"a": 130}, {"a": 1}):
        check(server, serve(server, layer, **tokens), lambda at, key: key > at - 50)


def test_the_pool_is_the_hosts_memory(generator):
    server = Server(generator)
    pool = Pool.of(server.cache, D)
    assert pool.keys.untyped_storage().data_ptr() == server.cache.untyped_storage().data_ptr()
    assert pool.keys.shape == pool.values.shape == (1, HKV, 40 * 16, D)
    server.cache[3, 1, 5, :D] = 7.0
    assert (pool.keys[0, 1, 3 * 16 + 5] == 7).all()
    with pytest.raises(sf.SparseFlashError, match="LBNHC"):
        Pool.of(server.cache.contiguous(), D)
    with pytest.raises(sf.SparseFlashError, match="another way"):
        Pool.of(torch.zeros(2, 40, 16, HKV, D), D)


def test_padding_of_a_batch_is_written_nowhere(generator):
    """Tokens of no request (slot -1), requests without tokens, and tokens behind the last."""
    pool = Pool.of(Server(generator).cache, D)
    starts, lengths = torch.tensor([0, 2, 3, 3]), torch.tensor([2, 1, 9])
    table = torch.tensor([[4, 0], [6, 0], [1, 2]])
    step = Step(starts, lengths, table, torch.tensor([64, 65, -1, -1, -1]), 16)
    key = torch.ones(5, HKV, D)
    Layer(Settings(), 1.0).write(pool, key, key, step)
    assert pool.keys.isfinite().any(-1).any(1).nonzero()[:, 1].tolist() == [64, 65]
    assert (len(step.chunks), len(step.singles)) == (1, 1)


def test_pages_divide_blocks(generator):
    server, layer = Server(generator, block=24), Layer(Settings(decode=Quest(page=16)), 1.0)
    server.new("a")
    with pytest.raises(sf.SparseFlashError, match="page=16 of Quest, blocks of 24 tokens"):
        serve(server, layer, a=3)


# ---------------------------------------------------------------- what is asked for


def test_nothing_is_asked_for_by_default(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert asked() is asked({}) is asked(None) is asked({KEY: False}) is None
    for off in ("0", "off", "", "False"):
        monkeypatch.setenv(VARIABLE, off)
        assert asked() is None


def test_settings_are_read_from_the_environment_and_from_vllms_configuration(monkeypatch):
    for on in ("1", "on", "dense", "TRUE"):
        monkeypatch.setenv(VARIABLE, on)
        assert asked() == Settings()
    wanted = {"decode": {"name": "quest", "budget": 512}, "prefill": "minference"}
    monkeypatch.setenv(VARIABLE, json.dumps(wanted))
    assert asked() == Settings(Quest(budget=512), MInference())
    assert asked({KEY: {"decode": "streaming-llm"}}) == Settings(StreamingLLM())
    assert asked({KEY: False}) is None and asked({KEY: {"prefill": "dense"}}) == Settings()
    assert asked({KEY: {"decode": {"name": "lserve", "streaming": [1, 2]}}}).decode.streaming == (1, 2)


@pytest.mark.parametrize(
    "given, said",
    [
        ("queest", "expected true, false, or an object"),
        ({"decoder": "quest"}, "expected true, false, or an object"),
        ({"decode": "queest"}, "did you mean 'quest'"),
        ({"decode": {"budget": 3}}, "expected a name"),
        ({"decode": {"name": "quest", "bugdet": 3}}, "did you mean 'budget'"),
        ({"decode": "minference"}, "expected one of .*quest.*streaming-llm"),
        ({"decode": "squeezed-attention"}, "expected one of"),
        ({"decode": {"name": "streaming-llm", "budget": 0.5}}, "a budget in tokens"),
        ({"decode": {"name": "streaming-llm", "renumber": True}}, "renumber=False"),
        ({"prefill": "quest"}, "expected a method that selects for a chunk .*minference"),
        ({"prefill": "hash-sparse"}, "expected a method that selects for a chunk"),
        ({"prefill": {"name": "block-topk", "blocks": 0}}, "blocks=0"),
        (3, "expected true, false, or an object"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(given, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        Settings.read(given)


# ---------------------------------------------------------------- what is not served


@pytest.mark.parametrize(
    "given, said",
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2'"),
        ({"attn_type": "encoder_only"}, "type 'encoder_only'"),
        ({"attn_type": "encoder_decoder"}, "type 'encoder_decoder'"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"more": {"chunk_lookback": 4}}, "a layer with chunk_lookback"),
        ({"shares_keys": True}, "read the keys of other layers"),
    ],
    ids=str,
)
def test_layers_that_would_not_get_what_they_ask_for_are_refused(given, said):
    reads = Settings(decode=Quest())
    check_layer(reads, more={"sinks": None, "chunk_lookback": -1})
    check_layer(Settings(decode=StreamingLLM()), shares_keys=True)
    with pytest.raises(sf.SparseFlashError, match=f"does not serve this: .*{said}"):
        check_layer(reads, **given)


def test_configurations_under_which_settings_would_mean_something_else_are_refused():
    def config(context=1, transfer=None, guesses=None):
        sizes = {"decode_context_parallel_size": context, "prefill_context_parallel_size": 1}
        parallel = types.SimpleNamespace(**sizes)
        given = {"parallel_config": parallel, "kv_transfer_config": transfer, "speculative_config": guesses}
        return types.SimpleNamespace(**given)

    check_model(Settings(decode=Quest(), prefill=MInference()), config())
    check_model(Settings(), config(transfer=1, guesses=1))
    with pytest.raises(sf.SparseFlashError, match="context parallelism"):
        check_model(Settings(), config(context=2))
    with pytest.raises(sf.SparseFlashError, match="KV connector"):
        check_model(Settings(decode=Quest()), config(transfer=1))
    for settings in (Settings(decode=StreamingLLM()), Settings(prefill=BlockTopK())):
        with pytest.raises(sf.SparseFlashError, match="speculative decoding with .*; expected dense"):
            check_model(settings, config(guesses=1))


def test_batches_that_are_not_causal_are_refused():
    check_batch(types.SimpleNamespace(causal=True))
    given = {"causal": False}, {"causal": torch.tensor([True, False])}
    given += {"causal": True, "mm_req_doc_ranges": {}}, {"causal": True, "rswa_prefix_lens": torch.ones(1)}
    for batch in given:
        with pytest.raises(sf.SparseFlashError, match="does not serve this"):
            check_batch(types.SimpleNamespace(**batch))


def test_vllm_finds_the_entry_point_and_importing_it_loads_nothing_of_vllm():
    written = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert written["project"]["entry-points"]["vllm.general_plugins"] == {
        "sparseflash": "sparseflash.integrations.vllm:register"
    }
    code = "import sys, sparseflash.integrations.vllm; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_vllm_is_left_alone_unless_somebody_asks(monkeypatch):
    """Of a vLLM without such a registry, or of none at all."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delenv(VARIABLE, raising=False)
    register()
    monkeypatch.setenv(VARIABLE, "on")
    with pytest.raises(sf.SparseFlashError, match=f"{VARIABLE} asks for sparseflash"):
        register()
    monkeypatch.setenv(VARIABLE, '{"decode": "queest"}')
    with pytest.raises(sf.SparseFlashError, match="did you mean 'quest'"):
        register()


# ---------------------------------------------------------------- vLLM itself: make vllm, make check

NEEDS_VLLM = pytest.mark.skipif(
    not serving.PYTHON.exists(), reason="vLLM has an environment of its own: make vllm"
)


@NEEDS_VLLM
def test_vllms_own_environment_has_the_plugin():
    code = "from importlib.metadata import entry_points as e; print(*e(group='vllm.general_plugins').names)"
    done = subprocess.run([serving.PYTHON, "-c", code], capture_output=True, text=True, check=True)
    assert "sparseflash" in done.stdout.split()


def ask(job, env=None):
    """What vLLM answers to a job, and what it said meanwhile."""
    answer, said = serving.ask(job, **(env or {}))
    assert answer is not None, said[-4000:]
    return answer, said


def tiny(folder, seed=0, **more):
    """A Llama of random weights, large enough that what it says depends on what it sees."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        **more,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 3
    model.save_pretrained(folder)
    return model


def prompts(generator, lengths, most=512):
    return [torch.randint(1, most, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def greedy(model, requests):
    """Transformers' own tokens, one request at a time; no token ends a text."""
    found = []
    for one in requests:
        own, cache, ids = [], None, torch.tensor([one["prompt"]])
        for _ in range(one["tokens"]):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            own.append(int(ids))
        found.append(own)
    return found


ENGINE = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 256}
LIVE = "sparseflash serves attention"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return tiny(folder), str(folder)


@pytest.mark.slow
@NEEDS_VLLM
@pytest.mark.parametrize("processes", [False, True])
def test_tokens_of_requests_that_come_and_go_are_those_of_transformers(processes, llama, generator):
    """16 requests of any length with arrivals in between, prompts in chunks, prefixes in common."""
    model, folder = llama
    lengths = (200, 5, 63, 1, 129, 700, 33, 16, 17, 300, 64, 2, 450, 90, 257, 31)
    requests = [
        {"prompt": own, "tokens": 12, "at": 2 * n // 3} for n, own in enumerate(prompts(generator, lengths))
    ]
    requests[9]["prompt"][:128] = requests[0]["prompt"][:128]
    requests[12]["prompt"][:256] = requests[5]["prompt"][:256]
    job = {"model": folder, "engine": ENGINE, "requests": requests, "processes": processes}
    answer, said = ask(job, {VARIABLE: "on"})
    assert said.count(LIVE) == 1
    assert answer["tokens"] == greedy(model, requests)
    if not processes:
        stock, said = ask(job)
        assert LIVE not in said and stock["tokens"] == answer["tokens"]


@pytest.mark.slow
@NEEDS_VLLM
def test_methods_serve_by_configuration(llama, generator):
    """At a full budget tokens are the dense ones; at a small one what is asked for is what is live."""
    model, folder = llama
    requests = [{"prompt": own, "tokens": 12} for own in prompts(generator, (300, 129, 7))]
    full = {"decode": {"name": "quest", "budget": 4096}, "prefill": {"name": "block-topk", "blocks": 100}}
    few = {
        "decode": {"name": "streaming-llm", "budget": 24},
        "prefill": {"name": "minference", "vertical": 8},
    }
    few["prefill"] |= {"slash": 8, "near": 4, "sinks": 4}
    for settings in (full, few):
        job = {
            "model": folder,
            "engine": ENGINE | {"additional_config": {KEY: settings}},
            "requests": requests,
        }
        answer, said = ask(job)
        assert said.count(LIVE) == 1 and str(Settings.read(settings)) in said
        assert (answer["tokens"] == greedy(model, requests)) == (settings is full)


@pytest.mark.slow
@NEEDS_VLLM
@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_windows_caps_and_sinks_of_models(family, tmp_path, generator):
    """Windows in every other layer; a cap on the logits of Gemma 2, a sink in each head of GPT-OSS."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 48}
    more = {
        "Gemma2": {"query_pre_attn_scalar": 32},
        "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 2048},
    }
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**sizes, **more[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("sinks"):
                p.normal_(0, 2)
            elif p.dim() > 1:
                p *= 3
    model.save_pretrained(tmp_path)
    own = prompts(generator, (200, 7, 70))
    requests = [{"prompt": ids, "tokens": 12, "at": n} for n, ids in enumerate(own)]
    answer, said = ask({"model": str(tmp_path), "engine": ENGINE, "requests": requests}, {VARIABLE: "on"})
    assert LIVE in said and answer["tokens"] == greedy(model, requests)


@pytest.mark.slow
@NEEDS_VLLM
def test_keys_of_fewer_bits_end_vllm_with_a_reason(llama):
    job = {"model": llama[1], "engine": ENGINE | {"kv_cache_dtype": "fp8"}, "requests": []}
    answer, said = serving.ask(job, **{VARIABLE: "on"})
    assert answer is None and "sparseflash does not serve this: kv_cache_dtype='fp8" in said


TWO = """
import sys
from vllm import LLM, SamplingParams
how = {"model": sys.argv[1], "enforce_eager": True, "max_model_len": 512, "dtype": "float32"}
how["skip_tokenizer_init"] = True
first = LLM(**how)
first.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=4, detokenize=False))
print("the first is served")
LLM(**how, additional_config={"sparseflash": True})
print("the second is served")
"""


@pytest.mark.slow
@NEEDS_VLLM
def test_a_model_that_asks_after_one_that_did_not_is_refused(llama):
    """vLLM keeps the class of its first model: without a word, the second would get vLLM's own attention."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(serving.CHECKOUT / "src"), "PATH": os.environ["PATH"]}
    given = [serving.PYTHON, "-c", TWO, llama[1]]
    done = subprocess.run(given, capture_output=True, text=True, env=env)
    assert "the first is served" in done.stdout and "the second is served" not in done.stdout
    assert done.returncode and "an earlier one of this process did not" in done.stderr


@pytest.mark.slow
@NEEDS_VLLM
def test_tokens_of_smollm2_are_those_of_transformers(tmp_path, generator):
    try:
        model, tokenizer = sf.transformers.load("smollm2")
    except sf.SparseFlashError:
        pytest.skip("smollm2 is not installed: make models")
    model.save_pretrained(tmp_path)
    text = tokenizer(inspect.getsource(argparse)).input_ids
    cuts = ((0, 500), (500, 507), (1000, 1063), (0, 300), (3000, 3900), (77, 78), (2000, 2129))
    requests = [{"prompt": text[a:b], "tokens": 16, "at": n} for n, (a, b) in enumerate(cuts)]
    answer, said = ask({"model": str(tmp_path), "engine": ENGINE, "requests": requests}, {VARIABLE: "on"})
    assert LIVE in said and answer["tokens"] == greedy(model, requests)


def test_rates_are_of_prompts_until_all_have_a_token_and_of_tokens_after_that():
    steps = [[2.0, 1.0, 1, 1], [2.0, 1.0, 2, 3], [1.0, 0.5, 2, 5], [1.0, 0.5, 2, 6]]
    answer = {"tokens": [[1, 2, 3], [4, 5, 6]], "steps": steps}
    assert serving.rates(answer, 100) == (200 / 4, 3 / 2)
    assert serving.rates(answer, 100, clock=1) == (200 / 2, 3 / 1)
