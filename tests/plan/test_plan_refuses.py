"""Every constructor, one step off in every argument: refused by name; at the limit itself, taken."""

from __future__ import annotations

import pytest
import torch

from sparseflash import Plan, PlanError


def ids(*shape, most=4):
    return (torch.arange(torch.Size(shape).numel()) % most).view(shape)


# of each constructor: arguments that are right, and the least and largest value of those that are bounded
GOOD = {
    "from_blocks": (
        {"keep_blocks": torch.ones(2, 2, 2, 4, dtype=torch.bool), "Tq": 16, "Tk": 16, "tile": 8, "unit": 4},
        {},
    ),
    "from_keys": ({"index": ids(2, 2, 2, 3), "Tq": 16, "Tk": 16, "tile": 8, "unit": 4}, {"index": (-1, 3)}),
    "from_choice": ({"index": ids(2, 2, 8, 3), "Tk": 16, "causal": False}, {"index": (-1, 15)}),
    "from_spans": (
        {
            "spans": torch.tensor([0, 2, 3, 16]).expand(2, 2, 2, 4).reshape(2, 2, 2, 2, 2),
            "Tq": 16,
            "Tk": 16,
            "tile": 8,
        },
        {"spans": (0, 16)},
    ),
    "from_slashes": (
        {"columns": ids(2, 2, 3), "distances": ids(2, 2, 4), "Tq": 16, "Tk": 16},
        {"columns": (-1, 15), "distances": (-1, 1 << 40)},
    ),
    "from_lengths": ({"lengths": torch.tensor([3, 5]), "Tk": 8}, {"lengths": (0, 8)}),
    "from_pages": (
        {
            "block_table": torch.tensor([[2, 0], [1, 3]]),
            "lengths": torch.tensor([3, 8]),
            "page_size": 4,
            "Tk": 16,
        },
        {"lengths": (0, 8)},
    ),
    "from_pages by choice": (
        {
            "block_table": torch.tensor([[2, 0], [1, 3]]),
            "lengths": torch.tensor([3, 8]),
            "page_size": 4,
            "Tk": 16,
            "choice": torch.tensor([[[0, -1]], [[1, 0]]]),
            "first_page": torch.tensor([0, 0]),
        },
        {"choice": (-1, 1), "first_page": (0, 2)},
    ),
    "from_pages packed": (
        {
            "block_table": torch.tensor([[2, 0], [1, 3]]),
            "lengths": torch.tensor([3, 8]),
            "page_size": 4,
            "Tk": 16,
            "cu_seqlens_q": torch.tensor([0, 2, 3]),
        },
        {},
    ),
    "from_flashmask": ({"startend_row_indices": ids(2, 2, 8, 2, most=9), "causal": True}, {}),
    "from_intervals": ({"lo": ids(2, 2, 8), "hi": ids(2, 2, 8) + 2, "Tk": 8}, {"lo": (0, 8), "hi": (0, 8)}),
    "from_intervals from 0": ({"lo": None, "hi": ids(2, 2, 8), "Tk": 8}, {"hi": (0, 8)}),
    "from_expiry": ({"k_end": ids(2, 2, 8)}, {}),
    "from_expiry by unit": ({"k_end": ids(2, 2, 8), "unit": 4}, {}),
    "from_lifetimes": ({"begin": ids(2, 2, 8), "end": ids(2, 2, 8) + 3, "Tq": 8}, {}),
    "from_keep": ({"q_keep": ids(2, 2, 8, most=2).bool(), "k_keep": ids(2, 2, 8, most=2).bool()}, {}),
    "from_buckets": ({"q_bucket": ids(2, 2, 8), "k_bucket": ids(2, 2, 8)}, {}),
    "from_documents": ({"cu_seqlens": torch.tensor([0, 3, 8]), "cu_seqlens_k": torch.tensor([0, 2, 6])}, {}),
    "from_mask": ({"mask": ids(2, 2, 8, 8, most=2).bool()}, {}),
    "from_slices": (
        {
            "q_ranges": torch.tensor([[0, 4], [4, 8]]),
            "k_ranges": torch.tensor([[0, 4], [0, 8]]),
            "types": torch.tensor([1, 0]),
            "Tq": 8,
            "Tk": 8,
        },
        {"types": (0, 3)},
    ),
    "from_bsr": (
        {
            "indptr": torch.tensor([0, 1, 3]),
            "indices": torch.tensor([0, 0, 1]),
            "Tq": 16,
            "Tk": 16,
            "tile": 8,
            "unit": 8,
        },
        {"indices": (-1, 1)},
    ),
}
ANY_RANK = {
    ("from_mask", "mask"),
    ("from_choice", "index"),
    ("from_intervals", "lo"),
    ("from_intervals", "hi"),
    ("from_intervals from 0", "hi"),
}
TENSORS = [
    (name, key)
    for name, (given, _) in GOOD.items()
    for key, x in given.items()
    if isinstance(x, torch.Tensor)
]
COUNTS = [(name, key) for name, (given, _) in GOOD.items() for key, x in given.items() if type(x) is int]


