"""SeerAttention's gate for decoding: what it computes, learns and reads, and that full budgets are dense."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from sparseflash.bench import distill_decode
from sparseflash.methods.seer_decode import page_pools

B, Hq, Hkv, D, PAGE = 1, 4, 2, 16, 8
ROPE = 100 ** -(torch.arange(8) / 8)


def turned(x, position):
    """Rotated to positions [n], in fp64: `[..., n, D]`."""
    angle = position[:, None].double() * ROPE.double()
    one, two = x.double()[..., :8], x.double()[..., 8:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def scores(q, k, at, weight, rope):
    """Section 2 of arXiv 2506.08889, head by head and page by page, from queries and keys before rotation."""
    found = torch.full((len(q), Hkv, len(at), -(-k.shape[2] // PAGE)), -torch.inf, dtype=torch.float64)
    for h in range(Hkv):
        w = weight[h].double()
        mixed = sum(q[:, 2 * h + g].double() @ w[g * D : (g + 1) * D] for g in range(2))
        mixed = mixed * (mixed.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[-2]
        mixed = turned(mixed, at) if rope else mixed
        for c in range(found.shape[-1]):
            page = k[:, h, c * PAGE : (c + 1) * PAGE].double()
            pools = torch.cat([page.amax(1), page.amin(1), page.mean(1)], -1)
            own = pools @ w[2 * D : 5 * D]
            own = own * (own.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[-1]
            own = turned(own[:, None], torch.tensor([c * PAGE])) if rope else own[:, None]
            there = at // PAGE >= c
            found[:, h, there, c] = (mixed[:, there] * own).sum(-1) / D**0.5
    return found


def made(T, n, generator, rope):
    q, k = (torch.randn(B, H, m, D, generator=generator) for H, m in ((Hq, n), (Hkv, T)))
    at = torch.arange(T - n, T)
    weight = torch.randn(Hkv, 5 * D + 2, D, generator=generator)
    rotated = [turned(x, p).float() if rope else x for x, p in ((q, at), (k, torch.arange(T)))]
    return q, k, at, weight, rotated


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(("T", "n"), [(64, 64), (61, 3), (8, 1)])
def test_the_gate_is_its_papers(T, n, rope, generator):
    q, k, at, weight, (rq, rk) = made(T, n, generator, rope)
    gate = sf.nn.SeerDecodeGate(Hq, Hkv, D, block=PAGE)
    gate.weight.data.copy_(weight)
    got = gate(rq, rk, at[None], rope=ROPE if rope else None)
    want = scores(q, k, at, weight, rope).log_softmax(-1)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_decoding_reads_the_best_pages_and_its_own_at_every_step(cached, generator):
    q, k, at, weight, (rq, rk) = made(77, 20, generator, True)
    method = sf.methods.SeerDecode(gates=sf.methods.DecodeGates({5: weight}, block=PAGE), budget=3 * PAGE)
    cache = sf.cache.Growing()
    cache.append(rk[:, :, :57], rk[:, :, :57])
    for i in range(20):
        T = 58 + i
        cache.append(rk[:, :, T - 1 : T], rk[:, :, T - 1 : T])
        keys = cache.keys if cached else rk[:, :, :T]
        ctx = {"q_offset": T - 1, "layer": 5, "rope": ROPE} | ({"cache": cache} if cached else {})
        mask = method.select(rq[:, :, i : i + 1], keys, ctx).plan.to_dense()[0, :, 0]
        want = scores(q[:, :, i : i + 1], k[:, :, :T], at[i : i + 1], weight, True)[0, :, 0]
        own = (T - 1) // PAGE
        want[:, own] = torch.inf
        pages = want.topk(3).indices.sort(-1).values
        seen = [sorted(set((mask[h].nonzero()[:, 0] // PAGE).tolist())) for h in range(Hkv)]
        assert seen == pages.tolist()


def test_a_budget_of_everything_is_dense(generator):
    *_, weight, (rq, rk) = made(77, 1, generator, True)
    method = sf.methods.SeerDecode(gates=sf.methods.DecodeGates({0: weight}, block=PAGE), budget=77 + PAGE)
    got = method(rq, rk, rk, q_offset=76, ctx={"rope": ROPE})
    torch.testing.assert_close(got, sf.attention(rq, rk, rk), atol=1e-6, rtol=1e-5)


def test_peaks_are_the_largest_weights_of_a_page_over_a_group(generator):
    q, k = torch.randn(1, Hq, 5, D, generator=generator), torch.randn(1, Hkv, 29, D, generator=generator)
    at = torch.tensor([[3, 9, 15, 16, 28]])
    got = distill_decode.peaks(q, k, at, PAGE, 0.3)
    logits = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT
    P = logits.masked_fill(torch.arange(29) > at[0][:, None], -torch.inf).softmax(-1)
    for page in range(4):
        want = P[..., page * PAGE : (page + 1) * PAGE].amax(-1).unflatten(1, (Hkv, 2)).amax(2)
        torch.testing.assert_close(got[..., page].double(), want, atol=1e-6, rtol=1e-5)


def asked(generator, T=256, n=96):
    """Queries of head 0 that look at one loud key of a page, which its mean does not show."""
    pages = T // PAGE
    axes = torch.eye(D)[torch.randint(D, (pages,), generator=generator)]
    k = torch.randn(pages, PAGE, D, generator=generator) * 0.1 - axes[:, None] * 8 / (PAGE - 1)
    k[torch.arange(pages), torch.randint(PAGE, (pages,), generator=generator)] = 8 * axes
    at = (T // 4 + torch.randperm(T - T // 4, generator=generator)[:n]).sort().values
    wanted = (torch.rand(n, generator=generator) * (at // PAGE + 1)).long()
    q = torch.zeros(1, 2, n, D)
    q[0, 0] = axes[wanted] * 4
    k = k.view(1, 1, T, D)
    target = distill_decode.peaks(q, k, at[None], PAGE, 1.0)
    return distill_decode.Heard(q, at[None], page_pools(k, PAGE, None), target, None)


def test_a_gate_learns_the_pages_that_attention_weighs(generator):
    heard = [{0: asked(generator)} for _ in range(12)]
    gates = distill_decode.train(heard[:-1], block=PAGE, steps=150, lr=0.03)
    own, equal = distill_decode.divergences(gates, heard[-1])
    assert own < equal / 3 and not gates.rotary


def test_a_model_learns_gates_keeps_them_in_a_file_and_decodes_on_them(tmp_path):
    hf = pytest.importorskip("transformers")
    from transformer_models import TEXT

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | {"initializer_range": 0.3})).eval()
    ids = torch.randint(3, 90, (3, 90))
    heard = [distill_decode.listen(model, row[None], block=PAGE, rows=30) for row in ids]
    assert sorted(heard[0]) == [0, 1] and heard[0][1].target.shape == (1, 2, 30, 12)
    gates = distill_decode.train(heard, block=PAGE, steps=3)
    gates.save(tmp_path / "d.safetensors")
    own = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    want = model.generate(ids[:1, :40], **own)
    for budget, same in ((256, True), (PAGE, False)):
        method = sf.methods.SeerDecode(gates=str(tmp_path / "d.safetensors"), budget=budget)
        with sf.transformers.sparse(model, decode=method):
            found = model.generate(ids[:1, :40], **own)
            assert torch.equal(found, want) or not same
            step = model(ids[:, :40])  # a batch
            last = model(ids[:, 40:41], past_key_values=step.past_key_values).logits
        dense = model(ids[:, :41]).logits[:, -1:]
        assert bool(((last - dense).abs().max() < 1e-4) == same)


def test_what_does_not_fit_is_refused(tmp_path, generator):
    gates = sf.methods.DecodeGates({3: torch.zeros(2, 82, 16)}, block=PAGE)
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 30, 16)
    with pytest.raises(sf.SparseFlashError, match="rope.*is missing"):
        sf.methods.SeerDecode(gates=gates).select(q, k, {"q_offset": 29})
    for x, y in ((q[:, :2], k), (torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 30, 8))):
        with pytest.raises(sf.SparseFlashError, match="weights of this model"):
            sf.methods.SeerDecode(gates=gates).select(x, y, {"q_offset": 29, "rope": ROPE})
    with pytest.raises(sf.SparseFlashError, match="expected DecodeGates"):
        sf.methods.SeerDecode()
    with pytest.raises(sf.SparseFlashError, match=r"expected \[KV heads"):
        sf.methods.DecodeGates({0: torch.zeros(2, 48, 16)})
    gates.save(tmp_path / "d.safetensors")
    with pytest.raises(sf.SparseFlashError, match="expected what Gates.save wrote"):
        sf.methods.Gates.load(tmp_path / "d.safetensors")
