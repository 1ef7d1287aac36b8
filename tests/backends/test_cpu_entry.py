"""The C entry of the native backend refuses what does not fit: it would be read or written out of bounds."""

import ctypes
import dataclasses
import functools
import operator

import pytest
import torch

import plans
import sparseflash as sf
from harness import same_bits
from sparseflash.backends import cpu
from sparseflash.backends.cpu.call import Call, Decode
from sparseflash.backends.numerics import Softmax

pytestmark = pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
REFUSED = 3


def put(at, path, value):
    """Set a field of a field; a function is given what was there."""
    *way, name = path.split(".")
    at = functools.reduce(getattr, way, at)
    setattr(at, name, value(getattr(at, name)) if callable(value) else value)


def amid(address):
    return address + 1


class Prepared:
    """A call over a plan that has every kind of table, before it enters; and what it points to."""

    def __init__(self, plans=1):
        g = torch.Generator().manual_seed(0)
        q, (k, v) = torch.randn(2, 4, 70, 16, generator=g), torch.randn(2, 2, 2, 70, 16, generator=g)
        plan = sf.Plan.from_mask(torch.rand(1, 2, 70, 70, generator=g) < 0.5, tile=16)
        fields = {"k_end": torch.full((1, 1, 70), 99, dtype=torch.int32), "q_offset": torch.zeros(2).int()}
        plan = dataclasses.replace(plan, **fields)
        self.kept = [q, k, v, plan]
        self.out, self.lse = torch.empty_like(q), torch.empty(2, 4, 70)
        bias, self.sink = torch.randn(1, 2, 70, generator=g), torch.randn(4, generator=g)
        self.calls = (Call * plans)(
            *(cpu.call_of(q, k, v, plan, 0.25, 0.0, bias, self.kept) for _ in range(plans))
        )
        for call in self.calls:
            call.out, call.lse = cpu.view(self.out), self.lse.data_ptr()
        self.whole = Decode(ctypes.sizeof(Decode), self.calls, plans, 0, self.sink.data_ptr())

    def enter(self, name, at=None):
        found = cpu.native()
        of = self.whole if name == "sf_decode" else self.calls[0]
        return getattr(found.library, name)(ctypes.byref(of), found.fp32 if at is None else at)


WRONG = {
    **dict.fromkeys(("q.data", "k.data", "v.data", "out.data", "lse"), (None, amid)),
    **dict.fromkeys(("q.row", "k.head", "v.lane", "out.batch"), (2**62, -(2**62), -(2**63))),
    "norm": (lambda _: 1,),
    "B": (-1, 1, 2**62),
    "Bk": (0, 3),
    "Hq": (0, 3, 2**62),
    "Hkv": (0, -1, 2**62),
    "D": (0, 577),
    "Dv": (-1, 2**40),
    "Tq": (-1, 71, 2**40),
    "Tk": (-1, 71, 2**40),
    "dtype": (-1, 7),
    "out_dtype": (-1, 3),
    "threads": (0, -1, -(2**31)),
    "weights": (-1, 3),
    "key_bias.data": (amid,),
    "key_bias.length": (69,),
    "plan.tile": (0, -1, 2**31 - 1, 2**62),
    "plan.unit": (0, -1, 2**62),
    "plan.tiles": (-1, 99),
    "plan.q_rows": (-1, 71),
    "plan.k_rows": (-1, 71, 2**40),
    **dict.fromkeys(("plan.index", "plan.bits"), (None, amid)),
    **dict.fromkeys(("plan.index_size", "plan.bits_size", "plan.spans_size"), (-1, 2**62)),
    "plan.start.data": (amid, lambda x: x + 4),
    **dict.fromkeys(("plan.full.data", "plan.count.data"), (None, amid)),
    **dict.fromkeys(("plan.start.length", "plan.count.length", "plan.k_end.length"), (-1, 0, 1, 2**62)),
    **dict.fromkeys(("plan.full.heads", "plan.q_shift.heads"), (-1, 0, 3, 2**62)),
    **dict.fromkeys(("plan.bits_start.batch", "plan.q_shift.batch"), (-1, 0, 5)),
    "plan.q_shift.length": (0, 2),
}


