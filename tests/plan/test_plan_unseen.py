"""Plans on an accelerator: made, transposed and handed to the kernels without a look at any value.

A card is not needed to tell. Tensors of the device "meta" have no values, so whatever asks for one fails, and
a mode watches for what would copy from main memory. The values themselves are compared on the CPU, where the
constructors are told that they may not look.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import plans
import sparseflash as sf
from harness import unseen, watched
from sparseflash import Plan, methods
from sparseflash.backends.numerics import Softmax, Stick
from sparseflash.plan.transpose import transpose_spans, transpose_units
from sparseflash.selection.orders import _draw_planes
from test_plan import _readers, _span_visits, _unit_visits


class Made(TorchDispatchMode):
    """Counts the bytes of all tensors that are made, views and all."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.bytes += sum(x.untyped_storage().nbytes() for x in made)
        return out


# ---------------------------------------------------------------- nothing looks


@pytest.fixture
def launches(monkeypatch):
    """The Triton backend as on a Hopper card, its kernels replaced by a list of what would be launched."""
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    from sparseflash.backends.triton import blocks, softmax, split, stick

    found = []

    class Kernel:
        def __init__(self, kernel):
            self.name, self.arg_names = kernel.__name__, kernel.arg_names

        def __getitem__(self, grid):
            assert all(type(n) is int for n in grid)
            return lambda *given, **named: found.append(self.name)

    rooms = {softmax: ("rows", "columns"), split: ("merge",), stick: ("stick", "stick_columns")}
    for room, names in rooms.items():
        for name in (f"{name}_kernel" for name in names):
            monkeypatch.setattr(room, name, Kernel(getattr(room, name)))
    monkeypatch.setattr(blocks, "target", lambda: ("cuda", 90))
    monkeypatch.setattr(softmax, "multiprocessors", lambda device: 132)
    return found


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype)


def edges(q):
    return torch.zeros(5, dtype=torch.int32, device=q.device)


def topk(q, k):
    """Units with the highest scores, of every tile of 64 queries."""
    scores = q.unflatten(2, (-1, 64)).mean(3) @ k.repeat_interleave(2, 1).unflatten(2, (-1, 64)).mean(3).mT
    index = scores.topk(3).indices
    return Plan.from_keys(index, Tq=q.shape[2], Tk=k.shape[2], tile=64, unit=64, unique=True, causal=True)


def threshold(q, k):
    scores = q.unflatten(2, (-1, 64)).mean(3) @ k.repeat_interleave(2, 1).unflatten(2, (-1, 64)).mean(3).mT
    return Plan.from_blocks(scores > 0, Tq=512, Tk=512, tile=64, unit=64, causal=True, capacity=4)


SELECT = {
    "dense": lambda q, k: Plan.dense(512, 512, causal=True, device=q.device),
    "window": lambda q, k: methods.Window(window=100).select(q, k).plan,
    "sink-window": lambda q, k: methods.SinkWindow(window=100, sink_tokens=4).select(q, k).plan,
    "hash-sparse": lambda q, k: methods.HashSparse(nb=8).select(q, k).plan,
    "hash-sparse, tied": lambda q, k: methods.HashSparse(nb=8, include_self=False).select(q, k).plan,
    "hash-sparse and windows": lambda q, k: methods.HashSparse(nb=8, window_heads=2).select(q, k).plan,
    "qk-sparse": lambda q, k: methods.QKSparse(q_drop=0.3, k_drop=0.5).select(q, k, {"step": 3}).plan,
    "documents": lambda q, k: Plan.from_documents(edges(q), Tq=512, Tk=512),
    "moving intervals": lambda q, k: Plan.from_intervals(
        None, meta(1, 1, 512, dtype=torch.int32), Tk=512, moving=True
    ),
    "top-k": topk,
    "threshold": threshold,
    "choice": lambda q, k: Plan.from_choice(meta(1, 512, 7, dtype=torch.int32), Tk=512),
}


