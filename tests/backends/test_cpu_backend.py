"""The native backend among threads, forks and signals; what repeats bit for bit; memory and odd tensors."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import cpu_cases
import harness
import sparseflash as sf
from harness import peak_memory
from sparseflash.backends import cpu
from sparseflash.backends.numerics import Softmax

pytestmark = pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(generator, B=1, Hq=2, Hkv=2, T=512, D=64, dtype=torch.float32):
    """Tensors large enough that several threads share the work."""
    return harness.inputs(generator, T, B=B, H=Hq, Hkv=Hkv, D=D, dtype=dtype)[:4]


def everything(q, k, v, dout, plan, key_bias=None, **options):
    """Out, lse and gradients, by the native backend."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if key_bias is not None:
        leaves.append(key_bias.detach().requires_grad_())
        options["key_bias"] = leaves[-1]
    out, lse = sf.attention(*leaves[:3], plan, return_lse=True, backend="cpu", **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def same(a, b) -> bool:
    """Bit for bit, without threads of torch's: those hang in a forked child."""
    return all(
        x.view(torch.uint8).numpy().tobytes() == y.view(torch.uint8).numpy().tobytes() for x, y in zip(a, b)
    )


def keep_plan(g, T, heads=2):
    keep = torch.rand(2, 1, heads, T, generator=g) < 0.5
    return sf.Plan.from_keep(keep[0], keep[1])


REPEATED = {
    "heads 4": ({"Hq": 4, "Hkv": 4}, lambda g: sf.Plan.dense(512, 512, causal=True)),
    "gqa 8/1": ({"Hq": 8, "Hkv": 1}, lambda g: sf.Plan.dense(512, 512, causal=True, window=(100, 0))),
    "one head, so its keys are split": (
        {"Hq": 1, "Hkv": 1, "T": 2048},
        lambda g: sf.Plan.dense(2048, 2048, causal=True),
    ),
    "keep, gqa": ({"Hq": 4, "Hkv": 2}, lambda g: keep_plan(g, 512, 4)),
    "buckets": (
        {},
        lambda g: sf.Plan.from_buckets(*torch.randint(0, 4, (2, 1, 2, 512), generator=g)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REPEATED)
def test_results_repeat_bit_for_bit(name, dtype, generator, threads):
    shape, make = REPEATED[name]
    given = inputs(generator, dtype=dtype, **shape)
    plan = make(generator)
    bias = torch.randn(1, given[0].shape[1], plan.Tk, generator=generator)
    threads(2)
    first = everything(*given, plan, bias)
    for _ in range(29):
        assert same(first, everything(*given, plan, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REPEATED)
def test_the_forward_does_not_depend_on_the_number_of_threads(name, dtype, generator, threads):
    """The backward sums shares whose number does: it repeats for the same number of threads, see above."""
    shape, make = REPEATED[name]
    q, k, v, _ = inputs(generator, dtype=dtype, **shape)
    plan = make(generator)
    results = []
    for n in (1, 2, 5, 1):
        threads(n)
        results.append(sf.attention(q, k, v, plan, return_lse=True, backend="cpu"))
    assert all(same(results[0], x) for x in results[1:])


def test_the_backward_of_many_heads_does_not_depend_on_the_number_of_threads(generator, threads):
    """Where the heads alone keep the threads busy, no head is split: nothing is summed in another order."""
    given = inputs(generator, Hq=8, Hkv=8)
    plan = sf.Plan.dense(512, 512, causal=True)
    results = []
    for n in (1, 2, 4):
        threads(n)
        results.append(everything(*given, plan))
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_more_threads_than_cores_and_changes_between_calls(generator, threads):
    given = inputs(generator, Hq=3, Hkv=1, T=700)
    plan = sf.Plan.dense(700, 700, causal=True)
    threads(1)
    want = everything(*given, plan)
    for n in (16, 2, 33, 1, 7, 16):
        threads(n)
        for a, b in zip(want, everything(*given, plan), strict=True):
            torch.testing.assert_close(a, b)


def test_several_python_threads_at_once(generator, threads):
    """Each gets its own result, whatever the others do meanwhile."""
    threads(2)
    jobs = []
    for n in range(6):
        T = 300 + 100 * n
        given = inputs(generator, Hq=2, Hkv=1, T=T, dtype=DTYPES[n % 3])
        plan = sf.Plan.dense(T, T, causal=True, window=(64 * n + 1, 0))
        jobs.append((given, plan, everything(*given, plan)))

    def work(n):
        given, plan, want = jobs[n % len(jobs)]
        return all(same(want, everything(*given, plan)) for _ in range(8))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(12), timeout=100))


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc here")
def test_native_code_runs_on_the_threads_of_torch(generator, threads):
    """A second set would wait for the cores that torch's threads keep busy after their last work."""
    threads(11)
    x = torch.ones(1 << 20)
    x += x  # torch has its threads now
    before = len(os.listdir("/proc/self/task"))
    given = inputs(generator, T=2048)
    everything(*given, sf.Plan.dense(2048, 2048, causal=True))
    assert len(os.listdir("/proc/self/task")) <= before  # threads of earlier tests may have ended meanwhile
    assert before >= 11


# ---------------------------------------------------------------- forks and signals

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def in_child(work, limit=60.0) -> int:
    """Exit code of a forked child that runs work(); -1 where it does not end in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@needs_fork
def test_a_forked_child_computes(generator, threads):
    """Also the child of a child, and the parent afterwards. torch's own threads do not survive a fork."""
    threads(2)
    q, k, v, dout = inputs(generator)
    plan = sf.Plan.dense(512, 512, causal=True)

    def work():
        out, lse, norm = cpu.forward(
            q, k, v, plan, Softmax(0.125, 0.0), key_bias=None, out_dtype=torch.float32, normed=True
        )
        grads = cpu.backward(
            dout,
            q,
            k,
            v,
            out,
            norm,
            None,
            plan,
            Softmax(0.125, 0.0),
            key_bias=None,
            grad_dtype=None,
        )
        return [out, lse, *grads[:3]]

    want = work()
    assert in_child(lambda: same(want, work()) and in_child(lambda: same(want, work())) == 0) == 0
    assert same(want, work())


@needs_fork
def test_a_fork_while_other_threads_compute(generator, threads):
    threads(2)
    q, k, v, _ = inputs(generator)
    plan = sf.Plan.dense(512, 512, causal=True)

    def work():
        how = {"options": Softmax(0.125, 0.0), "key_bias": None, "out_dtype": torch.float32}
        return cpu.forward(q, k, v, plan, **how, normed=False)[:2]

    want, stop = work(), threading.Event()

    def busy():
        while not stop.is_set():
            work()

    others = [threading.Thread(target=busy) for _ in range(2)]
    for x in others:
        x.start()
    try:
        assert [in_child(lambda: same(want, work())) for _ in range(10)] == [0] * 10
    finally:
        stop.set()
        for x in others:
            x.join()


class Slices(torch.utils.data.Dataset):
    """Items that are attention's results."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i : i + 1]
        return sf.attention(x, x, x, causal=True, backend="cpu")[0]


@needs_fork
def test_data_loader_workers_compute(generator, threads):
    threads(2)
    data = Slices(torch.randn(6, 2, 400, 64, generator=generator))
    want = torch.stack([data[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    torch.testing.assert_close(torch.cat(list(loader)), want)


def test_ctrl_c_arrives_after_a_native_call_and_harms_nothing(generator, threads):
    threads(2)
    T = 6000
    q, k, v, _ = inputs(generator, Hq=4, Hkv=4, T=T)
    plan = sf.Plan.dense(T, T)
    sf.attention(q[:, :, :64], k, v, sf.Plan.dense(64, T), backend="cpu")
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            sf.attention(q, k, v, plan, backend="cpu")
    timer.join()
    small = everything(*inputs(generator), sf.Plan.dense(512, 512, causal=True))
    assert all(x.isfinite().all() for x in small)


# ---------------------------------------------------------------- odd tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_formats_round_like_torch(dtype):
    """Every pair of neighbouring finite values: their mean, rounded once, bit for bit."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.abs() < torch.finfo(dtype).max / 4)]
    if dtype == torch.bfloat16:  # the processor's bf16 products take subnormal numbers as zero
        x = x[x.abs() >= torch.finfo(dtype).smallest_normal]
    x = x[: len(x) // 128 * 128].view(1, 1, -1, 64)
    T = x.shape[2]
    q = torch.zeros(1, 1, T // 2, 64, dtype=dtype)
    at = torch.arange(T // 2)
    spans = torch.stack([2 * at, 2 * at + 2], 1).to(torch.int32)
    one = torch.ones(1, 1, T // 2, dtype=torch.int32)
    plan = sf.Plan(
        T // 2, T, tile=1, span_start=at.view(1, 1, -1), span_full=one, span_count=one, spans=spans
    )
    out = sf.attention(q, x, x, plan, backend="cpu")
    pair = x.view(1, 1, T // 2, 2, 64).float()
    want = ((pair[..., 0, :] + pair[..., 1, :]) * 0.5).to(dtype)
    assert torch.equal(out + 0.0, want + 0.0)


@pytest.mark.parametrize("D", [1, 2, 15, 16, 33, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimensions_from_end_to_end(D, dtype):
    cpu_cases.check(
        cpu_cases.case(D, kind="dense", Tq=70, Tk=70, D=D, Dv=257 - D, dtype=dtype, B=1, heads=(2, 1))
    )


@pytest.mark.parametrize(("B", "Tq", "Tk"), [(0, 5, 5), (1, 0, 5), (1, 5, 0), (0, 0, 0), (2, 0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_at_all(B, Tq, Tk, dtype):
    q, dout = torch.randn(2, B, 4, Tq, 16).to(dtype)
    k, v = torch.randn(2, B, 2, Tk, 16).to(dtype)
    with cpu_cases.poisoned():
        out, lse, dq, dk, dv = everything(q, k, v, dout, sf.Plan.dense(Tq, Tk))
    for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
        assert x.shape == like.shape and not x.any()
    assert bool((lse == -torch.inf).all())


def test_a_cache_with_far_strides_is_read_in_place(generator):
    """Rows of one large buffer, and a key row that all tokens share: no copy of the buffer is made."""
    buffer = torch.randn(2, 300, 3, 4, 40, generator=generator)  # [B, T, qkv, H, D]
    q, k, v = buffer.permute(2, 0, 3, 1, 4)
    want = sf.attention(*(x.contiguous() for x in (q, k, v)), causal=True, backend="reference")
    torch.testing.assert_close(sf.attention(q, k, v, causal=True, backend="cpu"), want)
    one = k[:, :, :1].expand(-1, -1, 300, -1)
    assert one.stride(2) == 0
    mean = v.cumsum(2) / torch.arange(1, 301)[:, None]
    torch.testing.assert_close(
        sf.attention(q, one, v, causal=True, backend="cpu"), mean, rtol=1e-4, atol=1e-5
    )


def test_offsets_beyond_32_bits(generator):
    """Strides of more than 2**31 elements: memory that is reserved and, but for a few pages, not touched."""
    T, step = 3, 2**31 + 64
    try:
        k = torch.empty(T * step, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine reserves no {2 * T * step >> 30} GiB: {error}")
    k = k.as_strided((1, 1, T, 32), (0, 0, step, 1))
    k.copy_(torch.randn(1, 1, T, 32, generator=generator))
    q = torch.randn(1, 1, T, 32, generator=generator).bfloat16()
    want = sf.attention(q, k.contiguous(), k.contiguous(), backend="cpu")
    assert torch.equal(sf.attention(q, k, k, backend="cpu"), want)


def test_scratch_is_given_back_and_used_again(generator):
    """Hundreds of calls of many sizes, and the process does not grow."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def calls():
        for n in range(30):
            T = 64 + 137 * n % 900
            q, k, v, dout = inputs(generator, T=T, dtype=DTYPES[n % 3])
            everything(q, k, v, dout, sf.Plan.dense(T, T, causal=True))

    calls()
    before = resident()
    for _ in range(3):
        calls()
    assert resident() - before < 64 << 20


@pytest.mark.parametrize("kind", ["dense", "units"])
def test_memory_grows_with_the_length_alone(generator, kind):
    """Forward and backward at 16k and 32k tokens take a few [T,D] tensors; a bit a pair were 128 MiB."""
    D = 16
    for T in (2**14, 2**15):
        index = torch.randint(0, T // 64, (1, 1, T // 64, 16), generator=generator)
        units = sf.Plan.from_keys(index, Tq=T, Tk=T, tile=64, unit=64, causal=True)
        plan = sf.Plan.dense(T, T, causal=True) if kind == "dense" else units
        q, k, v, dout = torch.randn(4, 1, 1, T, D, generator=generator)
        assert peak_memory(lambda: everything(q, k, v, dout, plan)) < 28 * T * D * 4


# ---------------------------------------------------------------- garbage and sanitizers


def fuzz(env: dict[str, str], seeds: tuple[int, int], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "cpu_fuzz.py"), *map(str, seeds), *flags],
        env={**os.environ, "PYTHONPATH": str(Path(sf.__file__).parent.parent), **env},
        capture_output=True,
        text=True,
    )


def test_garbage_in_lists_is_harmless():
    run = fuzz({}, (200, 250))  # with units of 2^31 - 1 rows among them
    assert run.returncode == 0, run.stderr[-4000:]
    assert "50 plans of garbage" in run.stdout


def sanitizer(name: str) -> str:
    """Path of a sanitizer's run-time library, or a skip."""
    if not sys.platform.startswith("linux"):
        pytest.skip("LD_PRELOAD is for Linux")
    compiler = cpu.build.find_compiler()
    said = subprocess.run([*compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True)
    path = said.stdout.strip()
    if not os.path.isabs(path) or not os.path.exists(path):
        pytest.skip(f"{compiler[0]} has no lib{name}")
    return os.path.realpath(path)


SANITIZED = ("portable", "avx2", "avx512", "avx512bf16", "amx-emulated")


@pytest.mark.slow
@pytest.mark.parametrize("level", SANITIZED)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(level, tmp_path):
    """Conformance cases and garbage plans under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not cpu.build.LEVELS[level].needs <= cpu.build.cpu_flags():
        pytest.skip("not on this processor")
    env = {
        "SPARSEFLASH_CPU_LEVEL": level,
        "LD_PRELOAD": f"{sanitizer('asan')} {sanitizer('ubsan')}",
        "ASAN_OPTIONS": "detect_leaks=0,verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1,halt_on_error=1",
    }
    last = 2040 if level == "amx-emulated" else 2120  # tile instructions in C++ are slow
    run = fuzz(env, (2000, last), "--sanitize", "address,undefined")
    assert run.returncode == 0, run.stderr[-6000:]
    assert "runtime error" not in run.stderr and "AddressSanitizer" not in run.stderr, run.stderr[-6000:]
    assert f"{last - 2000} plans of garbage" in run.stdout and "cases right" in run.stdout


@pytest.mark.slow
def test_no_data_races(tmp_path):
    """Callers that compete for the threads, under ThreadSanitizer, in a program without Python."""
    build, program = cpu.build, tmp_path / "race"
    sources = [
        build.NATIVE / "api.cpp",
        build.LEVELS["portable"].path,
        Path(__file__).parents[1] / "cpu_race.cpp",
    ]
    flags = ["-std=c++17", "-O1", "-g", "-w", "-fsanitize=thread", "-pthread", "-DSF_WITH_PORTABLE=1"]
    made = subprocess.run(
        [*build.find_compiler(), *flags, f"-I{build.NATIVE}", *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if "tsan" in made.stderr and made.returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert made.returncode == 0, made.stderr
    run = subprocess.run([program], capture_output=True, text=True)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run with this kernel's address layout")
    assert run.returncode == 0 and "callers agree" in run.stdout, run.stdout + run.stderr[-6000:]
    assert "WARNING: ThreadSanitizer" not in run.stderr, run.stderr[-6000:]


def test_a_plain_read_reads_everything(generator):
    whole = 2**22 // 8
    x = torch.randint(-(2**62), 2**62, (2 * whole + 3,), generator=generator)
    want = x[: 2 * whole].sum() + x[2 * whole :].view(torch.uint8).sum(dtype=torch.int64)
    assert cpu.library.read(x) == int(want) % 2**64


@pytest.mark.parametrize("T", [255, 256, 300])
@pytest.mark.parametrize("kind", ["causal", "blocks", "buckets"])
@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 40), (torch.float32, 64), (torch.bfloat16, 64)])
def test_keys_that_lie_apart_in_memory_give_the_same_bits(dtype, D, kind, T, generator):
    """From 256 queries on they are packed; NaN and inf in keys that nobody sees stay unseen."""
    q, k, v, dout = (torch.randn(2, heads, T, D, generator=generator) for heads in (4, 2, 2, 4))
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    plan = {
        "causal": lambda: sf.Plan.dense(T, T, causal=True, window=(99, 0)),
        "blocks": lambda: sf.Plan.from_blocks(
            torch.rand(1, 4, -(-T // 64), -(-T // 64), generator=generator) < 0.5,
            Tq=T,
            Tk=T,
            tile=64,
            unit=64,
        ),
        "buckets": lambda: sf.Plan.from_buckets(*[torch.arange(T).view(1, 1, -1) * 7 % 3] * 2),
    }[kind]()
    hidden = ~plan.to_dense().any((0, 1, 2))
    k[:, :, hidden], v[:, :, hidden] = float("nan"), float("inf")
    found = []
    for apart in (False, True):
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) if apart else x for x in (q, k, v)]
        leaves = [x.detach().requires_grad_() for x in given]
        out = sf.attention(*leaves, plan, backend="cpu")
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and not found[0][0].isnan().any()


def test_a_large_pool_is_read_where_it_lies():
    """Of 200,000 keys in BTHD memory 640 are in use: a chunk of 300 queries copies none of them."""
    pool = [torch.randn(1, 200_000, 2, 64).transpose(1, 2) for _ in range(2)]
    q, table, used = torch.randn(1, 4, 300, 64), torch.arange(40).view(1, -1), torch.tensor([640])

    def read(Tk):
        plan = sf.Plan.from_pages(table, used, page_size=16, Tk=Tk, Tq=300)
        return sf.attention(q, *(x[:, :, :Tk] for x in pool), plan, backend="cpu")

    want = read(640)  # and what is made once
    found = []
    assert peak_memory(lambda: found.append(read(200_000))) < pool[0].nbytes / 4
    assert torch.equal(found[0], want)