@pytest.mark.parametrize("path", WRONG)
def test_a_call_that_does_not_fit_is_refused(path):
    """By attention, and by decode, of which every plan counts."""
    for value in WRONG[path]:
        attend, decode = Prepared(), Prepared(plans=2)
        assert attend.enter("sf_forward") == decode.enter("sf_decode") == 0
        put(attend.calls[0], path, value)
        put(decode.calls[1], path, value)
        assert attend.enter("sf_forward") == REFUSED, value
        assert decode.enter("sf_decode") == REFUSED, value


@pytest.mark.parametrize(
    "path, value",
    [
        ("size", 0),
        ("size", operator.neg),
        ("calls", lambda _: ctypes.POINTER(Call)()),
        ("calls", lambda x: ctypes.cast(ctypes.addressof(x.contents) + 4, ctypes.POINTER(Call))),
        ("plans", 0),
        ("plans", -1),
        ("plans", 2**31 - 1),
        ("plans", 2**62),
        ("dtype", 1),
        ("dtype", -1),
        ("sink", amid),
    ],
)
def test_a_decode_that_does_not_fit_is_refused(path, value):
    given = Prepared()
    put(given.whole, path, value)
    assert given.enter("sf_decode") == REFUSED


@pytest.mark.parametrize("path, value", [("B", 1), ("Hq", 2), ("Tq", 69), ("Dv", 15), ("dtype", 2)])
def test_plans_of_different_tensors_are_refused(path, value):
    """Each fits by itself, but they are one softmax, with one result."""
    given = Prepared(plans=2)
    call = given.calls[1]
    call.plan.q_order, call.plan.q_shift = call.plan.k_end, cpu.call.Table()  # 70 rows, however many tokens
    call.Bk = 1
    put(call, path, value)
    given.whole.plans, given.whole.dtype = 1, call.dtype
    given.whole.calls = ctypes.pointer(call)
    assert given.enter("sf_decode") == 0
    given.whole.plans, given.whole.dtype = 2, 0
    given.whole.calls = given.calls
    assert given.enter("sf_decode") == REFUSED


@pytest.mark.parametrize("name", ["sf_forward", "sf_backward", "sf_stats", "sf_decode", "sf_stick_forward"])
def test_no_call_and_no_such_level_are_refused(name):
    found = cpu.native()
    assert getattr(found.library, name)(None, found.fp32) == REFUSED
    for level in (-1, 99):
        assert Prepared().enter(name, at=level) == REFUSED


@pytest.mark.parametrize("name", ["sf_forward", "sf_decode"])
def test_two_thousand_million_threads_are_as_many_as_are_of_use(name):
    given = Prepared()
    assert given.enter(name) == 0
    want = {"out": given.out.clone(), "lse": given.lse.clone()}
    given.calls[0].threads = 2**31 - 1
    assert given.enter(name) == 0
    same_bits({"out": given.out, "lse": given.lse}, want)


def test_tensors_that_begin_amid_an_item_are_copied():
    """As torch makes them of a buffer or of a mapped file."""

    def amid_an_item(x):
        memory = torch.empty(x.nbytes + 1, dtype=torch.uint8)
        there = torch.frombuffer(memory.numpy(), dtype=x.dtype, offset=1).view(x.shape)
        return there.copy_(x)

    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 70, 16, generator=g)
    bias, sink = torch.randn(1, 2, 70, generator=g), torch.randn(2, generator=g)
    mask = torch.rand(1, 2, 70, 70, generator=g) < 0.5
    plan = sf.Plan.from_mask(mask, tile=16)
    given = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.init}
    moved = {n: amid_an_item(x) for n, x in given.items() if isinstance(x, torch.Tensor) and x.numel()}
    other_plan = dataclasses.replace(plan, **moved)
    for op in (sf.attention, sf.decode):
        want = op(q, k, v, plan, key_bias=bias, sink_logits=sink, backend="cpu")
        other = [amid_an_item(x) for x in (q, k, v, bias, sink)]
        assert all(x.data_ptr() % 4 == 1 for x in other)
        got = op(*other[:3], other_plan, key_bias=other[3], sink_logits=other[4], backend="cpu")
        assert torch.equal(got, want)
    out, lse = sf.attention(q, k, v, plan, return_lse=True, backend="cpu")
    results = (torch.randn(out.shape, generator=g), q, k, v, out, lse)
    want = sf.attention_backward(*results, plan, dlse=lse, backend="cpu")
    got = sf.attention_backward(*map(amid_an_item, results), plan, dlse=amid_an_item(lse), backend="cpu")
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)


