"""The LongGen example: outer layers of a small Llama become sparse, low-rank updates learn through them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers

import sparseflash as sf

EXAMPLE = Path(__file__).parents[2] / "examples" / "longgen.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("longgen", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    assert sf.transformers.sparse  # importing it registers the name
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation("sparse")
    return model


def test_the_middle_third_stays_dense(example):
    assert example.outer(30) == [*range(10), *range(20, 30)] and example.outer(3) == [0, 2]


def test_updates_learn_through_the_hybrid_and_weights_stay(example):
    model = small()
    before = {name: x.clone() for name, x in model.named_parameters()}
    tokens = torch.arange(4000) * 7 % 13 + torch.arange(4000) // 40 % 5
    how = {"length": 64, "steps": 12, "window": 8, "sinks": 2, "rank": 4, "rate": 2e-2}
    tuned, rows = example.tune(model, tokens, **how)
    first, last = rows
    assert first["dense"] != first["hybrid"] and last["hybrid"] < first["hybrid"] - 0.05
    own = {name.replace("base_model.model.", "").replace(".base_layer", ""): x
           for name, x in tuned.named_parameters() if "lora" not in name}  # fmt: skip
    assert own.keys() == before.keys() and all(torch.equal(own[name], x) for name, x in before.items())
    with pytest.raises(SystemExit, match="give a longer text"):
        example.tune(small(), tokens[:100], **how)


def test_slower_positions_change_far_pairs_alone(example):
    model = small()
    ids = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        example.slow_down(model, 1e6)
        after = model(ids).logits
    change = (after - before).abs().amax(-1)[0]
    assert float(change[0]) == 0.0 and float(change[100:].mean()) > 2 * float(change[1:5].mean()) > 0
