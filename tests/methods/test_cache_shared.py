"""Samples of one prompt: what is held once is attended as if each sample had it."""

from __future__ import annotations

import copy

import pytest
import torch

import sparseflash as sf
from sparseflash import SparseFlashError
from sparseflash.cache import Growing, Share, Shared

H, HKV, D = 6, 2, 40


def drawn(generator, B, n, dtype=torch.float32):
    return [torch.randn(B, heads, n, D, generator=generator).to(dtype) for heads in (H, HKV, HKV)]


def begun(generator, P, m, rows, room=3, **options):
    """A shared cache and one that holds everything for each row, after the same prompts."""
    ours, each = Shared(Share(room)), Growing()
    q, k, v = drawn(generator, P, m)
    ours.attend(q, k, v, **options)
    each.append(k, v)
    ours.select_rows(rows)
    each.select_rows(rows)
    return ours, each


def step(generator, ours, each, n, options):
    q, k, v = drawn(generator, len(each.keys), n)
    each.append(k, v)
    want = sf.attention(q, each.keys, each.values, causal=True, q_offset=each.tokens - n, **options)
    torch.testing.assert_close(ours.attend(q, k, v, **options), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.7, "sink_logits": torch.ones(H)}])
@pytest.mark.parametrize("m", [1, 63, 129])
@pytest.mark.parametrize("P", [1, 2, 3])
def test_every_sample_attends_its_prompt_and_its_own_tokens(P, m, options, generator):
    rows = torch.arange(P).repeat_interleave(6 // P)
    ours, each = begun(generator, P, m, rows)
    moves = {2: [1, 1, 0, 3, 2, 5], 4: [5, 4, 4, 0, 1, 1], 5: [3, 3], 6: [0, 1, 1, 1, 0]}
    for at, n in enumerate((1, 1, 2, 1, 1, 70, 1, 3)):
        step(generator, ours, each, n, options)
        if at in moves:  # beams: rows permuted, given up and repeated
            for cache in (ours, each):
                cache.select_rows(torch.tensor(moves[at]))
    assert ours.tokens == each.tokens == m + 80


def test_the_prompt_is_held_once_and_stays_where_it_is(generator):
    ours, each = begun(generator, 1, 1000, torch.zeros(8, dtype=torch.long), room=16)
    step(generator, ours, each, 1, {})
    assert ours.bytes == 2 * HKV * D * 4 * (1000 + 8 * 16) < each.bytes / 6
    place = ours.tensors()["keys"].data_ptr()
    for rows in ([7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]):
        for cache in (ours, each):
            cache.select_rows(torch.tensor(rows))
        step(generator, ours, each, 1, {})
    assert ours.tensors()["keys"].data_ptr() == place


def test_the_kernel_reads_the_prompt_once(generator):
    """The plan that samples attend by lists each key of the prompt once for all of them."""
    ours, _ = begun(generator, 1, 640, torch.zeros(16, dtype=torch.long))
    ours.attend(*drawn(generator, 16, 1))
    shared, own = ours.plan()
    assert (shared.tile, shared.spans.tolist()) == (16, [[0, 640]])
    assert own.tile == 1 and own.to_dense().sum() == 16 and shared.Tq == own.Tq == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_before_prompts_and_before_questions_is_not_seen(dtype, generator):
    """Prompts of 5 and 9 tokens, questions of 2, 4, 1 and 3; a NaN in every place of padding."""
    kind = {"backend": "reference"} if dtype == torch.float64 else {}
    lengths, asked, of = torch.tensor([5, 9]), torch.tensor([2, 4, 1, 3]), torch.tensor([0, 0, 1, 1])
    prompt, question = drawn(generator, 2, 9, dtype), drawn(generator, 4, 4, dtype)
    real = torch.arange(9) >= 9 - lengths[:, None]
    mine = torch.arange(4) >= 4 - asked[:, None]
    for x, there in ((prompt, real), (question, mine)):
        for part in x[1:]:
            part.masked_fill_(~there[:, None, :, None], float("nan"))
    cache = Shared(Share(8))
    spans = torch.stack([9 - lengths, torch.full_like(lengths, 9)], -1).view(2, 1, 1, 1, 2)
    cache.attend(*prompt, real=real, among=sf.Plan.from_spans(spans, Tq=9, Tk=9, causal=True))
    cache.batch_repeat_interleave(2)
    later = drawn(generator, 4, 1, dtype)
    out = cache.attend(*question, real=mine)
    last = cache.attend(*later)
    for b in range(4):
        p, n = of[b], int(asked[b])
        keys, values = (
            torch.cat([a[p : p + 1, :, real[p]], c[b : b + 1, :, mine[b]], d[b : b + 1]], 2)
            for a, c, d in zip(prompt[1:], question[1:], later[1:])
        )
        q = torch.cat([question[0][b : b + 1, :, mine[b]], later[0][b : b + 1]], 2)
        want = sf.attention(q, keys, values, causal=True, q_offset=int(lengths[p]), **kind)
        got = torch.cat([out[b : b + 1, :, 4 - n :], last[b : b + 1]], 2)
        torch.testing.assert_close(got, want)
    with pytest.raises(SparseFlashError, match="padding between tokens of samples"):
        cache.attend(*drawn(generator, 4, 2, dtype), real=torch.tensor([[False, True]] * 4))
    with pytest.raises(SparseFlashError, match="expected it on the left"):
        Shared().attend(*prompt, real=real.flip(1))


def test_it_is_cropped_copied_saved_and_emptied(generator, tmp_path):
    ours, each = begun(generator, 2, 33, torch.tensor([0, 1, 1]))
    for n in (2, 5, 1):
        step(generator, ours, each, n, {})
    for n in (-1, 36, 33, 20):  # own tokens, then all of them, then of the prompts
        for cache in (ours, each):
            cache.crop(n)
        assert ours.tokens == each.tokens
        sf.cache.save([ours], tmp_path / "samples.safetensors")
        (loaded,) = sf.cache.load(tmp_path / "samples.safetensors")
        new, beside = drawn(generator, 3, 1), copy.deepcopy(each)
        beside.append(*new[1:])
        want = sf.decode(new[0], beside.keys, beside.values, beside.plan())
        for cache in (loaded, copy.deepcopy(ours)):
            torch.testing.assert_close(cache.attend(*new), want, atol=2e-6, rtol=1e-5)
    ours.reset()
    assert ours.tokens == ours.bytes == 0 and not ours.is_initialized


def test_what_it_cannot_do_is_said(generator):
    with pytest.raises(SparseFlashError, match="expected an int >= 1"):
        Share(room=0)
    with pytest.raises(SparseFlashError, match="expected cache.Share"):
        Shared(3)
    ours, _ = begun(generator, 1, 8, torch.tensor([0, 0]))
    with pytest.raises(SparseFlashError, match="batch, heads and width of a cache stay"):
        ours.append(*drawn(generator, 3, 1)[1:])
    _, k, v = drawn(generator, 2, 1)
    with pytest.raises(SparseFlashError, match="no gradients"):
        ours.append(k.requires_grad_(), v)
