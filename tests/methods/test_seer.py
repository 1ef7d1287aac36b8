"""Gates that learn where attention looks: what they see, what they learn, and what a method does with it."""

import pytest
import torch

import sparseflash as sf
from sparseflash.methods.gates import Blocks
from sparseflash.nn.base import rotate
from sparseflash.selection.grid import Grid

BASE = 10_000.0
FREQUENCIES = BASE ** -(torch.arange(0, 16, 2) / 16)


def tables(n):
    angle = torch.arange(n)[:, None] * FREQUENCIES.repeat(2)
    return angle.cos()[None], angle.sin()[None]


@pytest.mark.parametrize("form", ["frequencies", "tables"])
@pytest.mark.parametrize(("Tq", "Tk", "offset"), [(129, 129, 0), (63, 200, 137), (1, 65, 64)])
def test_a_gate_sees_pools_of_what_was_there_before_the_rotation(form, Tq, Tk, offset, generator):
    """Against tokens that were never rotated: means turned to the first place of their tile, and products."""
    q, k = (torch.randn(2, H, T, 16, generator=generator) for H, T in ((4, Tq), (2, Tk)))
    weight = torch.randn(4, 48, 16, generator=generator)
    rope = FREQUENCIES if form == "frequencies" else tables(Tk)
    grid = Grid(Tq, Tk, 32, 32, offset)
    found = Blocks.of(rotate(q, offset, BASE), rotate(k, 0, BASE), grid, rope)
    want = torch.empty(2, 4, grid.tiles, grid.units)
    for r in range(grid.tiles):
        own = rotate(q[:, :, 32 * r : 32 * r + 32].mean(2, keepdim=True), offset + 32 * r, BASE)
        for c in range(grid.units):
            part = k[:, :, 32 * c : 32 * c + 32]
            pools = torch.cat([part.amax(2), part.amin(2), part.mean(2)], -1).repeat_interleave(2, 1)
            keys = torch.einsum("bhe,hed->bhd", pools, weight)[:, :, None]
            want[:, :, r, c] = (own * rotate(keys, 32 * c, BASE)).sum((2, 3)) / 4
    torch.testing.assert_close(found.logits(weight), want, atol=2e-4, rtol=1e-4)


def test_the_loss_is_the_divergence_of_later_rows(generator):
    q, k, v = torch.randn(3, 2, 2, 500, 16, generator=generator)
    _, peaks = sf.attention(q, k, v, causal=True, return_block_max=(64, 64))
    gate = sf.nn.SeerGate(2, 16, generator=generator)
    found = gate.loss(gate.blocks(q, k), peaks)
    logs, past = gate(q, k), torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.allclose(logs.exp().sum(-1), torch.ones(1)) and bool((logs[..., ~past] == -torch.inf).all())
    want = peaks / peaks.sum(-1, keepdim=True)
    rows = [
        torch.nn.functional.kl_div(logs[..., r, : r + 1], want[..., r, : r + 1], reduction="sum") / 4
        for r in range(2, 8)
    ]
    torch.testing.assert_close(found, torch.stack(rows).mean())
    found.backward()
    assert bool((gate.weight.grad.abs().amax((1, 2)) > 0).all())


def hidden(generator, count=1, blocks=16):
    """Each block has one loud key that its mean does not show; each tile looks for that of one before it."""
    size, D = 64, 32
    loud = torch.stack([torch.randperm(D, generator=generator)[:blocks] for _ in range(count)])
    k = torch.randn(count, 1, blocks, size, D, generator=generator) * 0.1
    axes = torch.eye(D)[loud][:, None]
    at = torch.randint(size, (count, 1, blocks, 1, 1), generator=generator).expand(-1, -1, -1, 1, D)
    k = k - k.mean(3, keepdim=True) - 8 / (size - 1) * axes[..., None, :]
    k.scatter_(3, at, 8 * axes[..., None, :])
    wanted = (torch.rand(count, blocks, generator=generator) * torch.arange(1, blocks + 1)).long()
    q = axes[:, 0].gather(1, wanted[..., None].expand(-1, -1, D))[:, None, :, None] * 8
    q = q + torch.randn(count, 1, blocks, size, D, generator=generator) * 0.1
    return q.flatten(2, 3), k.flatten(2, 3)


def test_a_gate_learns_what_means_do_not_show_and_means_and_chance_do_not_find(generator):
    q, k = hidden(generator, 40)
    _, peaks = sf.attention(q, k, k, causal=True, return_block_max=(64, 64))
    gate = sf.nn.SeerGate(1, 32, generator=generator)
    blocks, optimizer = gate.blocks(q, k), torch.optim.AdamW(gate.parameters(), lr=0.03, weight_decay=0)
    for _ in range(100):
        optimizer.zero_grad()
        gate.loss(blocks, peaks).backward()
        optimizer.step()
    q, k = hidden(generator, 4)
    _, peaks = sf.attention(q, k, k, causal=True, return_block_max=(64, 64))
    with torch.no_grad():
        learned = float(gate.loss(gate.blocks(q, k), peaks))
        equal = sf.nn.SeerGate(1, 32)
        equal.weight.zero_()
        assert learned < float(equal.loss(equal.blocks(q, k), peaks)) / 10
    gates = sf.methods.Gates({0: gate.weight}, rotary=False)
    same = {"blocks": 1, "sinks": 0, "dense_tiles": 0}
    by_gate, by_means = (sf.methods.SeerAttention(x, **same).select(q, k).plan for x in (gates, None))
    assert by_gate.kept == pytest.approx(by_means.kept)
    draw = torch.rand(4, 1, 16, 16, generator=generator)
    grid = Grid(1024, 1024, 64, 64)
    by_chance = grid.plan(sf.selection.top_k(draw, 1, among=grid.reach() & ~grid.near()) | grid.near())
    found, means, chance = (float(sf.recall(q, k, plan).mean()) for plan in (by_gate, by_means, by_chance))
    assert found > 0.9 and means < 0.6 and chance < 0.6


