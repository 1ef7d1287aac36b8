"""Masks as other libraries write them down, against the mask that their papers define."""

from __future__ import annotations

import pytest
import torch

from sparseflash import Plan, PlanError

T = 70
ENDS = torch.tensor([0, 1])


@pytest.mark.parametrize(("causal", "n"), [(True, 1), (True, 2), (False, 2), (False, 4)])
def test_flashmask_hides_keys_between_rows(causal, n, generator):
    ends = torch.randint(0, T + 1, (2, 3, T, n), generator=generator)
    mask = Plan.from_flashmask(ends, causal=causal, tile=16, unit=16).check().to_dense()
    row, key = torch.arange(T)[:, None], torch.arange(T)
    hidden = (row < key) if causal else torch.zeros(T, T, dtype=torch.bool)
    at = [x[:, :, None] for x in ends.unbind(-1)]
    if n == 1:
        hidden = hidden | (row >= at[0])
    elif n == 2 and causal:
        hidden = hidden | ((row >= at[0]) & (row < at[1]))
    elif n == 2:
        hidden = hidden | (row >= at[0]) | (row < at[1])
    else:
        hidden = hidden | ((row >= at[0]) & (row < at[1])) | ((row >= at[2]) & (row < at[3]))
    assert torch.equal(mask, ~hidden)


def test_slices_are_rectangles_cut_along_diagonals(generator):
    q = torch.randint(0, T + 1, (9, 2), generator=generator).sort(-1).values
    k = torch.randint(0, 2 * T + 1, (9, 2), generator=generator).sort(-1).values
    types = torch.randint(0, 4, (9,), generator=generator)
    want = torch.zeros(T, 2 * T, dtype=torch.bool)
    for (a, b), (c, d), kind in zip(q.tolist(), k.tolist(), types.tolist(), strict=True):
        for i in range(a, b):
            for j in range(c, d):
                before = j <= d - 1 - (b - 1 - i) or kind in (0, 2)
                behind = j >= c + i - a or kind in (0, 1)
                want[i, j] |= before and behind
    for given in ((q, k, types), (q.tolist(), k.tolist(), types.tolist())):
        plan = Plan.from_slices(*given, Tq=T, Tk=2 * T, tile=16, unit=16).check()
        assert torch.equal(plan.to_dense()[0, 0], want)
    assert not Plan.from_slices([], [], Tq=4, Tk=4).to_dense().any()


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_block_sparse_rows_are_the_blocks_they_store(generator):
    scipy = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    keep = torch.rand(5, 7, generator=generator) < 0.4
    want = keep.repeat_interleave(8, 0).repeat_interleave(4, 1)
    stored = scipy.bsr_array(want.numpy(), blocksize=(8, 4))
    indptr, indices = torch.from_numpy(stored.indptr), torch.from_numpy(stored.indices)
    plans = [
        Plan.from_bsr(indptr, indices, Tq=40, Tk=28, tile=8, unit=4),
        Plan.from_bsr(stored),
        Plan.from_bsr(want.float().to_sparse_bsr((8, 4))),
    ]
    for plan in plans:
        assert torch.equal(plan.check().to_dense()[0, 0], want) and (plan.tile, plan.unit) == (8, 4)
    causal = Plan.from_bsr(indptr, indices, Tq=40, Tk=28, tile=8, unit=4, causal=True, q_offset=-6)
    assert torch.equal(causal.to_dense()[0, 0], want & (torch.arange(40)[:, None] - 6 >= torch.arange(28)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Plan.from_flashmask(torch.zeros(1, 1, 4, 3).int(), causal=True), "n = 3"),
        (lambda: Plan.from_flashmask(torch.zeros(1, 4, 1).int(), causal=True), "expected integers"),
        (lambda: Plan.from_slices([[0, 9]], [[0, 4]], Tq=8, Tk=8), "q_ranges hold 0..9"),
        (lambda: Plan.from_slices([[3, 2]], [[0, 4]], Tq=8, Tk=8), "ends before it begins"),
        (lambda: Plan.from_slices([[0, 2]], [[0, 4]], [4], Tq=8, Tk=8), "types hold 4"),
        (lambda: Plan.from_slices([[0, 2]], [], Tq=8, Tk=8), "1 q_ranges and 0 k_ranges"),
        (lambda: Plan.from_bsr(ENDS, ENDS[:1], Tq=9, Tk=8, tile=4, unit=4), "expected 4 running totals"),
        (lambda: Plan.from_bsr(ENDS, ENDS[:1]), "say Tq, Tk"),
        (lambda: Plan.from_bsr(torch.eye(4)), "Plan.from_sparse"),
        (lambda: Plan.from_bsr(torch.eye(4).to_sparse_bsr((2, 2)), tile=4), "the matrix says 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_its_format_is_refused(make, said):
    with pytest.raises(PlanError, match=said):
        make()
