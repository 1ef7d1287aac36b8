"""Precision, determinism and memory; and that the tolerance itself can fail."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import sparseflash as sf
import tolerance
from harness import EACH, EVERY, FAST, MAIN, inputs, peak_memory, randn, run, same_bits
from sparseflash import Plan

CAUSAL = Plan.dense(129, 129, causal=True)


def _result(generator, dtype, **options):
    q, k, v, dout, dlse = inputs(generator, 129, D=64, dtype=dtype)
    got = run(q, k, v, CAUSAL, backend="reference", dout=dout, dlse=dlse, **options)
    return got, lambda got: tolerance.compare(
        got, q, k, v, CAUSAL.to_dense(), dout=dout, dlse=dlse, **options
    )


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_the_tolerance_refuses_an_error_of_a_few_roundings_in_one_element(dtype, name, generator):
    got, judge = _result(generator, dtype)
    judge(got)
    wrong = got[name].clone()
    wrong.view(-1)[-5] += 64 * torch.finfo(dtype).eps * wrong.abs().max()
    with pytest.raises(AssertionError, match=name):
        judge({**got, name: wrong})


@pytest.mark.parametrize("dtype", FAST)
def test_the_tolerance_refuses_one_key_too_many_or_too_few(dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 129, D=64, dtype=dtype)
    mask = CAUSAL.to_dense().clone()
    mask[..., 60, 20] = False
    got = run(q, k, v, CAUSAL, backend="reference", dout=dout, dlse=dlse)
    with pytest.raises(AssertionError, match="out"):
        tolerance.compare({"out": got["out"]}, q, k, v, mask)
    with pytest.raises(AssertionError, match="dq"):
        tolerance.compare({"dq": got["dq"]}, q, k, v, mask, dout=dout, dlse=dlse)


def test_the_tolerance_refuses_nan_and_a_gradient_where_nothing_is_seen(generator):
    q, k, v, dout, _ = inputs(generator, 33)
    mask = torch.ones(1, 1, 33, 33, dtype=torch.bool)
    mask[..., 4, :] = False
    got = run(q, k, v, Plan.from_mask(mask), backend="reference", dout=dout)
    tolerance.compare(got, q, k, v, mask, dout=dout)
    for name, value in (("out", math.nan), ("dq", 1e-30), ("lse", -1e30)):
        wrong = got[name].clone()
        wrong[:, :, 4] = value
        with pytest.raises(AssertionError, match=name):
            tolerance.compare({name: wrong}, q, k, v, mask, dout=dout)


@EVERY
def test_large_and_small_logits_neither_overflow_nor_vanish(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, 129, D=64, dtype=dtype)
    for factor in (1e-3, 30.0):
        big = q * factor
        got = run(big, k, v, CAUSAL, backend=backend, dout=dout, dlse=dlse)
        tolerance.compare(got, big, k, v, CAUSAL.to_dense(), dout=dout, dlse=dlse, note=f"q * {factor}")


@EVERY
@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_logits_far_from_zero_only_move_lse(backend, dtype, shift, generator):
    q, k, v, dout, dlse = inputs(generator, 129, dtype=dtype)
    bias = torch.full((1, 1, 129), shift)
    got = run(q, k, v, CAUSAL, backend=backend, dout=dout, dlse=dlse, key_bias=bias)
    tolerance.compare(got, q, k, v, CAUSAL.to_dense(), dout=dout, dlse=dlse, key_bias=bias)


@EVERY
@pytest.mark.parametrize("Tq, Tk", [(3, 4097), (4097, 3)], ids=["rows", "columns"])
def test_long_sums_are_made_in_high_precision(backend, dtype, Tq, Tk, generator):
    q, k, v, dout, dlse = inputs(generator, Tq, Tk, B=1, H=2, Hkv=1, dtype=dtype)
    got = run(q, k, v, Plan.dense(Tq, Tk), backend=backend, dout=dout, dlse=dlse)
    mask = torch.ones(1, 1, Tq, Tk, dtype=torch.bool)
    tolerance.compare(got, q, k, v, mask, dout=dout, dlse=dlse)


@MAIN
def test_thirty_runs_give_the_same_bits_forward_and_backward(backend, dtype, generator):
    T, runs = (
        200,
        3 if backend == "reference" else 30,
    )  # one thread walks the tiles of the reference, in order
    q, k, v, dout, dlse = inputs(generator, T, B=1, dtype=dtype)
    bucket = torch.randint(0, 3, (1, 4, T), generator=generator)
    bias, sink = randn(generator, 1, 2, T), randn(generator, 4)
    for plan in (Plan.dense(T, T, causal=True), Plan.from_buckets(bucket, bucket)):
        first = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, key_bias=bias, sink_logits=sink)
        for _ in range(runs - 1):
            again = run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse, key_bias=bias, sink_logits=sink)
            same_bits(again, first)


@EACH
def test_the_number_of_threads_does_not_change_a_bit_of_the_forward(backend, generator):
    T = 300
    q, k, v, dout, dlse = inputs(generator, T)
    plan = Plan.dense(T, T, causal=True)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(run(q, k, v, plan, backend=backend, dout=dout, dlse=dlse))
            tolerance.compare(found[-1], q, k, v, plan.to_dense(), dout=dout, dlse=dlse)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same_bits(other, found[0], "out lse")


@EACH
def test_calls_from_several_threads_at_once_do_not_disturb_one_another(backend, generator):
    T = 200
    q, k, v, dout, dlse = inputs(generator, T)
    lengths = (3, 17, 64, 199)
    made = [Plan.dense(T, T, causal=True, window=(n, 0)) for n in lengths]
    want = [run(q, k, v, p, backend=backend, dout=dout, dlse=dlse) for p in made]
    got = [None] * len(made)

    def work(n):
        for _ in range(5):
            got[n] = run(q, k, v, made[n], backend=backend, dout=dout, dlse=dlse)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(made))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(got, want, strict=True):
        same_bits(a, b)


@MAIN
def test_prepared_plans_give_the_same_bits(backend, dtype, generator):
    T = 300
    q, k, v, dout, dlse = inputs(generator, T, dtype=dtype)
    mask = torch.rand(1, 2, T, T, generator=generator) < 0.02
    bucket = torch.randint(0, 3, (1, 4, T), generator=generator)
    for plan in (Plan.from_mask(mask, unit=16), Plan.from_buckets(bucket, bucket)):
        want, got = (run(q, k, v, p, backend=backend, dout=dout, dlse=dlse) for p in (plan, plan.prepare()))
        same_bits(got, want)


def test_the_peak_of_memory_is_seen_even_where_there_is_free_memory():
    size = 24 << 20  # small enough that the C library may keep it when it is free
    for _ in range(3):
        assert 0.9 * size < peak_memory(lambda: torch.ones(size // 4).sum()) < 1.5 * size


@EACH
def test_memory_stays_far_below_one_score_matrix(backend):
    T = 8192
    q, k, v = (torch.randn(1, 1, T, 16, requires_grad=True) for _ in range(3))

    def step(T):
        out = sf.attention(q[:, :, :T], k[:, :, :T], v[:, :, :T], causal=True, backend=backend)
        out.sum().backward()

    step(512)
    extra = peak_memory(lambda: step(T))
    assert extra < T * T * 4 / 3, (
        f"{extra / 2**20:.0f} MiB more at T = {T}; a score matrix has {T * T * 4 / 2**20:.0f}"
    )
