"""Methods at the limits of what they are told: settings, states, offsets, no values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparseflash as sf
from cases import CASES, directions, mask_of
from harness import unseen
from sparseflash import Plan
from sparseflash.methods import Method, Selection, heads


@pytest.mark.parametrize("case", [case for case in CASES if not case.slow], ids=str)
def test_what_is_selected_without_a_look_at_values_is_what_is_selected_with_one(case):
    """Rooms for lists that are bounded by shapes alone have room for all."""
    method, q, k = case.method(), directions(2, 4, 130), directions(2, 2, 130, shift=7)
    want = mask_of(method.select(q, k).plan)
    with unseen():
        plan = method.select(q, k).plan
    got = mask_of(plan)
    heads = max(got.shape[1], want.shape[1])
    got, want = (x.repeat_interleave(heads // x.shape[1], 1) for x in (got, want))
    assert torch.equal(*torch.broadcast_tensors(got, want))


@dataclasses.dataclass(frozen=True)
class Weighed(Method):
    """Adds to its heads' keys, and multiplies their outputs, by one number more from head to head."""

    first: int = 0

    def select(self, q, k, ctx=None):
        head = self.first + torch.arange(q.shape[1]).view(1, -1, 1)
        plan = Plan.dense(q.shape[2], k.shape[2], causal=True)
        return Selection(plan, head.expand(1, -1, k.shape[2]) * 0.1, head.expand(2, -1, q.shape[2]) * 1.0)


def test_biases_and_gates_of_heads_stand_where_their_heads_do():
    """And dense heads among them have none: nothing is added, and all is kept."""
    q, k, ten, five = torch.zeros(2, 5, 7, 8), torch.zeros(2, 5, 9, 8), Weighed(10), Weighed(5)
    found = heads.select([ten, five, None, ten, five], q, k, None)
    assert found["gate"].shape == (2, 5, 7) and found["key_bias"].shape == (1, 5, 9)
    assert found["gate"][1, :, 3].tolist() == [10, 5, 1, 11, 6]
    torch.testing.assert_close(found["key_bias"][0, :, 3], torch.tensor([1.0, 0.5, 0.0, 1.1, 0.6]))
    assert heads.select([sf.methods.Window(2)] * 5, q, k, None)["gate"] is None


def test_there_is_room_for_the_groups_of_the_widest_stride_before_one_is_chosen():
    """Tokens that look at every ninth: nine groups, each in tiles of its own."""
    k = torch.nn.functional.one_hot(torch.arange(130) % 9, 16).float().expand(1, 1, -1, -1) * 9
    method = sf.methods.MMInference(near=2, sinks=0, strides=(2, 9))
    with unseen():
        far, near = method.select(k, k).plan
    gap = torch.arange(130)[:, None] - torch.arange(130)
    mask = far.to_dense()[0, 0] | near.to_dense()[0, 0]
    assert torch.equal(mask, (gap >= 0) & ((gap < 2) | (gap % 9 == 0)))


BEHIND = [x for x in CASES if "q_offset" in x.method().reads and not x.slow and x.slug != "tree"]


@pytest.mark.parametrize("case", BEHIND, ids=str)
def test_queries_behind_all_keys_have_lists_as_others(case):
    """Such as those of a cache that another layer has filled less: what is called full is full, too."""
    method, q, k = case.method(), directions(2, 4, 5), directions(2, 2, 40, shift=7)
    plan = method.select(q, k, {"q_offset": 96, "v": k}).plan
    for one in (plan,) if isinstance(plan, Plan) else plan:
        one.check()