def make(name, **changes):
    given = GOOD[name][0] | changes
    first = [
        given.pop(key)
        for key in list(given)
        if key
        in (
            "q_ranges",
            "k_ranges",
            "types",
            "lo",
            "hi",
            "block_table",
            "startend_row_indices",
            "indptr",
            "indices",
        )
    ]
    return getattr(Plan, name.split()[0])(*first, **given)


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_taken(name):
    make(name).check()


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_a_tensor_that_is_none_or_of_another_rank_dtype_or_size_is_refused_by_name(name, key):
    x = GOOD[name][0][key]
    wrong = {"a list": x.tolist(), "text": "x", "one axis more": x[None], "one axis less": x[0]}
    if key not in ("mask", "keep_blocks", "q_keep", "k_keep"):
        wrong |= {"floats": x.double(), "truth": x > 0}
    else:
        wrong["floats"] = x.float()
    if x.dim() > 2:
        wrong |= {"no heads": x[:, :0]}
    if name == "from_slices":
        wrong = {how: x for how, x in wrong.items() if how not in ("a list", "text") and key != "types"}
    for how, other in wrong.items():
        if (name, key) in ANY_RANK and how.startswith("one axis"):
            other = x[None, None, None] if how.endswith("more") else x[0, 0, 0]
        with pytest.raises(PlanError) as said:
            make(name, **{key: other})
        assert len(str(said.value)) > 20, how


TOGETHER = [
    (name, key)
    for name, key in TENSORS
    if GOOD[name][0][key].dim() > 2 and sum(isinstance(x, torch.Tensor) for x in GOOD[name][0].values()) > 1
]
"""Tensors that have others beside them."""


@pytest.mark.parametrize(("name", "key"), TOGETHER)
def test_tensors_of_unlike_batches_are_refused(name, key):
    x = GOOD[name][0][key]
    with pytest.raises(PlanError):
        make(name, **{key: torch.cat([x, x[:1]])})


@pytest.mark.parametrize(("name", "key"), COUNTS)
def test_a_count_below_its_least_is_refused_by_name(name, key):
    least = int(key in ("tile", "unit", "page_size"))
    for wrong in (least - 1, 2**31, 1.0, "1", True):
        with pytest.raises(PlanError, match=key):
            make(name, **{key: wrong})


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, (_, ends) in GOOD.items() for key in ends])
def test_values_are_taken_up_to_their_limits_and_refused_beyond(name, key):
    least, most = GOOD[name][1][key]
    x = GOOD[name][0][key]
    for value in (least, most):
        if key == "lo" and value == most or key == "spans":
            continue
        one = x.clone()
        one.view(-1)[-1 if key != "choice" else 1] = value  # a page is chosen once
        make(name, **{key: one}).check()
    for value in (least - 1, most + 1):
        one = x.clone()
        one.view(-1)[-1] = value
        with pytest.raises(PlanError):
            make(name, **{key: one})


