"""`Plan.from_choice`: what a learned indexer chose, as lists and as tiles; its attention, and its memory."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
import tolerance
from harness import BACKENDS, MAIN, inputs, peak_memory


def _listed(index, Tk, unit, at, keep):
    """The mask by one line: bool [B,H,Tq,Tk]."""
    C = -(-Tk // unit)
    hit = torch.zeros(*index.shape[:3], C + 1, dtype=torch.bool).scatter_(-1, index % (C + 1), True)[..., :C]
    return (
        hit.repeat_interleave(unit, -1)[..., :Tk] & (torch.arange(Tk) <= at[..., None]) & keep[:, None, None]
    )


@pytest.mark.parametrize("tile", [None, 1, 64])
@pytest.mark.parametrize("unit", [1, 16, 128])
@pytest.mark.parametrize("Tq, Tk, offset", [(1, 1, 0), (63, 129, 66), (200, 150, -10), (130, 300, "each")])
def test_the_plan_is_the_mask(tile, unit, Tq, Tk, offset, generator):
    C = -(-Tk // unit)
    index = torch.randint(-1, C, (2, 2, Tq, 9), generator=generator)
    each = torch.tensor([40, 170])
    at = torch.arange(Tq) + (each.view(2, 1, 1) if offset == "each" else offset)
    offset = each if offset == "each" else offset
    for keep in (None, torch.rand(2, Tk, generator=generator) < 0.7):
        plan = sf.Plan.from_choice(index, Tk=Tk, unit=unit, q_offset=offset, k_keep=keep, tile=tile)
        plan.check()
        real = torch.ones(2, Tk, dtype=torch.bool) if keep is None else keep
        assert torch.equal(plan.to_dense().expand(2, 2, Tq, Tk), _listed(index, Tk, unit, at, real))
    shared = sf.Plan.from_choice(index[:1, 0].int(), Tk=Tk, unit=unit, causal=False, tile=tile)
    late = torch.full((Tq,), Tk)
    assert torch.equal(
        shared.to_dense(), _listed(index[:1, :1], Tk, unit, late, torch.ones(1, Tk, dtype=torch.bool))
    )


@MAIN
@pytest.mark.parametrize("unit, tile, D, Dv", [(1, 1, 80, 40), (1, 64, 40, 40), (16, 1, 40, 80)])
def test_attention_and_gradients_over_a_choice(backend, dtype, unit, tile, D, Dv, generator):
    T = 129
    q, k, v, dout, dlse = inputs(generator, T, D=D, Dv=Dv, dtype=dtype)
    index = torch.randint(-1, -(-T // unit), (2, 1 if unit == 1 else 2, T, 5), generator=generator)
    index[:, :, 7] = -1
    plan = sf.Plan.from_choice(index, Tk=T, unit=unit, tile=tile)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sf.attention(*leaves, plan, return_lse=True, backend=backend)
    seen = lse > -torch.inf
    assert not seen[:, :, 7].any()
    total = (out * dout).sum() + (torch.where(seen, lse, 0) * torch.where(seen, dlse, 0)).sum()
    grads = torch.autograd.grad(total, leaves)
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    mask = _listed(index, T, unit, torch.arange(T), torch.ones(2, T, dtype=torch.bool))
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


def test_choices_that_overlap_become_tiles(generator):
    index = sf.indexer_topk(
        torch.rand(1, 2, 512, 16, generator=generator),
        torch.rand(1, 512, 16, generator=generator),
        torch.ones(1, 2, 512),
        300,
    )
    assert sf.Plan.from_choice(index, Tk=512).tile > 1
    assert sf.Plan.from_choice(index[..., :8], Tk=512).tile == 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is not available here")
def test_memory_is_linear_in_the_length(generator):
    def extra(T):
        q, k, v, dout, _ = inputs(generator, T, B=1, H=2, Hkv=2, D=16)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        scores = [x.detach()[:, :2] for x in (q, k[:, 0], q[..., 0])]

        def step():
            index = sf.indexer_topk(*scores, 64, backend="cpu")
            out = sf.attention(*leaves, sf.Plan.from_choice(index, Tk=T), backend="cpu")
            torch.autograd.grad(out, leaves, dout)

        step()
        return peak_memory(step)

    extra(1024)
    sizes = [extra(T) for T in (2048, 4096, 8192)]
    free = 16 << 20  # what the allocator may ask for or keep; a byte a pair would be 64 MiB at 8192 tokens
    assert sizes[2] < 2.5 * sizes[1] + free and sizes[1] < 2.5 * sizes[0] + free, sizes


WRONG = [
    ({"index": torch.zeros(2, 3)}, "expected integers"),
    ({"index": torch.full((1, 5, 2), 9)}, "index holds 9..9"),
    ({"index": torch.full((1, 100, 50), 9), "tile": 64}, "index holds 9..9"),
    ({"k_keep": torch.ones(2, 4, dtype=torch.bool)}, "True = a real key"),
    ({"q_offset": torch.zeros(3, dtype=torch.int32), "index": torch.zeros(2, 5, 2).long()}, "one batch size"),
    ({"Tk": -1}, "Tk=-1"),
]


@pytest.mark.parametrize("given, said", WRONG)
def test_errors_say_what_to_do(given, said):
    good = {"index": torch.zeros(1, 5, 2).long(), "Tk": 5, "causal": False}
    with pytest.raises(sf.PlanError, match=said):
        sf.Plan.from_choice(**(good | given))
