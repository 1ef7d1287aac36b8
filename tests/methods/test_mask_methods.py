"""What the fixed masks claim, against masks written out the plain way."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from harness import inputs, run
from sparseflash import SparseFlashError
from sparseflash.methods.tree import depth_first
from tolerance import compare

T = 129


def seen(method, Tq=T, Tk=None, *, H=4, Hkv=2, B=1, ctx=None):
    """What a method sees, bool [B, H', Tq, Tk]."""
    q, k = torch.zeros(B, H, Tq, 8), torch.zeros(B, Hkv, Tq if Tk is None else Tk, 8)
    return method.select(q, k, ctx).plan.check().to_dense()


def grid(Tq=T, Tk=None, offset=0):
    return torch.meshgrid(torch.arange(Tq) + offset, torch.arange(Tq if Tk is None else Tk), indexing="ij")


@pytest.mark.parametrize("dilation", [1, 3, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_a_dilated_window_skips_evenly(dilation, causal):
    q, k = grid()
    want = ((q - k) % dilation == 0) & ((q - k).abs() < 9 * dilation) & ((q >= k) | (not causal))
    assert torch.equal(seen(sf.methods.Dilated(9, dilation, causal))[0, 0], want)


def test_a_dilated_window_visits_no_more_than_its_share():
    plan = sf.methods.Dilated(window=128, dilation=8).select(*[torch.zeros(1, 1, 8192, 8)] * 2).plan
    assert plan.work < 3 * 128 / 8192  # a tile of 128 queries, with a window of 128 before each


@pytest.mark.parametrize(
    "hyper",
    [
        {"block": 16, "local": 2, "stride": 4},
        {"block": 5, "local": 1, "stride": 7, "offset": 3},
        {"block": 8, "local": 3, "stride": 2, "shared": True},
        {"block": 16, "local": 2, "stride": 3, "dense_heads": 1},
        {"block": 200},
    ],
    ids=str,
)
@pytest.mark.parametrize("Tq, offset", [(129, 0), (40, 89), (1, 128), (64, 32)])
def test_strided_blocks_are_those_of_the_formula_wherever_queries_begin(hyper, Tq, offset):
    method = sf.methods.Strided(**hyper)
    Hkv, Tk = 3, Tq + offset
    q, k = grid(Tq, Tk, offset)
    far, step = q // method.block - k // method.block, 0 if method.shared else -(-method.stride // Hkv)
    for given in (offset, torch.tensor([offset, offset], dtype=torch.int32)):
        mask = seen(method, Tq, Tk, H=6, Hkv=Hkv, ctx={"q_offset": given})
        for h in range(Hkv):
            kept = (k // method.block + h * step + method.offset) % method.stride == 0
            want = (q >= k) & ((far < method.local) | kept | (h >= Hkv - method.dense_heads))
            assert torch.equal(mask[0, h], want), (given, h)


@pytest.mark.parametrize(("heads", "stride"), [(4, 4), (8, 5), (3, 3)])
def test_strides_of_enough_heads_reach_every_token(heads, stride):
    method = sf.methods.Strided(block=4, local=1, stride=stride)
    assert set(method.residues(heads)) == set(range(stride))
    mask = seen(method, 80, H=2 * heads, Hkv=heads)
    assert torch.equal(mask.any(1)[0], torch.ones(80, 80, dtype=torch.bool).tril())


def test_a_block_that_leaves_a_stride_is_never_needed_again():
    mask = seen(sf.methods.Strided(block=4, local=2, stride=4), 80)[0]
    blocks = mask.unflatten(1, (20, 4)).unflatten(3, (20, 4)).any(4).any(2).int()  # [H, query, key block]
    past = torch.arange(20)[:, None] > torch.arange(20)
    again = ((blocks[:, 1:] > blocks[:, :-1]) & past[1:]).any()
    assert not again


def test_lists_of_a_stride_grow_with_the_blocks_not_with_their_pairs():
    def size(T):
        plan = sf.methods.Strided().select(*[torch.zeros(1, 8, T, 8)] * 2).plan
        return sum(x.numel() for x in plan.tensors().values())

    assert size(1 << 16) < 2.1 * size(1 << 15)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block, g, w, r", [(16, 1, 1, 2), (1, 3, 4, 2), (7, 0, 0, 5), (50, 2, 1, 3)])
def test_every_block_has_its_window_the_global_blocks_and_so_many_links(block, g, w, r, causal):
    mask = seen(sf.methods.BigBird(block, g, w, r, causal))
    q, k = grid()
    past = (q >= k) | (not causal)
    at_q, at_k = q // block, k // block
    base = ((at_q < g) | (at_k < g) | ((at_q - at_k).abs() <= w)) & past
    assert (mask >= base).all() and (mask <= past).all()
    for links in (mask & ~base)[0]:
        blocks = [
            set((links[i : i + block].any(0).nonzero().flatten() // block).tolist())
            for i in range(0, T, block)
        ]
        free = past & ~base
        for i, chosen in enumerate(blocks):
            left = len(set((free[i * block].nonzero().flatten() // block).tolist()))
            assert len(chosen) == min(r, left)
        whole = torch.stack([torch.tensor([j in chosen for j in range(len(blocks))]) for chosen in blocks])
        assert torch.equal(links, whole[at_q, at_k] & past)


def test_links_of_a_block_do_not_depend_on_the_length():
    method = sf.methods.BigBird(block=8, causal=True)
    assert torch.equal(seen(method, 200)[:, :, :96, :96], seen(method, 96))


def test_a_prefix_may_differ_from_sequence_to_sequence_and_queries_may_begin_late():
    q, k = grid(T, T + 20, 20)
    want = torch.stack([(q >= k) | (k < n) for n in (0, 40, 500)])[:, None]
    ctx = {"prefix": torch.tensor([0, 40, 500]), "q_offset": 20}
    assert torch.equal(seen(sf.methods.PrefixLM(), T, T + 20, B=3, ctx=ctx), want)


def test_block_causal_attention_sees_its_block_to_the_end():
    for block in (1, 20, 128):
        q, k = grid(T, T + 30, 30)
        mask = seen(sf.methods.BlockCausal(block), T, T + 30, ctx={"q_offset": 30})
        assert torch.equal(mask[0, 0], q // block >= k // block)


def test_documents_have_the_given_edges():
    edges = torch.tensor([0, 1, 1, 70, T])
    q, k = grid()
    label = torch.searchsorted(edges, torch.arange(T), right=True)
    want = (label[q] == label[k]) & (q >= k) & (q - k < 5)
    assert torch.equal(seen(sf.methods.Documents(window=5), ctx={"cu_seqlens": edges})[0, 0], want)


@pytest.mark.parametrize("shift", [None, (3, 5), (4, 6), (1, 0)])
def test_windows_of_an_image_are_cut_where_padding_would_cut_them(shift):
    H, W, w = 9, 14, (4, 6)
    mask = seen(sf.methods.GridWindow(w, (H, W), shift), H * W)[0, 0]
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    P = [(a - s) % a for a, s in zip(w, shift or (0, 0))]
    label = (y + P[0]) // w[0] * 100 + (x + P[1]) // w[1]
    assert torch.equal(mask, label[:, None] == label)
    if shift is None:
        assert torch.equal(mask, seen(sf.methods.GridWindow(w, (-1, W)), H * W)[0, 0])


def test_windows_of_a_video_have_three_axes():
    mask = seen(sf.methods.GridWindow((2, 3, 3), (-1, 5, 4)), 75)[0, 0]
    at = torch.arange(75)
    label = torch.stack([at // 20 // 2, at // 4 % 5 // 3, at % 4 // 3])
    assert torch.equal(mask, (label[:, :, None] == label[:, None]).all(0))


def test_a_cycle_has_no_beginning():
    method = sf.methods.CycleScan(window=50)
    plans = method.select(torch.zeros(1, 1, T, 8), torch.zeros(1, 1, T, 8)).plan
    one, other = (p.check().to_dense()[0, 0] for p in plans)
    q, k = grid()
    assert not (one & other).any()
    assert torch.equal(one | other, (q - k) % T < 50)
    assert ((one | other).sum(-1) == 50).all()


# ---------------------------------------------------------------- trees


def ancestors(parents):
    n = len(parents)
    mask = torch.eye(n, dtype=torch.bool)
    for i in range(n):
        j = parents[i]
        while j >= 0:
            mask[i, j] = True
            j = parents[j]
    return mask


def random_parents(n, generator):
    """A forest whose nodes come in any order."""
    above = (torch.rand(n, generator=generator) * (torch.arange(n) + 1)).long() - 1
    name = torch.randperm(n, generator=generator)
    parents = torch.empty(n, dtype=torch.int64)
    parents[name] = torch.where(above < 0, -1, name[above.clamp(min=0)])
    return parents


@pytest.mark.parametrize("n", [0, 1, 2, 63, 150])
def test_a_tree_sees_the_context_and_its_ancestors_whatever_the_order_of_its_nodes(n, generator):
    parents = torch.stack([random_parents(n, generator) for _ in range(2)])
    mask = seen(sf.methods.Tree(), n, n + 40, B=2, ctx={"parents": parents})
    assert mask[..., :40].all()
    assert torch.equal(mask[:, 0, :, 40:], torch.stack([ancestors(p) for p in parents.tolist()]))
    first = torch.tensor([40, 20], dtype=torch.int32)  # contexts of their own, in a cache with room behind
    for begin, room in ((40, 40), (first, 60)):
        apart = seen(sf.methods.Tree(), n, n + room, B=2, ctx={"parents": parents, "q_offset": begin})
        for b, at in enumerate((40, 40) if room == 40 else first.tolist()):
            assert apart[b, 0, :, :at].all() and not apart[b, 0, :, at + n :].any()
            assert torch.equal(apart[b, 0, :, at : at + n], mask[b, 0, :, 40:])
    if n:
        one = sf.methods.Tree(parents=tuple(parents[1].tolist()))
        assert torch.equal(seen(one, n, n + 40)[0, 0], mask[1, 0])


def test_depth_first_order_keeps_siblings_in_order_and_subtrees_together():
    place, end = depth_first(torch.tensor([[-1, 0, 0, 1, 1, -1, 2], [-1, 0, 1, 2, 3, 4, 5]]))
    assert place.tolist() == [[0, 1, 4, 2, 3, 6, 5], [0, 1, 2, 3, 4, 5, 6]]
    assert end.tolist() == [[6, 4, 6, 3, 4, 7, 6], [7] * 7]


def test_a_tree_attends_exactly_with_gradients(generator):
    n, context = 63, 100
    q, k, v, dout, dlse = inputs(generator, n, context + n, D=40, Dv=24)
    parents = random_parents(n, generator)
    method = sf.methods.Tree(parents=tuple(parents.tolist()))
    mask = torch.cat([torch.ones(n, context, dtype=torch.bool), ancestors(parents.tolist())], -1)[None, None]
    got = run(q, k, v, method.select(q, k).plan, dout=dout, dlse=dlse)
    compare(got, q, k, v, mask, dout=dout, dlse=dlse)


@pytest.mark.parametrize(
    ("method", "Tk", "ctx", "said"),
    [
        (sf.methods.Tree(), 4, {"parents": torch.tensor([1, 2, 0, -1])}, "node 0 is on a cycle"),
        (sf.methods.Tree(), 4, {"parents": torch.tensor([-1, 1, 0, 0])}, "node 1 is on a cycle"),
        (sf.methods.Tree(), 4, {"parents": torch.tensor([-1, 0, 4, 0])}, r"-1..4: nodes are 0..3"),
        (sf.methods.Tree(), 4, {"parents": torch.zeros(3, dtype=torch.int64)}, r"\[3\].*expected .* \[4\]"),
        (sf.methods.Tree(), 4, {"parents": torch.zeros(4)}, "float32; expected integers"),
        (sf.methods.Tree(parents=(-1,)), 4, {}, r"\[1\].*one a query"),
        (sf.methods.Tree(), 3, {}, "4 queries over 3 keys"),
        (sf.methods.Tree(), 6, {"q_offset": 3}, r"over 6 keys, the first at position \[3\]"),
        (sf.methods.PrefixLM(), 4, {"q_offset": 1.5}, "q_offset=1.5: expected an int"),
        (sf.methods.Dilated(), 5, {}, "Dilated: 4 queries and 5 keys"),
        (sf.methods.PrefixLM(), 4, {"prefix": torch.tensor([1, 2])}, r"expected integers \[1\]"),
        (sf.methods.GridWindow(), 4, {"grid": (3, 3)}, r"grid=\(3, 3\) and text=.* are not 4 tokens"),
        (sf.methods.Strided(dense_heads=3), 4, {}, "dense_heads=3: k has 2 heads"),
    ],
)
def test_what_cannot_be_selected_is_said(method, Tk, ctx, said):
    with pytest.raises(SparseFlashError, match=said):
        seen(method, 4, Tk, ctx=ctx)


def test_a_plan_of_shapes_alone_is_made_once(generator):
    """BigBird of single tokens over short rows: making its plan took longer than attending."""
    q, k, v = torch.randn(3, 2, 4, 128, 16, generator=generator)
    method = sf.methods.BigBird(block=1, global_blocks=4, window_blocks=8, random_blocks=2)
    first = method.select(q, k).plan
    assert method.select(q + 1, k - 1).plan is first
    assert (
        sf.methods.BigBird(block=1, global_blocks=4, window_blocks=8, random_blocks=2).select(q, k).plan
        is first
    )
    assert method.select(q[:, :, :96], k[:, :, :96]).plan.Tq == 96
    with torch.inference_mode():
        assert method.select(q, k).plan is not first  # which may not be trained with
    out = method(q.requires_grad_(), k, v)
    out.sum().backward()
    assert q.grad is not None
    window = sf.methods.Window(window=4)
    assert window.select(q, k, {"q_offset": 3}).plan.q_offset == 3 and window.select(q, k).plan.q_offset == 0