@pytest.mark.parametrize(
    ("spans", "good"),
    [
        ([[0, 4], [4, 8]], True),
        ([[0, 5], [4, 8]], False),
        ([[4, 8], [0, 4]], True),
        ([[0, 8], [3, 3]], True),
        ([[3, 3], [3, 3]], True),
        ([[2, 1], [3, 4]], False),
        ([[0, 1], [0, 1]], False),
        ([[0, 8], [8, 8]], True),
        ([[0, 1], [7, 9]], False),
        ([[-1, 1], [7, 8]], False),
    ],
)
def test_ranges_of_a_tile_may_touch_and_not_meet(spans, good):
    given = torch.tensor(spans).view(1, 1, 1, 2, 2)
    if good:
        want = torch.zeros(8, dtype=torch.bool)
        for lo, hi in spans:
            want[lo:hi] = True
        assert torch.equal(Plan.from_spans(given, Tq=1, Tk=8).check().to_dense()[0, 0, 0], want)
        return
    with pytest.raises(PlanError, match="spans"):
        Plan.from_spans(given, Tq=1, Tk=8)


@pytest.mark.parametrize(
    ("table", "lengths", "more", "said"),
    [
        ([[0, 1], [2, 3]], [8, 8], {}, ""),
        ([[0, 4], [2, 3]], [8, 8], {}, "pages 0..4"),
        ([[0, 4], [2, 3]], [4, 8], {}, ""),  # beyond its length anything stands
        ([[0, 4], [2, 3]], [5, 8], {}, "pages 0..4"),
        ([[0, -1], [2, 3]], [5, 8], {}, "pages -1"),
        ([[0, 0], [2, 3]], [5, 8], {}, "stands twice"),
        ([[0, 0], [2, 3]], [4, 8], {}, ""),
        ([[0, 0], [2, 3]], [8, 8], {"first_page": 1}, ""),
        ([[9, 0], [2, 3]], [8, 8], {"first_page": torch.tensor([1, 0])}, ""),
        ([[9, 0], [2, 3]], [8, 8], {"first_page": torch.tensor([0, 0])}, "pages 0..9"),
        ([[0, 1], [0, 1]], [8, 8], {}, ""),  # sequences may share
        ([[0, 1], [2, 3]], [8, 8], {"choice": torch.tensor([[[0, 0]], [[1, 0]]])}, "stands twice"),
        ([[0, 9], [2, 3]], [8, 8], {"choice": torch.tensor([[[0, -1]], [[1, 0]]])}, ""),
        ([[0, 9], [2, 3]], [8, 8], {"choice": torch.tensor([[[0, 1]], [[1, 0]]])}, "pages 0..9"),
        ([[0, 1], [2, 3]], [8], {}, "lengths for 1"),
        ([[0, 1], [2, 3]], [8, 8], {"Tk": 18}, "no multiple of page_size"),
        ([[0, 1], [2, 3]], [8, 8], {"cu_seqlens_q": torch.tensor([0, 1])}, "as many"),
        ([[0, 1], [2, 3]], [8, 8], {"first_page": -1}, "first_page=-1"),
        ([[0, 1], [2, 3]], [8, 8], {"first_page": torch.tensor([0, 0, 0])}, "first_page"),
    ],
)
def test_pages_are_looked_at_as_far_as_they_are_used(table, lengths, more, said):
    given = {"page_size": 4, "Tk": 16} | more
    if not said:
        Plan.from_pages(torch.tensor(table), torch.tensor(lengths), **given).check()
        return
    with pytest.raises(PlanError, match=said):
        Plan.from_pages(torch.tensor(table), torch.tensor(lengths), **given)