@pytest.mark.parametrize(("n", "heads", "sorts"), [(2, 2, 2), (2, 1, 2), (2, 4, 4), (1, 2, 4), (3, 2, 4)])
def test_a_group_sorts_its_keys_once_where_windows_leave_it_whole(n, heads, sorts, generator):
    """Four query heads on two KV heads: the keys are sorted per KV head, or per query head."""
    q, k = torch.zeros(1, 4, 40, 8), torch.zeros(1, 2, 40, 8)
    ctx = {"q_bucket": torch.arange(40).view(1, 1, -1) % 3}
    ctx["k_bucket"] = torch.randint(3, (1, heads, 40), generator=generator)
    plan = sf.methods.HashSparse(window_heads=n, head_window=9).select(q, k, ctx).plan.check()
    assert plan.k_order.shape[1] == sorts
    equal = ctx["q_bucket"][..., None] == ctx["k_bucket"].repeat_interleave(4 // heads, 1)[..., None, :]
    assert torch.equal(plan.to_dense()[:, : 4 - n], equal.tril()[:, : 4 - n])


def test_keys_of_the_sink_are_in_nobodys_bucket():
    """Whatever the ids: their keys are the window's, and none is shown twice."""
    q = k = torch.zeros(1, 2, 40, 8)
    ids = torch.arange(40).view(1, 1, -1) % 4
    for q_bucket, k_bucket in ((ids, ids + 1), (ids + 1, ids), (ids - 9, ids), (ids, ids - 9)):
        method = sf.methods.HashSparse(window=3, sink_tokens=5)
        plans = method.select(q, k, {"q_bucket": q_bucket, "k_bucket": k_bucket}).plan
        shown = sum(plan.to_dense().int() for plan in plans)
        gap = torch.arange(40)[:, None] - torch.arange(40)
        near = (gap >= 0) & ((gap < 3) | (torch.arange(40) < 5))
        equal = q_bucket[..., None] == k_bucket[..., None, :]
        assert torch.equal(shown, (near | equal & (gap >= 0)).expand_as(shown).int())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": 1, "sink_tokens": 2}, ""),
        ({"window": 0, "sink_tokens": 2}, "seen beside a window"),
        ({"window": 1, "include_self": False}, "shows no key"),
        ({"window": 2, "include_self": False}, ""),
        ({"buckets": "kmeans", "top": 0}, "top=0"),
        ({"buckets": "kmeans", "top": 1}, ""),
        ({"buckets": "kmeans", "top": 4, "nb": 4}, ""),
        ({"buckets": "kmeans", "top": 5, "nb": 4}, "there are 4 buckets"),
        ({"top": 2}, "a hash has one bucket"),
        ({"head_window": 1}, ""),
        ({"head_window": 1, "include_self": False}, "head_window=1"),
        ({"head_window": 2, "include_self": False}, ""),
        ({"nb": 3}, "an even number of buckets"),
    ],
    ids=str,
)
def test_settings_that_belong_together_are_taken_up_to_their_limits(given, said):
    if not said:
        sf.methods.HashSparse(**given)
        return
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.methods.HashSparse(**given)


def test_a_query_behind_all_keys_sees_the_largest_numbers_of_all_of_them():
    delta = torch.tensor([0.5, 3.0, 1.0, 2.0, 0.1, 0.2]).view(1, 1, -1)
    q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 6, 8)
    plan = sf.methods.DynamicMask(window=3).select(q, k, {"delta": delta, "q_offset": 6}).plan
    assert plan.to_dense()[0, 0].int().tolist() == [[0, 1, 1, 1, 0, 0]] * 2


def test_of_strides_that_hold_as_much_the_first_is_kept():
    """The last query looks at no key but its nearest: all strides hold nothing of it."""
    k = torch.zeros(1, 1, 60, 16)
    k[:, :, -4:] = 100.0
    method, gap = sf.methods.MMInference(near=5, sinks=2, strides=(6, 9), last=1), torch.arange(60)
    mask = mask_of(method.select(torch.ones_like(k), k).plan)[0, 0]
    gap = gap[:, None] - gap
    assert torch.equal(mask, (gap >= 0) & ((gap < 5) | (gap % 6 == 0) | (torch.arange(60) < 2)))


@pytest.mark.parametrize(("Tk", "starts"), [(20, (0, 10)), (21, (0, 10, 20)), (10, (0,)), (11, (0, 10))])
def test_a_round_has_begun_when_it_has_a_token(Tk, starts):
    method = sf.methods.RoundAttention(rounds=(0, 10, 20))
    assert method.begun(None, Tk - 1, 1, Tk).starts == starts


@dataclasses.dataclass(frozen=True)
class Counted(Method):
    """Counts its calls in its state."""

    width: int = 16
    reads = ("state",)

    def select(self, q, k, ctx=None):
        plan = Plan.dense(q.shape[2], k.shape[2], causal=True, window=(self.width - 1, 0))
        return Selection(plan, state=(ctx.get("state") or 0) + 1)


def test_heads_of_different_settings_have_states_of_their_own():
    q, k, width = torch.zeros(1, 4, 20, 8), torch.zeros(1, 2, 20, 8), (8, 8, 16, 16)
    method, state = Counted(width=width), None
    for n in (1, 2, 3):
        state = method.select(q, k, {"state": state} if state else {}).state
        assert {one.width: calls for one, calls in state.items()} == dict.fromkeys(width, n)