@pytest.mark.parametrize("name", SELECT)
def test_selecting_attending_and_differentiating_look_at_no_value(name, launches):
    from sparseflash.backends import triton as backend

    q, k = meta(2, 4, 512, 64), meta(2, 2, 512, 64)
    _draw_planes(64, 8, 2, 1, 0, q.device)  # are drawn once, in main memory
    how = {"options": Softmax(0.1, 0.0), "key_bias": None}
    with watched():
        plan = SELECT[name](q, k)
        out, lse, norm = backend.forward(q, k, k, plan, **how, out_dtype=q.dtype, normed=True)
        backend.backward(out, q, k, k, out, norm, lse, plan, **how, grad_dtype=None)
        ready = plan.prepare()
        sf.attention(q, k, k, ready)  # the checks of its arguments, and what the custom op does to a plan
    assert launches == ["rows_kernel", "rows_kernel", "columns_kernel"]
    assert (ready.span_keys is None) == (plan.spans is None)


@pytest.mark.parametrize("name", SELECT)
def test_sticks_look_at_no_value(name, launches):
    from sparseflash.backends import triton as backend

    q, k = meta(2, 4, 512, 64), meta(2, 2, 512, 64)
    _draw_planes(64, 8, 2, 1, 0, q.device)
    with watched():
        plan = SELECT[name](q, k)
        out, rem = backend.stick_forward(q, k, k, plan, Stick(0.1))
        backend.stick_backward(out, rem, q, k, k, plan, Stick(0.1))
    wave = ["stick_kernel", "stick_kernel", "stick_columns_kernel"]
    assert launches == ["stick_kernel", *wave * (len(launches) // 3)] and len(launches) > 3


@pytest.mark.parametrize("name", ["dense", "units"])
def test_memory_of_sticks_is_linear_in_the_length(name, launches):
    from sparseflash.backends import triton as backend

    def made(T):
        """Bytes of all that forward and backward make."""
        q, held = meta(1, 2, T, 64), Made()
        index = meta(1, 1, T // 128, 16, dtype=torch.int32)
        plan = Plan.dense(T, T, causal=True, device="meta")
        if name == "units":
            plan = Plan.from_keys(index, Tq=T, Tk=T, tile=128, unique=True, causal=True)
        with held:
            out, rem = backend.stick_forward(q, q, q, plan, Stick(0.1))
            backend.stick_backward(out, rem, q, q, q, plan, Stick(0.1))
        return held.bytes

    assert made(1 << 17) < 9 * made(1 << 14)


def test_tensors_without_values_give_tensors_without_values():
    q, k = meta(2, 4, 512, 64), meta(2, 2, 512, 64)
    assert sf.attention(q, k, k, causal=True).shape == q.shape
    assert sf.decode(q[:, :, :1], k, k).is_meta


@pytest.mark.parametrize("layout", ["lengths", "pages", "keys"])
def test_decoding_looks_at_no_value(layout, launches):
    from sparseflash.backends import triton as backend

    q, k, lengths = meta(2, 8, 1, 64), meta(2, 2, 4096, 64), meta(2, dtype=torch.int32)
    with watched():
        if layout == "lengths":
            plan = Plan.from_lengths(lengths, Tk=4096)
        elif layout == "pages":
            table = meta(2, 32, dtype=torch.int32)
            k = k.reshape(1, 2, -1, 64)
            plan = Plan.from_pages(table, lengths, page_size=64, Tk=8192)
        else:
            plan = Plan.from_keys(meta(2, 2, 1, 16, dtype=torch.int32), Tq=1, Tk=4096, unit=64, unique=True)
        how = {"options": Softmax(0.1, 0.0), "key_bias": None, "sink_logits": None}
        backend.decode(q, k, k, (plan,), **how)
    assert launches == ["rows_kernel", "merge_kernel"]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.repeat_interleave(x, x),
        lambda x: torch.unique(x),
        lambda x: x + torch.tensor([1, 2, 3], device=x.device),
    ],
)
def test_the_watch_sees_what_it_is_for(look):
    with watched(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        look(meta(3, dtype=torch.int64))


# ---------------------------------------------------------------- and yet the lists are right


MOVING = ("dense", "window", "sink", "offset", "keep", "buckets", "documents")


@pytest.mark.parametrize("kind", [*MOVING, "blocks"])
@pytest.mark.parametrize("seed", range(4))
def test_plans_made_unseen_show_the_same_mask_and_transpose_to_every_visit(kind, seed):
    with unseen():
        example = plans.example(seed, kind, batch=2, heads=4, Tq=(1, 33, 129, 257)[seed])
        plan = example.plan
        spans, units = plan.span_lists, plan.unit_lists
        keys = transpose_units(units) if spans is None else transpose_spans(spans, plan.k_rows)
    heads = example.mask.shape[1]
    mask = plan.to_dense()
    mask = mask[:, torch.arange(heads) * mask.shape[1] // heads]
    assert bool((mask == example.mask).all()), example.line
    visits = (_span_visits if plan.spans is not None else _unit_visits)(plan)(keys.group)
    found = []
    for b, h, c in torch.cartesian_prod(*map(torch.arange, keys.start.shape)).tolist():
        at, full, count = (int(x[b, h, c]) for x in (keys.start, keys.full, keys.count))
        for n in range(at, at + count):
            found += [(b, h, c, *entry) for entry in _readers(plan, keys, b, h, n, n - at < full)]
    named = {entry[:-1] for entry in found}
    assert len(named) == len(found), f"an entry is named twice: {example.line}"
    assert {entry[:-1] for entry in visits} <= named, example.line
    assert {entry for entry in found if entry[-1]} <= visits, f"called full, and is not: {example.line}"
    assert len(found) <= 1.2 * len(visits) + 4 * plan.tiles, f"much is tested in vain: {example.line}"


def test_a_tile_between_two_that_cover_a_group_of_keys_may_not():
    """Of tiles 0, 1, 2 the first and the last cover keys 128..255: a run of all three takes tile 1 along."""
    spans = torch.tensor([[0, 384], [0, 128], [0, 384]]).view(1, 1, 3, 1, 2)
    plan = Plan.from_spans(spans, Tq=384, Tk=384)
    with unseen():
        keys = transpose_spans(replace(plan.span_lists, room=1), plan.k_rows)
    at, full = int(keys.start[0, 0, 1]), int(keys.full[0, 0, 1])
    assert int((keys.until - keys.index)[at : at + full].clamp(min=0).sum()) == 0
    at = int(keys.start[0, 0, 0])
    assert [int(keys.index[at]), int(keys.until[at])] == [0, 3]  # all three cover keys 0..127


def test_buckets_of_one_query_each_have_a_tile_each_before_anyone_counts_them():
    bucket = torch.arange(5).view(1, 1, -1)
    with unseen():
        plan = Plan.from_buckets(bucket, bucket, buckets=5, tile=16)
    assert plan.tiles >= 5 and torch.equal(plan.to_dense()[0, 0], torch.eye(5, dtype=torch.bool))


def test_a_group_of_keys_that_all_its_tiles_cover_is_a_run_without_a_test():
    """One tile is as good as several: what is called full is not only right, it is all there is."""
    for Tq in (128, 384):
        with unseen():
            plan = Plan.dense(Tq, 512)
            keys = transpose_spans(plan.span_lists, plan.k_rows)
        first = keys.start[0, 0]
        full = (keys.until - keys.index)[first]
        assert torch.equal(full, torch.full_like(full, Tq // 128)) and int(keys.full.min()) > 0
        tested = [(keys.until - keys.index)[first + n] for n in range(1, int(keys.count.max()))]
        assert all(int(x.clamp(min=0).sum()) == 0 for x in tested)


def test_a_changed_plan_forgets_what_its_lists_were_like():
    with unseen():
        plan = Plan.dense(300, 300, causal=True)
    assert plan.span_room == 3
    assert replace(plan, span_full=plan.span_full * 0).span_room == 0
    assert plan.to("cpu").span_room == plan.prepare().span_room == 3
