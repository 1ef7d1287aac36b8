"""torch.compile, opcheck, checkpointing, autocast: the ops are ordinary PyTorch operators."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparseflash as sf
from cases import CASES
from harness import BACKENDS, EACH, inputs, randn, run, same_bits
from sparseflash import Plan
from sparseflash.backends.numerics import Softmax
from sparseflash.methods.base import Selection
from sparseflash.plan.flat import flatten_all

T = 65


def _plans(generator):
    bucket = torch.randint(0, 3, (1, 4, T), generator=generator)
    mask = torch.rand(2, 2, T, T, generator=generator) < 0.3
    return {
        "dense": Plan.dense(T, T, causal=True, window=(20, 0), sink_tokens=2, tile=32),
        "offset": Plan.dense(T, T, causal=True, q_offset=torch.tensor([0, 5])),
        "buckets": Plan.from_buckets(bucket, bucket),
        "prepared": Plan.from_buckets(bucket, bucket).prepare(),
        "mask": Plan.from_mask(mask, tile=32, unit=16),
        "tuple": (Plan.from_mask(mask), Plan.from_mask(~mask, tile=16, unit=16)),
    }


NAMES = ("dense", "offset", "buckets", "prepared", "mask", "tuple")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, backend", [("offset", "reference"), *((n, b) for n in ("prepared", "tuple") for b in BACKENDS[:1])]
)
def test_both_ops_pass_opcheck(name, backend, generator):
    plan = _plans(generator)[name]
    tensors, ints = flatten_all(plan if isinstance(plan, tuple) else (plan,))
    q, k, v, dout, dlse = inputs(generator, T, D=16, Dv=8)
    for bias, sink in ((None, None), (randn(generator, 1, 2, T), randn(generator, 4))):
        leaves = [x.detach().requires_grad_() if x is not None else None for x in (q, k, v, bias, sink)]
        options = Softmax(0.25, 0.0, backend)
        beside = (None, None, None)  # a seed, slopes, and a bias of pairs
        forward = (*leaves, *beside, tensors, ints, *options)
        torch.library.opcheck(torch.ops.sparseflash.attention.default, forward)
        out, _, norm = torch.ops.sparseflash.attention(q, k, v, bias, sink, *beside, tensors, ints, *options)
        backward = (dout, dlse, q, k, v, out, norm, None, bias, *beside, tensors, ints, *options)
        torch.library.opcheck(torch.ops.sparseflash.attention_backward.default, backward)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_the_fake_ops_have_the_strides_of_the_real_ones(layout, generator):
    q, k, v, _, _ = inputs(generator, T, Dv=24)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    tensors, ints = flatten_all((Plan.dense(T, T),))
    arguments = (q, k, v, *(None,) * 5, tensors, ints, *Softmax(0.25, 0.0))
    torch.library.opcheck(torch.ops.sparseflash.attention.default, arguments, test_utils="test_faketensor")


def _loss(q, k, v, plan, dout, dlse, backend, **options):
    out, lse = sf.attention(q * 1.5, k, v, plan, return_lse=True, backend=backend, **options)
    return (out * dout).sum() + (lse.nan_to_num(neginf=0.0) * dlse).sum(), out


@EACH
@pytest.mark.parametrize(
    "name, how", [*((n, "argument") for n in NAMES), ("dense", "closure"), ("tuple", "closure")]
)
def test_a_full_graph_gives_what_eager_gives(backend, name, how, generator):
    plan = _plans(generator)[name]
    q, k, v, dout, dlse = inputs(generator, T)
    bias, sink = randn(generator, 1, 4, T), randn(generator, 4)
    leaves = [x.requires_grad_() for x in (q, k, v, bias, sink)]

    def step(q, k, v, bias, sink, *given):
        return _loss(
            q, k, v, *(given or (plan,)), dout, dlse, backend, key_bias=bias, sink_logits=sink, softcap=9.0
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    given = (plan,) if how == "argument" else ()
    results = []
    for call in (step, compiled):
        loss, out = call(*leaves, *given)
        grads = torch.autograd.grad(loss, leaves)
        results.append({"out": out.detach(), **{str(n): g for n, g in enumerate(grads)}})
    same_bits(*results)


@EACH
def test_a_plan_may_be_made_inside_the_compiled_function(backend, generator):
    q, k, v, _, _ = inputs(generator, T)

    def step(q, k, v):
        plan = Plan.dense(q.shape[2], k.shape[2], causal=True, window=(9, 0), sink_tokens=2)
        return sf.attention(q, k, v, plan, backend=backend), sf.attention(
            q, k, v, causal=True, backend=backend
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for want, got in zip(step(q, k, v), compiled(q, k, v), strict=True):
        assert torch.equal(want, got)


def test_keep_and_bucket_plans_can_be_made_inside_the_compiled_function(generator):
    q, k, v, _, _ = inputs(generator, T)
    bucket = torch.randint(0, 3, (1, 4, T), generator=generator)

    def step(q, k, v, bucket):
        return (
            sf.attention(q, k, v, Plan.from_buckets(bucket, bucket, buckets=3)),
            sf.attention(q, k, v, Plan.from_keep(bucket > 0, bucket < 2)),
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for want, got in zip(step(q, k, v, bucket), compiled(q, k, v, bucket), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("made", ["outside", "inside"])
def test_other_lengths_do_not_recompile_for_ever(made, generator):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(q, k, v, plan):
        plan = Plan.dense(q.shape[2], k.shape[2], causal=True) if plan is None else plan
        return sf.attention(q, k, v, plan)

    for length in (128, 192, 320, 448, 576, 704):
        q, k, v, _, _ = inputs(generator, length, D=16)
        plan = Plan.dense(length, length, causal=True)
        got = step(q, k, v, plan if made == "outside" else None)
        assert torch.equal(got, sf.attention(q, k, v, plan))
    assert counter.frame_count <= 3


def _packed(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (randn(generator, length, 2, 16) for _ in range(3))
    return q, k, v, torch.tensor([0, length // 3, length], dtype=torch.int32)


def _three(length):
    q, k, v, _, _ = inputs(torch.Generator().manual_seed(length), length, B=1, H=2, Hkv=2, D=16)
    return q, k, v


def _lse(q, k, v):
    return sf.attention(q, k, v, causal=True, return_lse=True, scale=0.3, softcap=5.0)[1]


def _window(q, k):
    return Plan.dense(q.shape[2], k.shape[2], causal=True, window=(9, 0))


OPS = {
    "attention": lambda q, k, v: sf.attention(q, k, v, causal=True),
    "window": lambda q, k, v: sf.attention(q, k, v, _window(q, k)),
    "varlen": lambda q, k, v, cu: sf.attention_varlen(q, k, v, cu, causal=True),
    "linear": lambda q, k, v: sf.linear_attention(q, k, v),
    "decay": lambda q, k, v: sf.linear_attention(q, k, v, decay_rate=torch.tensor([0.1, 0.2])),
    "stick": lambda q, k, v: sf.stick_breaking(q, k, v),
    "pointwise": lambda q, k, v: sf.pointwise_attention(q, k, v, causal=True),
    "stats": lambda q, k, v: sf.attention_stats(q, k, _lse(q, k, v), _window(q, k)),
    "recall": lambda q, k, v: sf.recall(q, k, _window(q, k)),
    "merge": lambda q, k, v: sf.merge(
        [sf.attention(q, k[:, :, at], v[:, :, at], return_lse=True) for at in (slice(40), slice(40, None))]
    ),
    "decode": lambda q, k, v: sf.decode(q[:, :, :1], k, v),
    "indexer": lambda q, k, v: sf.indexer_topk(q, k[:, 0], v[..., 0].contiguous(), 8),
    "keep": lambda q, k, v: sf.attention(q, k, v, Plan.from_keep(q[..., 0] > 0, k[..., 0] > 0)),
    "buckets": lambda q, k, v: sf.attention(
        q, k, v, Plan.from_buckets((q[..., 0] > 0).int(), (k[..., 0] > 0).int(), buckets=2)
    ),
    "intervals": lambda q, k, v: sf.attention(
        q, k, v, Plan.from_intervals(None, torch.arange(1, q.shape[2] + 1)[None, None], Tk=k.shape[2])
    ),
    "expiry": lambda q, k, v: sf.attention(
        q, k, v, Plan.from_expiry(torch.arange(20, q.shape[2] + 20)[None, None])
    ),
    "hash-sparse": lambda q, k, v: sf.methods.HashSparse(nb=4)(q, k, v),
    "sink-window": lambda q, k, v: sf.methods.SinkWindow(window=20)(q, k, v),
}
QUICK = ("attention", "varlen", "linear", "decode", "keep", "hash-sparse")
LENGTHS = (128, 192, 320, 448, 576, 704, 130, 65, 257, 97, 300, 512)


@pytest.mark.parametrize("dynamic", [None, True], ids=["as it comes", "dynamic"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in OPS]
)
def test_twelve_lengths_are_three_graphs(name, dynamic):
    """Messages that are formatted, sets of sizes and loops over tokens would pin a length."""
    counter, op = CompileCounterWithBackend("aot_eager"), OPS[name]
    compiled = torch.compile(op, backend=counter, fullgraph=True, dynamic=dynamic)
    make = _packed if name == "varlen" else _three
    for length in LENGTHS:
        given = make(length)
        torch.testing.assert_close(compiled(*given), op(*given))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["keep", "buckets", "hash-sparse"])
def test_batches_of_any_size_are_two_graphs_with_the_plan_made_inside(name):
    counter, op = CompileCounterWithBackend("aot_eager"), OPS[name]
    compiled = torch.compile(op, backend=counter, fullgraph=True)
    for batch in (1, 2, 3, 4, 5, 6):
        given = [x.expand(batch, -1, -1, -1).roll(batch, 0).contiguous() for x in _three(66)]
        torch.testing.assert_close(compiled(*given), op(*given))
    assert counter.frame_count <= 2


SHORT = (128, 192, 130, 65, 257, 97, 63)
A_GRAPH_A_LENGTH = {"blasst"}
"""Methods whose threshold is a number of the graph and follows the length, as their docstrings say."""


@pytest.mark.parametrize("dynamic", [None, True], ids=["as it comes", "dynamic"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if str(c) == "block-topk" else [pytest.mark.slow]) for c in CASES],
    ids=str,
)
def test_a_method_of_any_length_is_three_graphs(case, dynamic):
    """Loops over tiles, lists that are as long as a row, and tails that may be empty would pin a length."""
    counter, method = CompileCounterWithBackend("aot_eager"), case.method()
    compiled = torch.compile(lambda *x: method(*x), backend=counter, fullgraph=True, dynamic=dynamic)
    for length in SHORT:
        generator = torch.Generator().manual_seed(length)
        given = inputs(generator, length, B=1, D=16)[:3]
        torch.testing.assert_close(compiled(*given), method(*given))
    assert (counter.frame_count <= 3) == (case.slug not in A_GRAPH_A_LENGTH)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("length", [128, 150])
def test_a_method_of_tensors_without_values_gives_one(case, length):
    q, k, v = (torch.empty(2, heads, length, 16, device="meta") for heads in (4, 2, 2))
    out, lse = case.method()(q, k, v, return_lse=True)
    assert out.is_meta and out.shape == q.shape and lse.shape == q.shape[:3]


class _Module(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, *given):
        return self.op(*given)


EXPORTED = ("attention", "linear", "window", "stick", "hash-sparse")


@pytest.mark.parametrize("least", [129, 3])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "attention" else [pytest.mark.slow]) for n in EXPORTED]
)
def test_an_exported_program_holds_for_lengths_across_the_edges_of_tiles(name, least):
    """Torch makes one tile another program than several, if it is not asked to leave sizes open."""
    from torch.fx.experimental import _config

    length = torch.export.Dim("length", min=least, max=4096)
    module = _Module(OPS[name])
    shapes = {"given": tuple({2: length} for _ in range(3))}
    with _config.patch(backed_size_oblivious=least < 129):
        program = torch.export.export(module, _three(300), dynamic_shapes=shapes).module()
        for other in (3, 64, 127, 128, 129, 255, 256, 257, 513, 1000):
            if other >= least:
                torch.testing.assert_close(program(*_three(other)), module(*_three(other)))


def test_a_new_plan_of_the_same_kind_does_not_recompile(generator):
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q, k, v, plan: sf.attention(q, k, v, plan), backend=counter, fullgraph=True)
    q, k, v, _, _ = inputs(generator, 300)
    for _ in range(6):
        bucket = torch.randint(0, 4, (1, 4, 300), generator=generator)
        plan = Plan.from_buckets(bucket, bucket)
        assert torch.equal(step(q, k, v, plan), sf.attention(q, k, v, plan))
    assert counter.frame_count <= 2  # the number of tiles differs


@EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(backend, reentrant, generator):
    q, k, v, dout, _ = inputs(generator, T)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = Plan.dense(T, T, causal=True)

    def call(q, k, v):
        return sf.attention(q, k, v, plan, backend=backend)

    want = torch.autograd.grad(call(*leaves), leaves, dout)
    out = checkpoint(call, *leaves, use_reentrant=reentrant)
    out.backward(dout)
    for leaf, grad in zip(leaves, want, strict=True):
        assert torch.equal(leaf.grad, grad)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs_own(backend, dtype, generator):
    q, k, v, dout, _ = inputs(generator, T)
    k, v = k.to(dtype), v.bfloat16()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype):
        out = sf.attention(*leaves, causal=True, backend=backend)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    assert [g.dtype for g in grads] == [torch.float32, dtype, torch.bfloat16]
    want = run(
        *(x.detach().to(dtype) for x in leaves),
        Plan.dense(T, T, causal=True),
        backend=backend,
        dout=dout.to(dtype),
    )
    assert torch.equal(out.detach(), want["out"]) and torch.equal(grads[0], want["dq"].float())


def test_autocast_leaves_fp64_alone(generator):
    q, k, v, _, _ = inputs(generator, T, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert sf.attention(q, k, v).dtype == torch.float64


@EACH
def test_no_grad_and_inference_mode_work_and_frozen_inputs_get_no_gradient(backend, generator):
    q, k, v, dout, _ = inputs(generator, T)
    want = sf.attention(q, k, v, causal=True, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(sf.attention(q, k, v, causal=True, backend=backend), want)
    k.requires_grad_()
    sf.attention(q, k, v, causal=True, backend=backend).backward(dout)
    assert q.grad is None and v.grad is None and k.grad is not None


@EACH
def test_training_after_inference_of_the_same_length_works(backend, generator):
    """Plans that nobody gave are kept, and what inference mode made cannot be saved for a backward."""
    q, k, v, dout, _ = inputs(generator, 77)
    with torch.inference_mode():
        sf.attention(q, k, v, causal=True, backend=backend)
    sf.attention(q.requires_grad_(), k, v, causal=True, backend=backend).backward(dout)
    assert q.grad.abs().sum() > 0


LEARNING = {
    "attention": lambda q, k, v, plan: sf.attention(q, k, v, plan),
    "peaks": lambda q, k, v, plan: sf.attention(q, k, v, plan, return_block_max=(16, 16))[0],
    "stick": lambda q, k, v, plan: sf.stick_breaking(q, k, v, plan),
    "pointwise": lambda q, k, v, plan: sf.pointwise_attention(q, k, v, plan),
    "rules": lambda q, k, v, plan: sf.attention(q, k, v, plan.with_rules(causal=True)),
    "selection": lambda q, k, v, plan: sf.methods.Window(9)(q, k, v, selection=Selection(plan)),
}


@pytest.mark.parametrize("how", ["eager", "compiled", "func", "mode"])
@pytest.mark.parametrize("op", LEARNING)
def test_a_plan_made_in_inference_mode_trains(op, how, generator):
    """Autograd refuses to save tensors of inference mode; a compiler and a transform save by its means."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    q, k, v, dout, _ = inputs(generator, T, Dv=16)
    with torch.inference_mode():
        plan = _plans(generator)["buckets" if op == "rules" else "prepared"]
    normal = pickle.loads(pickle.dumps(plan))
    assert plan.of_inference and not normal.of_inference
    call = LEARNING[op]
    want = torch.autograd.grad(call(q, k.requires_grad_(), v, normal), k, dout)[0]
    if how == "func":
        got = torch.func.grad(lambda k: (call(q, k, v, plan) * dout).sum())(k.detach())
    else:
        run = torch.compile(call, backend="aot_eager", fullgraph=op != "rules") if how == "compiled" else call
        with Listen() if how == "mode" else contextlib.nullcontext():
            got = torch.autograd.grad(run(q, k, v, plan), k, dout)[0]
    assert torch.equal(got, want)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_takes_what_begins_amid_an_item(backend, dtype, generator):
    q, k, v, dout, dlse = inputs(generator, T, dtype=dtype)
    plan = Plan.dense(T, T, causal=True)
    out, lse = sf.attention(q, k, v, plan, return_lse=True, backend=backend)
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": dlse}
    want = sf.attention_backward(plan=plan, backend=backend, **given)
    for name, x in given.items():
        x, room = x.contiguous(), bytearray(x.numel() * x.element_size() + 1)
        moved = torch.frombuffer(room, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape).copy_(x)
        got = sf.attention_backward(plan=plan, backend=backend, **{**given, name: moved})
        assert all(torch.equal(a, b) for a, b in zip(want[:3], got[:3], strict=True)), name


