"""Records: what is stored of a row, and decoding on it against the rows that it stands for."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
import tolerance
from sparseflash import SparseFlashError
from sparseflash.backends import cpu
from sparseflash.backends.records import Form, Records, pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [(0.7, False), (0.5, False), (0.0, False), (0.0, True), (0.7, True), (0.99, False)]
NATIVE = pytest.mark.skipif(not cpu.status()[0], reason="the native library is not available here")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 40, 64, 80, 129])
def test_the_largest_items_stay_as_they_are_and_bytes_are_what_they_take(D, dtype, generator):
    x = torch.randn(2, 3, 50, D, generator=generator).to(dtype)
    x[0, 0, 0] = 0.5  # of equal ones the first
    for sparsity in (0.0, 0.3, 0.7):
        made = pack(x, sparsity=sparsity)
        n = D - int(sparsity * D)
        order = x.abs().double().argsort(dim=-1, descending=True, stable=True)[..., :n]
        want = torch.zeros_like(x).scatter(-1, order, x.gather(-1, order))
        assert torch.equal(made.unpack(), want) and made.shape == x.shape
        bits = -(-D // 64) * 8 if n < D else 0
        assert made.nbytes == x[..., 0].numel() * (-(-(bits + n * dtype.itemsize) // 4) * 4)
    assert torch.equal(pack(x)[3:9].unpack(), x[:, :, 3:9])
    one = x[:, :, :1].expand(-1, -1, 4, -1).transpose(2, 3).contiguous().transpose(2, 3)[:, :, :1]
    assert torch.equal(pack(one).unpack(), one) and pack(one, int8=True).shape == one.shape


def test_integers_are_the_nearest_of_their_scale(generator):
    x = torch.randn(2, 2, 30, 64, generator=generator)
    x[0, 0, 3] = 0
    for sparsity in (0.0, 0.7):
        got, whole = pack(x, sparsity=sparsity, int8=True), pack(x, sparsity=sparsity).unpack()
        step = whole.abs().amax(-1, keepdim=True) / 127
        assert bool(((got.unpack() - whole).abs() <= step * 0.5001).all())
    assert pack(x, int8=True).nbytes == x[..., 0].numel() * 68
    assert pack(x, sparsity=0.7).nbytes <= 0.45 * x.nbytes


def drawn(generator, D=64, Dv=64, T=300, dtype=torch.float32, heads=(6, 2), Tq=1):
    q = torch.randn(2, heads[0], Tq, D, generator=generator).to(dtype)
    return q, *(torch.randn(2, heads[1], T, d, generator=generator).to(dtype) for d in (D, Dv))


def plans(T, Tq, generator):
    index = torch.rand(2, 6, Tq, T, generator=generator).topk(T // 3).indices
    return {
        "all": sf.Plan.dense(Tq, T, causal=True, q_offset=T - Tq),
        "chosen": sf.Plan.from_keys(index, Tq=Tq, Tk=T),
        "padded": sf.Plan.from_lengths(torch.tensor([T // 2, 0]), Tk=T, Tq=Tq),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, Dv, T, Tq", [(64, 64, 300, 1), (40, 80, 129, 3), (129, 17, 63, 1), (16, 576, 65, 2)]
)
def test_decoding_on_records_is_decoding_on_the_rows_they_stand_for(D, Dv, T, Tq, dtype, generator):
    q, k, v = drawn(generator, D, Dv, T, dtype, Tq=Tq)
    sinks = torch.randn(6, generator=generator)
    for (sparsity, int8), (name, plan) in zip(FORMS, [*plans(T, Tq, generator).items()] * 2):
        keys, values = (pack(x, sparsity=sparsity, int8=int8) for x in (k, v))
        options = {"softcap": 5.0, "sink_logits": sinks} if name == "chosen" else {}
        got = dict(zip(("out", "lse"), sf.decode(q, keys, values, plan, return_lse=True, **options)))
        tolerance.compare(got, q, keys.unpack(), values.unpack(), plan.to_dense(), note=name, **options)


def test_records_go_with_sharing_strides_and_threads(generator):
    q, k, v = drawn(generator, T=700)
    keys, values = pack(k, sparsity=0.6), pack(v, int8=True)
    want = sf.decode(q, keys, values)
    room = torch.zeros(2, 2, 900, keys.data.shape[3], dtype=torch.uint8)
    room[:, :, :700] = keys.data
    assert torch.equal(sf.decode(q, Records(room, keys.form, keys.dtype)[:700], values), want)
    by_token = keys.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sf.decode(q, Records(by_token, keys.form, keys.dtype), values), want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(sf.decode(q, keys, values), want)
    finally:
        torch.set_num_threads(threads)
    pool = [Records(x.data[:1], x.form, x.dtype) for x in (keys, values)]
    torch.testing.assert_close(sf.decode(q, *pool)[0], want[0])


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [40, 64, 128])
def test_bits_that_lie_do_not_lead_out_of_the_record(D, dtype, generator):
    """More bits than items in every third row: what those beyond the last item say is 0."""
    q, k, v = drawn(generator, D=D, Dv=D, T=65, dtype=dtype)
    keys, values = pack(k, sparsity=0.7), pack(v, sparsity=0.7)
    rows, bits = keys.unpack(), -(-D // 64) * 8
    keys.data[:, :, ::3, :bits] = 255
    size = dtype.itemsize * keys.form.kept
    first = keys.data[:, :, ::3, bits : bits + size].contiguous().view(dtype)
    rows[:, :, ::3] = torch.nn.functional.pad(first, (0, D - keys.form.kept))
    want = sf.decode(q, rows, values.unpack())
    torch.testing.assert_close(sf.decode(q, keys, values), want)


def test_it_is_an_op_of_pytorch(generator):
    q, k, v = drawn(generator, T=40)
    keys, values = pack(k, sparsity=0.5), pack(v, int8=True)
    plan = sf.Plan.dense(1, 40)
    run = torch.compile(
        lambda q, a, b: sf.decode(q, Records(a, keys.form, k.dtype), Records(b, values.form, v.dtype), plan),
        fullgraph=True,
    )
    assert torch.equal(run(q, keys.data, values.data), sf.decode(q, keys, values, plan))


Q, NINE = torch.zeros(1, 1, 1, 4), pack(torch.zeros(1, 1, 9, 4))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: pack(torch.zeros(2, 3)), "expected fp32, bf16 or fp16"),
        (lambda: pack(torch.zeros(1, 1, 1, 4, dtype=torch.float64)), "expected fp32"),
        (lambda: pack(torch.zeros(1, 1, 1, 4), sparsity=1.0), "sparsity=1.0"),
        (lambda: pack(torch.zeros(1, 1, 1, 4), int8=1), "int8=1"),
        (
            lambda: sf.decode(
                torch.zeros(1, 1, 1, 4), pack(torch.zeros(1, 1, 9, 4)), torch.zeros(1, 1, 9, 4)
            ),
            "records of both",
        ),
        (lambda: sf.decode(torch.zeros(1, 1, 1, 8), *[pack(torch.zeros(1, 1, 9, 4))] * 2), "head dimension"),
        (lambda: sf.decode(torch.zeros(1, 1, 1, 4).half(), *[pack(torch.zeros(1, 1, 9, 4))] * 2), "dtype"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, said):
    with pytest.raises(SparseFlashError, match=said):
        wrong()


@NATIVE
def test_the_c_entry_refuses_records_that_do_not_hold_what_they_say():
    from sparseflash.backends.cpu.library import run as enter

    q, k = torch.zeros(1, 1, 1, 64), pack(torch.zeros(1, 1, 9, 64), sparsity=0.5)
    plan = sf.Plan.dense(1, 9)
    seen = []

    def spoiled(**changes):
        def run(name, call, dtype):
            for field, value in changes.items():
                setattr(call.calls[0].k_record, field, value)
            if "lane" in changes:
                call.calls[0].k.lane = 2
            seen.append(name)
            enter(name, call, dtype)

        return run

    lies = {"bytes": (8, -1, 2**20), "kept": (0, 65, 33), "item": (1, 4), "lane": (2,)}
    for changes in ({name: value} for name, values in lies.items() for value in values):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "run", spoiled(**changes))
            with pytest.raises(ValueError, match="does not fit"):
                sf.decode(q, k, k, plan)
    assert len(seen) == 9 and Form(64, 32, False).bytes(torch.float32) == 136