def test_plan_tensors_of_another_dtype_or_shape_are_refused():
    """A plan put together behind the constructor's back: sizes come from the tensors, never from trust."""
    plan = sf.Plan.from_mask(torch.rand(1, 1, 70, 70) < 0.5)
    q = torch.randn(1, 1, 70, 16)

    def attend(**fields):
        other = object.__new__(sf.Plan)
        for name, value in {**vars(plan), **fields}.items():
            object.__setattr__(other, name, value)
        return cpu.forward(
            q, q, q, other, Softmax(0.25, 0.0), key_bias=None, out_dtype=torch.float32, normed=False
        )

    attend()
    for fields in (
        {"start": plan.start.int()},
        {"count": plan.count.long()},
        {"index": plan.index.long()},
        {"index": plan.index.to(torch.int8)},
        {"bits": plan.bits.to(torch.uint8)},
        {"count": plan.count[..., :-1]},
        {"q_seg": torch.zeros(1, 1, 69, dtype=torch.int32)},
    ):
        with pytest.raises((ValueError, TypeError), match="plan"):
            attend(**fields)
    with (
        torch.no_grad()
    ):  # fewer words than the tile has rows: the rest of the units has no bits, and is not read
        attend(bits=plan.bits[:, :1])


# ---------------------------------------------------------------- memory that moves


def shared(plan):
    for x in plan.tensors().values():
        x.share_memory_()


def set_anew(plan):
    for x in plan.tensors().values():
        x.set_(x.clone())


def given_other_data(plan):
    for x in plan.tensors().values():
        x.data = x.clone()


def resized_twice(plan):
    for x in plan.tensors().values():
        values, shape = x.clone(), x.shape
        x.resize_(100 * x.numel() + 100_000)
        x.resize_(shape).copy_(values)


@pytest.mark.parametrize("move", [shared, set_anew, given_other_data, resized_twice])
@pytest.mark.parametrize("kind", ["dense", "buckets"])
def test_a_plan_whose_tensors_got_other_memory_is_read_where_they_lie_now(kind, move):
    example = plans.example(3, kind, batch=2, heads=4, Tq=130, Tk=130)
    plan, g = example.plan, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, T, 16, generator=g) for T in (plan.Tq, plan.Tk, plan.Tk))
    q.requires_grad_()

    def results():
        out = sf.attention(q, k, v, plan, backend="cpu")
        return [out, *torch.autograd.grad(out.sum(), q), sf.decode(q.detach(), k, v, plan, backend="cpu")]

    want = results()
    old = [x.untyped_storage() for x in plan.tensors().values()]
    move(plan)
    new = {x.untyped_storage().data_ptr() for x in plan.tensors().values()}
    for x in old:  # what lay there is gone
        if x.data_ptr() not in new:
            torch.tensor([], dtype=torch.uint8).set_(x).fill_(0x55)
    assert all(torch.equal(a, b) for a, b in zip(want, results(), strict=True))


def test_what_prepare_derived_is_left_behind_when_the_plan_is_edited():
    plan = sf.Plan.from_blocks(torch.eye(4, dtype=torch.bool)[None, None], Tq=256, Tk=256, tile=64, unit=64)
    ready = plan.prepare()
    assert ready.current() is ready
    ready.index.copy_(torch.tensor([3, 2, 1, 0]))
    fresh = ready.current()
    assert fresh.unit_keys is None and torch.equal(fresh.index, ready.index)
    assert torch.equal(fresh.prepare().unit_keys.index, torch.tensor([3, 2, 1, 0]).int())
    moved = plan.prepare()
    moved.count.set_(moved.count.clone())
    assert moved.current().unit_keys is None