def test_a_threshold_of_nothing_is_dense_and_every_tile_keeps_its_best(generator):
    q, k = torch.randn(2, 1, 2, 500, 16, generator=generator)
    gates = sf.methods.Gates({0: torch.randn(2, 48, 16, generator=generator)}, rotary=False)
    assert sf.methods.SeerAttention(gates, threshold=0.0).select(q, k).plan.density == 1
    least = sf.methods.SeerAttention(gates, threshold=0.999, sinks=0, dense_tiles=0).select(q, k).plan
    mask = least.to_dense()[0]
    best = sf.methods.SeerAttention(gates).estimate(
        q, k, Grid(500, 500, 64, 64), {"rope": None, "layer": None}
    )
    for head in range(2):
        for tile in range(8):
            seen = mask[head, min(64 * tile + 63, 499)].nonzero()[:, 0] // 64
            assert set(seen.tolist()) == {tile, int(best[0, head, tile].argmax())}


def test_gates_are_refused_where_they_do_not_belong(tmp_path, generator):
    q, k = torch.randn(2, 1, 2, 300, 16, generator=generator)
    gates = sf.methods.Gates({3: torch.zeros(2, 48, 16), 5: torch.zeros(2, 48, 16)}, rotary=False)
    turned = sf.methods.Gates({3: torch.zeros(2, 48, 16)})
    for method, ctx, said in (
        (sf.methods.SeerAttention(gates), {}, r"layers \[3, 5\], not of None: give ctx\['layer'\]"),
        (sf.methods.SeerAttention(gates), {"layer": 4}, "not of 4"),
        (sf.methods.SeerAttention(turned), {"layer": 3}, r"ctx\['rope'\] is missing"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            method.select(q, k, ctx)
    with pytest.raises(sf.SparseFlashError, match=r"gate of \[2, 48, 16\], and 1 query heads of 16"):
        sf.methods.SeerAttention(gates).select(q[:, :1], k[:, :1], {"layer": 3})
    for change, said in (
        ({"gates": gates, "block": 32}, "give block=64"),
        ({"gates": 3}, "expected Gates, or the file"),
        ({"gates": str(tmp_path / "none")}, "holds no gates"),
        ({"threshold": 1.0}, r"expected a weight in \[0, 1\)"),
        ({"blocks": 0}, "blocks=0"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            sf.methods.SeerAttention(**change)
    (tmp_path / "text").write_text("no gates")
    with pytest.raises(sf.SparseFlashError, match="holds no gates"):
        sf.methods.Gates.load(tmp_path / "text")
    with pytest.raises(sf.SparseFlashError, match=r"expected \[heads, 3 D, D\]"):
        sf.methods.Gates({0: torch.zeros(2, 32, 16)})


def test_a_model_learns_gates_keeps_them_and_runs_on_them(tmp_path):
    """Distilled, written, read by name; chunks choose as the whole does, and a full budget is the model."""
    hf = pytest.importorskip("transformers")
    from sparseflash.bench import distill

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 97}
    config = hf.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    model = hf.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:  # tokens that look for their like, in blocks of few different ones
        own = layer.self_attn
        own.k_proj.weight.data *= 15
        own.q_proj.weight.data = own.k_proj.weight.data.view(2, 16, 64).repeat_interleave(2, 0).flatten(0, 1)
    topics = torch.randint(4, (13, 8, 1))
    ids = (topics * 24 + torch.randint(24, (13, 8, 64))).flatten(1)
    seen = [distill.listen(model, row[None]) for row in ids]
    gates = distill.train(seen[:12], steps=60)
    learned, equal = distill.divergences(gates, seen[12])
    assert learned < 0.9 * equal and gates.rotary
    method = sf.methods.SeerAttention(str(gates.save(tmp_path / "g.safetensors")), blocks=2)
    with torch.no_grad():
        dense = model(ids[:1]).logits
        with sf.transformers.sparse(model, prefill=sf.methods.SeerAttention(gates, threshold=0.0)):
            full = model(ids[:1]).logits
        with sf.transformers.sparse(model, prefill=method):
            whole, report = model(ids[:1]).logits, sf.transformers.report(model, input_ids=ids[:1])
            first = model(ids[:1, :256], use_cache=True)
            rest = model(ids[:1, 256:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(full, dense, atol=2e-4, rtol=1e-4)
    # the last two tiles of what is read at once see everything: of a chunk, too
    torch.testing.assert_close(first.logits[:, :128], whole[:, :128], atol=2e-4, rtol=1e-4)
    assert max(report.rows[0].density) < 0.95 and rest.isfinite().all()
    ended = sf.methods.SeerAttention(gates, blocks=2, dense_tiles=0)
    with torch.no_grad(), sf.transformers.sparse(model, prefill=ended):
        whole = model(ids[:1]).logits
        first = model(ids[:1, :256], use_cache=True)
        rest = model(ids[:1, 256:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=2e-4, rtol=1e-4)
