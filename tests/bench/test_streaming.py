"""Gates of heads: what has to see far keeps its gate; phrases are asked for where their answers count."""

from __future__ import annotations

import json

import pytest
import torch

import sparseflash as sf
from sparseflash.bench import streaming

transformers = pytest.importorskip("transformers")

SIZES = {"sinks": 2, "local": 6}


@pytest.fixture
def model():
    """One layer, by hand: its first head looks for the token that is one higher, its second at everything."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
        num_hidden_layers=1, head_dim=32, rope_theta=1e12,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for x in made.parameters():
            x.zero_()
        made.model.norm.weight.fill_(1)
        made.model.layers[0].input_layernorm.weight.fill_(1)
        made.model.embed_tokens.weight[:, :32] = torch.eye(32)
        own = made.model.layers[0].self_attn
        own.q_proj.weight[:32, :32] = 4 * torch.eye(32).roll(1, 0)
        own.k_proj.weight[:32, :32] = 4 * torch.eye(32)
        own.v_proj.weight[:, :32] = torch.randn(64, 32)
        own.o_proj.weight.copy_(torch.randn(64, 64) / 4)
    return made


def test_the_head_that_looks_far_keeps_its_gate(model):
    torch.manual_seed(1)
    ids = torch.randint(0, 32, (1, 80))
    asked = torch.zeros(80, dtype=torch.bool)
    asked[40:] = True
    piece = streaming.Piece(ids, asked)
    before = [x.clone() for x in model.parameters()]
    gates = streaming.train(model, [piece], steps=40, lr=0.05, price=0.02, **SIZES)
    far = streaming.near_mass(model, piece, **SIZES)
    assert gates[0].shape == (2,) and gates[0][0] > 0.5
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters()))
    assert far[0][0] > 0.3
    both = streaming.moved(model, piece, {0: torch.zeros(2)}, **SIZES)
    assert streaming.moved(model, piece, {0: torch.ones(2)}, **SIZES) == 0
    assert both > streaming.moved(model, piece, {0: torch.tensor([1.0, 0.0])}, **SIZES)


def test_a_gate_of_1_is_dense_attention_and_of_0_a_window_with_sinks(model):
    ids = torch.arange(40)[None] % 32
    dense = model.model(ids).last_hidden_state[0]
    torch.testing.assert_close(streaming.hidden(model, ids, {0: torch.ones(2)}, **SIZES), dense)
    window = sf.methods.SinkWindow(window=6, sink_tokens=2)
    with sf.transformers.sparse(model, prefill=window):
        want = model.model(ids).last_hidden_state[0]
    torch.testing.assert_close(streaming.hidden(model, ids, {0: torch.zeros(2)}, **SIZES), want)


def test_phrases_are_asked_for_at_the_end():
    class Words:
        def __call__(self, text, add_special_tokens=False):
            return type("Out", (), {"input_ids": [sum(map(ord, word)) for word in text.split()]})

    text = " ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(600))
    text = text.replace("word", "")
    text = " ".join(w * 3 for w in text.split())
    piece = streaming.planted(Words(), text, 400, torch.Generator().manual_seed(0), phrases=3, words=5)
    ids = piece.ids[0].tolist()
    assert len(ids) == len(piece.asked) == 400 and int(piece.asked.sum()) == 15
    for end in (n for n in range(399) if piece.asked[n] and not piece.asked[n - 1]):
        phrase = ids[end : end + 4]
        assert any(ids[n : n + 4] == phrase for n in range(300))
    with pytest.raises(sf.SparseFlashError, match="ask for more"):
        streaming.planted(Words(), text, 20, torch.Generator())


def test_half_of_the_heads_are_those_of_the_smallest_gates(tmp_path):
    gates = {0: torch.tensor([0.9, 0.1]), 3: torch.tensor([0.2, 0.8])}
    assert {n: x.tolist() for n, x in streaming.halved(gates).items()} == {0: [1, 0], 3: [0, 1]}
    path = tmp_path / "gates.json"
    path.write_text(json.dumps({"gates": {n: x.tolist() for n, x in gates.items()}}))
    assert sf.methods.streaming_heads(path) == {0: (1,), 3: (0,)}
    assert sf.methods.streaming_heads(path, 0.25) == {0: (1,), 3: ()}
    path.write_text("{}")
    with pytest.raises(sf.SparseFlashError, match="no gates"):
        sf.methods.streaming_heads(path)