@EACH
def test_a_second_derivative_is_refused_instead_of_wrong(backend, generator):
    q, k, v, dout, _ = inputs(generator, T)
    q.requires_grad_()
    out = sf.attention(q, k, v, causal=True, backend=backend)
    (first,) = torch.autograd.grad(out, q, dout, create_graph=True)
    with pytest.raises(
        RuntimeError, match="second derivative"
    ) as refused:  # torch's kind of refusal, and ours
        torch.autograd.grad(first.sum(), q)
    assert isinstance(refused.value, sf.SparseFlashError)


def test_dynamo_explains_no_graph_break(generator):
    q, k, v, _, _ = inputs(generator, T)
    plan = Plan.dense(T, T, causal=True)
    report = torch._dynamo.explain(lambda q, k, v: sf.attention(q, k, v, plan))(q, k, v)
    assert report.graph_break_count == 0


def test_a_call_that_nobody_watches_skips_the_dispatcher_and_a_mode_still_sees_the_op():
    """The short way is for speed alone: same bits, and whatever listens to PyTorch's ops hears this one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    heard = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = torch.randn(3, 1, 2, 70, 16)
    plan = sf.Plan.dense(70, 70, causal=True)
    short = sf.attention(q, k, v, plan)
    with Listen():
        long = sf.attention(q, k, v, plan)
    assert any("sparseflash.attention" in name for name in heard)
    assert torch.equal(short, long)
    with torch.profiler.profile() as profile:
        sf.attention(q, k, v, plan)
    assert not any("sparseflash::attention" in event.key for event in profile.key_averages())
