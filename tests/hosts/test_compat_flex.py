"""FlexAttention's call: the same numbers as PyTorch's, with gradients, or a refusal by name."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

import sparseflash as sf
from sparseflash.compat import flex_attention
from sparseflash.compat.flex import taken_apart

SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
TABLE = torch.linspace(-2, 2, 9)


def softcap(score, b, h, q, kv):
    return 7 * torch.tanh(score / 7)


def alibi(score, b, h, q, kv):
    return score + SLOPES[h] * (kv - q)


def relative(score, b, h, q, kv):
    return 0.5 * score + TABLE[(q - kv).clamp(-4, 4) + 4]


def capped_and_biased(score, b, h, q, kv):
    return torch.tanh(score * 0.25) * 3 - (q - kv).abs() * 0.01


def hiding(score, b, h, q, kv):
    return torch.where((q >= kv) & (b * 9 + kv > 3), score, -float("inf"))


MODS = [None, softcap, alibi, relative, capped_and_biased, hiding, torch_flex._identity]


def mask_of(name, T=200, S=260):
    if name == "none":
        return None
    rules = {
        "causal": lambda b, h, q, kv: q + 60 >= kv,
        "heads": lambda b, h, q, kv: (q + 60 - kv).abs() < 30 * (h + 1),
    }
    return torch_flex.create_block_mask(rules[name], 1, 4, T, S, device="cpu", BLOCK_SIZE=64)


def formula(q, k, v, mod, mask):
    """In fp64: out and lse, of scores that the function is called with one by one, so to say."""
    q, k, v = q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v))
    places = (
        torch.arange(n).view([-1 if d == own else 1 for d in range(4)])
        for own, n in enumerate((2, 4, 200, 260))
    )
    b, h, i, j = places
    score = q @ k.mT / q.shape[-1] ** 0.5
    score = score if mod is None else mod(score, b, h, i, j)
    if mask is not None:
        score = score.masked_fill(~mask.mask_mod(b, h, i, j), -torch.inf)
    lse = score.logsumexp(-1)
    return torch.exp(score - torch.where(lse.isfinite(), lse, 0)[..., None]) @ v, lse


@pytest.mark.parametrize("mod", MODS, ids=lambda x: getattr(x, "__name__", "none"))
@pytest.mark.parametrize("mask", ["none", "causal", "heads"])
def test_it_is_what_pytorch_computes_and_has_gradients(mod, mask, generator):
    q, k, v = (torch.randn(2, H, T, 32, generator=generator) for H, T in ((4, 200), (2, 260), (2, 260)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = {"score_mod": mod, "block_mask": mask_of(mask), "enable_gqa": True, "return_lse": True}
    out, lse = flex_attention(*leaves, **given)
    want, norm = formula(*leaves, mod, given["block_mask"])
    off = 130 * 2**-23  # one rounding of the largest logit, which a bias makes
    torch.testing.assert_close(out.double(), want, atol=off, rtol=1e-5)
    torch.testing.assert_close(lse.double(), norm, atol=off, rtol=1e-5)
    dout = torch.randn(out.shape, generator=generator)
    exact = torch.autograd.grad(want, leaves, dout.double())
    for a, b in zip(torch.autograd.grad(out, leaves, dout), exact, strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)
    theirs, _ = torch_flex.flex_attention(*(x.detach() for x in leaves), **given)
    seen = norm.isfinite()
    torch.testing.assert_close(out[seen], theirs[seen], atol=2 * off, rtol=1e-4)


def test_a_plan_serves_many_calls(generator):
    q = torch.randn(1, 4, 200, 32, generator=generator)
    k = torch.randn(1, 4, 260, 32, generator=generator)
    mask = mask_of("heads")
    plan = sf.Plan.from_block_mask(mask)
    assert torch.equal(flex_attention(q, k, k, block_mask=plan), flex_attention(q, k, k, block_mask=mask))
    out, aux = flex_attention(q, k, k, block_mask=plan, return_aux=torch_flex.AuxRequest(lse=True))
    assert aux.lse.shape == (1, 4, 200) and out.shape == q.shape


def test_parts_are_read_off_a_trace():
    cpu = torch.device("cpu")
    assert taken_apart(softcap, cpu) == (1.0, 7.0, None)
    assert taken_apart(alibi, cpu) == (1.0, None, {"h", "q", "kv"})
    assert taken_apart(relative, cpu) == (0.5, None, {"q", "kv"})
    assert taken_apart(capped_and_biased, cpu) == (0.75, 3.0, {"q", "kv"})
    assert taken_apart(hiding, cpu) == (1.0, None, {"b", "q", "kv"})


@pytest.mark.parametrize(
    "mod",
    [
        lambda score, b, h, q, kv: score * score,
        lambda score, b, h, q, kv: torch.tanh(score + q),
        lambda score, b, h, q, kv: (score + q) * 2,
        lambda score, b, h, q, kv: score * (1 + h),
        lambda score, b, h, q, kv: torch.where(score > 0, score, -1.0),
        lambda score, b, h, q, kv: torch.where(q > kv, 0.0, score),
        lambda score, b, h, q, kv: torch.sin(score),
        lambda score, b, h, q, kv: q - score,
        lambda score, b, h, q, kv: q * 1.0,
        lambda score, b, h, q, kv: score + 1 / score,
    ],
)
def test_what_no_kernel_has_is_refused(mod, generator):
    q = torch.randn(1, 2, 16, 32, generator=generator)
    with pytest.raises(sf.SparseFlashError, match="a form that no kernel has"):
        flex_attention(q, q, q, mod)


def test_what_would_be_lost_is_refused(generator):
    q = torch.randn(1, 4, 16, 32, generator=generator)
    learned = torch.zeros(4, requires_grad=True)
    with pytest.raises(sf.SparseFlashError, match="requires a gradient"):
        flex_attention(q, q, q, lambda score, b, h, q, kv: score + learned[h])
    with pytest.raises(sf.SparseFlashError, match="or enable_gqa=True"):
        flex_attention(q, q[:, :2], q[:, :2])
