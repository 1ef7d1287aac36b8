"""Keys and values in a file: the same numbers, few bytes read, and nothing lost where the disk is full."""

from __future__ import annotations

import copy
import errno
import mmap
import os
import subprocess
import sys
import time

import pytest
import torch

import sparseflash as sf
from sparseflash.cache import Growing, Offload, Offloaded, offloaded

PAGE = mmap.PAGESIZE


@pytest.fixture
def cache(tmp_path):
    return Offloaded(Offload(tmp_path, capacity=5000))


def drawn(generator, n, B=2, H=2, D=64, dtype=torch.float32):
    return torch.randn(2, B, H, n, D, generator=generator).to(dtype).unbind(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_and_forgets_what_a_layer_in_memory_does(tmp_path, dtype, generator):
    cache, twin = Offloaded(Offload(tmp_path, capacity=400)), Growing()

    def same():
        assert cache.tokens == twin.tokens
        assert torch.equal(cache.keys, twin.keys) and torch.equal(cache.values, twin.values)
        bounds = sf.cache.PageBounds(16)
        assert torch.equal(cache.summary(bounds), twin.summary(bounds))
        q = torch.randn(len(twin.keys), 4, 1, 40, generator=generator).to(dtype)
        outs = [sf.decode(q, x.keys, x.values, x.plan()) for x in (cache, twin)]
        assert torch.equal(*outs)

    for n in (100, 1, 1, 37, 1):
        k, v = drawn(generator, n, D=40, dtype=dtype)
        for x in (cache, twin):
            x.append(k, v[..., :33])
        same()
    for step in (
        lambda x: x.crop(-9),
        lambda x: x.select_rows(torch.tensor([1, 0, 1])),
        lambda x: x.crop(50),
    ):
        step(cache), step(twin)
        same()
    cache, other = copy.deepcopy(cache), cache
    k, v = drawn(generator, 5, B=3, D=40, dtype=dtype)
    cache.append(k, v[..., :33]), twin.append(k, v[..., :33])
    same()
    assert other.tokens == 50 and not list(tmp_path.iterdir())  # files have no names
    assert cache.on_disk == 3 * 2 * 55 * 73 * dtype.itemsize and cache.bytes < cache.on_disk
    cache.reset()
    assert cache.tokens == 0 and not cache.is_initialized


def test_what_a_method_chooses_is_read_and_nothing_else(cache, generator):
    """Bytes by hand: pages of 64 tokens of 512 bytes are whole pages of memory."""
    cache.append(*drawn(generator, 4096))
    q = torch.randn(2, 4, 1, 64, generator=generator)
    method = sf.methods.Quest(budget=256, page=64)
    plan = method.select(q, cache.keys, {"cache": cache, "q_offset": 4095}).plan
    cache.drop()
    cache.expect(plan)
    assert cache.reads.bytes == 2 * 2 * 4 * 64 * 512 and cache.reads.there == 0
    want = sf.decode(q, *(x.clone() for x in (cache.keys, cache.values)), plan)
    assert torch.equal(sf.decode(q, cache.keys, cache.values, plan), want)
    cache.expect(plan)
    assert cache.reads.there == cache.reads.bytes // 2  # the second time it was there


@pytest.mark.parametrize("kind", ["spans", "keys of query heads", "one list for all"])
def test_stretches_of_the_file_are_those_of_the_keys_that_plans_list(kind, tmp_path, generator):
    cache = Offloaded(Offload(tmp_path, capacity=1000))
    cache.append(*drawn(generator, 900, D=40))
    row = 80 * 4
    if kind == "spans":
        spans = torch.tensor([[10, 40], [300, 900]]).view(1, 1, 1, 2, 2)
        plan = sf.Plan.from_spans(spans, Tq=1, Tk=900, tile=1)
    elif kind == "one list for all":
        plan = sf.Plan.from_keys(torch.tensor([3, 500]).view(1, 1, 1, 2), Tq=1, Tk=900, tile=1, unit=1)
    else:
        own = torch.randint(0, 56, (2, 4, 1, 3), generator=generator)
        plan = sf.Plan.from_keys(own, Tq=1, Tk=900, tile=1, unit=16)
    mask = plan.to_dense().expand(2, -1, -1, -1)
    mask = mask.unflatten(1, (-1, mask.shape[1] // 2 or 1)).any(2) if mask.shape[1] > 1 else mask
    mask = mask.expand(-1, 2, -1, -1)
    wanted = set()
    for b, h, _, j in mask.nonzero().tolist():
        begin = (b * 2 + h) * -(-1000 * row // PAGE) * PAGE + j * row
        wanted |= {begin // PAGE, (begin + row - 1) // PAGE}
    runs = cache._file.runs([plan], 900)
    assert {n for a, b in runs for n in range(a // PAGE, b // PAGE)} == wanted
    assert all(b < a for (_, b), (a, _) in zip(runs, runs[1:]))  # apart, in order


def test_the_next_layer_begins_to_read_what_it_read_before(tmp_path, generator):
    last = Offloaded(Offload(tmp_path))
    first = Offloaded(Offload(tmp_path), following=last)
    plan = sf.Plan.from_keys(torch.tensor([1, 9]).view(1, 1, 1, 2), Tq=1, Tk=2000, tile=1, unit=64)
    for layer in (first, last):
        layer.append(*drawn(generator, 2000))
        layer.drop()
        layer.expect(plan)
        layer.drop()
    first.expect(plan)
    for _ in range(200):  # the disk takes its time
        time.sleep(0.01)
        if last._file.there(last._last):
            break
    time.sleep(0.1)
    last.expect(plan)
    assert last.reads.there == last.reads.bytes // 2


def test_past_its_capacity_nothing_is_dropped(tmp_path, generator):
    cache = Offloaded(Offload(tmp_path, capacity=10))
    k, v = drawn(generator, 10)
    cache.append(k, v)
    with pytest.raises(sf.SparseFlashError, match="11 tokens in a file with capacity=10: nothing was app"):
        cache.append(k[:, :, :1], v[:, :, :1])
    assert cache.tokens == 10 and torch.equal(cache.keys, k)


@pytest.fixture
def full_disk(monkeypatch):
    """Calls that put something into the disk: after so many more there is no space left."""
    plain, left = os.pwrite, [10**9]

    def pwrite(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*given)

    monkeypatch.setattr(offloaded.os, "pwrite", pwrite)
    return left


def test_on_a_full_disk_it_goes_on_in_memory(cache, generator, full_disk):
    k, v = drawn(generator, 100)
    cache.append(k[:, :, :90], v[:, :, :90])
    full_disk[0] = 3
    with pytest.warns(UserWarning, match="No space left on device at 100 tokens: this layer goes on in mem"):
        cache.append(k[:, :, 90:], v[:, :, 90:])
    assert cache.tokens == 100 and torch.equal(cache.keys, k) and torch.equal(cache.values, v)
    assert cache.on_disk == 0 and cache.bytes >= 2 * k.nbytes
    cache.append(k[:, :, :1], v[:, :, :1])
    cache.expect(cache.plan())
    assert cache.tokens == 101


def test_beams_on_a_full_disk_lose_nothing(cache, generator, full_disk):
    k, v = drawn(generator, 100)
    cache.append(k, v)
    full_disk[0] = 2
    with pytest.warns(UserWarning, match="goes on in memory"):
        cache.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.keys, k[[1, 1, 0]]) and torch.equal(cache.values, v[[1, 1, 0]])


def test_what_cannot_be_is_said_at_once(tmp_path, generator):
    k, v = drawn(generator, 4)
    with pytest.raises(sf.SparseFlashError, match="No such file or directory; expected a folder that can be"):
        Offloaded(Offload(tmp_path / "none")).append(k, v)
    with pytest.raises(sf.SparseFlashError, match="capacity=0: expected an int >= 1"):
        Offload(tmp_path, capacity=0)
    with pytest.raises(sf.SparseFlashError, match="expected cache.Offload"):
        Offloaded(tmp_path)
    with pytest.raises(sf.SparseFlashError, match="no gradients"):
        Offloaded(Offload(tmp_path)).append(k.requires_grad_(), v)


LIMITED = """
import resource, sys, torch, sparseflash as sf
q = torch.randn(1, 4, 1, 64)
sf.decode(q, q[:, :2], q[:, :2])  # kernels are loaded
cache = sf.cache.Offloaded(sf.cache.Offload(sys.argv[1])) if sys.argv[2] == "file" else sf.cache.Growing()
held = int(next(x for x in open("/proc/self/status") if x.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (48 << 20),) * 2)
method = sf.methods.Quest(budget=1024, page=64)
for _ in range(64):
    cache.append(*torch.randn(2, 1, 2, 1024, 64))
    plan = method.select(q, cache.keys, {"cache": cache, "q_offset": cache.tokens - 1}).plan
    cache.expect(plan)
    sf.decode(q, cache.keys, cache.values, plan)
print(cache.on_disk >> 20, cache.bytes >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_cache_larger_than_the_memory_of_the_process(tmp_path, where):
    """64 MiB of keys and values with 48 MiB to spare: not in memory."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), where], capture_output=True, text=True, env=os.environ
    )
    if where == "memory":
        assert done.returncode and "alloc" in done.stderr.lower()
    else:
        assert done.stdout.split() == ["64", "1"] and not done.returncode, done.stderr
