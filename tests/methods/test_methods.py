"""What every method promises, for each row of `cases.py`, on every backend that runs here."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sparseflash as sf
from cases import CASES, directions, hash_of, mask_of
from sparseflash.bench.needles import plant
from sparseflash.methods import heads
from sparseflash.methods.base import Method, Selection
from tolerance import compare

BACKENDS = [name for name, status in sf.backend_status().items() if status.usable]
every_case = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c.slow else c for c in CASES], ids=str
)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(generator, T=129, B=2, Hq=4, Hkv=4, D=16, Dv=24, dtype=torch.float32):
    """q, k, v in BSHD memory, requiring gradient, and a gradient for the output."""

    def draw(H, dim):
        x = torch.randn(B, T, H, dim, generator=generator).to(dtype).transpose(1, 2)
        return x.requires_grad_()

    q, k, v = draw(Hq, D), draw(Hkv, D), draw(Hkv, Dv)
    dout = torch.randn(B, Hq, T, Dv, generator=generator).to(dtype)
    return q, k, v, dout


def learning(method):
    """Gradients on, but for methods that have none."""
    return torch.set_grad_enabled(not method.forward_only)


def shown(method, q, k):
    """The mask of what takes part of what a method selects."""
    return mask_of(method.shown(q, k, method.select(q, k)))


def run(method, q, k, v, dout, **options):
    """Out, lse and gradients. Rows that see nothing get no gradient: what they return is a method's own."""
    with learning(method):
        out, lse = method(q, k, v, return_lse=True, **options)
    seen = lse > float("-inf")
    if method.forward_only:
        return {"out": torch.where(seen[..., None], out, 0), "lse": lse}
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.where(seen[..., None], dout, 0))
    out = torch.where(seen[..., None], out, 0)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


# ---------------------------------------------------------------- exactness


@every_case
@every_backend
@pytest.mark.parametrize("T", [1, 63, 129])
def test_at_full_budget_a_method_is_dense(case, backend, T, generator):
    q, k, v, dout = inputs(generator, T, Hkv=2)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool)
    mask = {"causal": mask.tril(), "strict": mask.tril(-1), "all": mask}[case.full_mask]
    got = run(sf.methods.get(case.slug, **case.full), q, k, v, dout, backend=backend)
    compare(got, *(x.detach() for x in (q, k, v)), mask, dout=dout)


@every_case
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_method_attends_exactly_what_it_selects(case, backend, dtype, generator):
    q, k, v, dout = inputs(generator, 150, Hkv=2, dtype=dtype)
    method = case.method()
    mask = shown(method, q, k)
    got = run(method, q, k, v, dout, backend=backend)
    compare(got, *(x.detach() for x in (q, k, v)), mask, dout=dout)


@every_case
def test_gradients_agree_with_finite_differences(case, generator):
    q, k, v, _ = inputs(generator, 11, B=1, Hkv=2, D=3, Dv=2, dtype=torch.float64)
    method = case.method()
    if method.forward_only:
        with pytest.raises(sf.SparseFlashError, match="is for inference, and an input requires a gradient"):
            method(q, k, v)
        return
    selection = method.select(q, k)
    assert torch.autograd.gradcheck(
        lambda *x: method(*x, backend="reference", selection=selection), (q, k, v), fast_mode=True
    )


@every_case
@every_backend
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_gives_nothing_out(case, backend, B, T):
    q, k, v = (torch.zeros(B, 4, T, 16, requires_grad=True) for _ in range(3))
    with learning(case.method()):
        out = case.method()(q, k, v, backend=backend)
    if not case.method().forward_only:
        out.sum().backward()
        assert q.grad.shape == (B, 4, T, 16)
    assert out.shape == (B, 4, T, 16)


# ---------------------------------------------------------------- what is selected


@every_case
def test_a_plan_is_valid_and_its_density_is_that_of_its_mask(case, generator):
    q, k, *_ = inputs(generator, 200, Hkv=2)
    plans = case.method().select(q, k).plan
    T = q.shape[2]
    for plan in (plans,) if isinstance(plans, sf.Plan) else plans:
        plan.check()
        mask = plan.to_dense()
        at_q = torch.arange(T) + plan.q_offset if plan.q_pos is None else plan.q_pos[0, 0]
        at_k = torch.arange(T) if plan.k_pos is None else plan.k_pos[0, 0]
        gap = at_q[:, None] - at_k
        windows = [plan.window or (None, None)] * mask.shape[1]
        if plan.head_window is not None:
            windows = [[None if x < 0 else x for x in pair] for pair in plan.head_window[0].tolist()]
        sinks = [plan.sink] * len(windows)
        if plan.head_sink is not None:
            sinks = plan.head_sink.expand(-1, len(windows), -1)[0, :, 0].tolist()
        pairs = 0
        for (left, right), sink in zip(windows, sinks, strict=True):
            near = (gap <= (2 * T if left is None else left)) & (gap >= -(2 * T if right is None else right))
            past = gap >= (0 if plan.include_self else 1) if plan.causal else gap < 2 * T
            pairs += int(((near | (at_k < sink)) & past).sum())
        assert plan.density == pytest.approx(int(mask.sum()) / (pairs * mask.shape[0]))


@every_case
def test_density_is_within_budget_and_grows_with_it(case):
    q, k = directions(1, 4, 512), directions(1, 4, 512, shift=7)

    def density(**change):
        mask = shown(case.method(**change), q, k).expand(1, 4, -1, -1)
        return float(mask.float().mean())

    plan = case.method().select(q, k).plan
    plan = plan if isinstance(plan, sf.Plan) else plan[0]
    assert case.budget[0] <= plan.density <= case.budget[1]
    seen = [density(**change) for change in case.budgets]
    assert seen == sorted(seen) and len(set(seen)) == len(seen)


@every_case
def test_no_query_sees_the_future(case, generator):
    """Given the plan, and where the method promises it, in the choice of the plan too."""
    method, t = case.method(), 70
    if case.full_mask == "all":
        pytest.skip("looks ahead by design")
    q, k, v, _ = inputs(generator, 129)
    with torch.no_grad():
        selection = method.select(q, k)
        out = method(q, k, v, selection=selection)
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t + 1 :], v2[:, :, t + 1 :] = 5.0, -7.0
        later = method(q, k2, v2, selection=selection)
        same = t // 64 * 64 if method.forward_only else t + 1  # a kernel skips blocks for 64 queries together
        assert torch.equal(out[:, :, :same], later[:, :, :same])
        if method.causal_selection:
            q2 = torch.cat([q[:, :, : t + 1], torch.randn(2, 4, 129 - t - 1, 16, generator=generator)], 2)
            before, after = (mask_of(method.select(*x).plan)[:, :, : t + 1] for x in ((q, k), (q2, k2)))
            assert torch.equal(before, after)


@every_case
def test_the_plan_is_the_same_on_every_machine(case):
    """Integers only: CRC-32 of the mask."""
    assert hash_of(case) == case.golden, "meant so? make golden, and say it in the changelog under Numerics"


@every_case
def test_a_seed_fixes_the_plan_and_the_global_generator_is_left_alone(case, generator):
    q, k, *_ = inputs(generator, 129)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mask_of(case.method().select(q, k).plan)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, mask_of(case.method().select(q, k).plan))
    if case.seeded:
        assert not torch.equal(first, mask_of(case.method(seed=1).select(q, k).plan))


SEEKERS = [
    pytest.param(c, kind, id=f"{c}-{kind}", marks=[pytest.mark.slow] if c.slow else [])
    for c in CASES
    for kind in c.needles
]


@pytest.fixture(scope="module")
def tokens():
    """512 tokens that needles may lie among: three sequences, four query heads over two."""
    pytest.importorskip("safetensors")
    from sparseflash.bench import capture

    captured = capture.load("smollm2")
    layers = [captured.layer(n, tokens=512) for n in captured.layers]
    q, k = (torch.cat([getattr(x, name) for x in layers]) for name in "qk")
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 4, 512, 32, generator=g), torch.randn(3, 2, 512, 32, generator=g)
    return {"real": (q[:, [0, 1, 3, 4]], k[:, :2]), "normal": normal}


@pytest.mark.parametrize(("case", "kind"), SEEKERS)
def test_planted_needles_are_found_and_a_random_choice_does_not_find_them(case, kind, tokens, generator):
    found = plant(*tokens[case.among], kind, generator, count=4)
    assert found.dense()[1].min() > 0.999
    method = case.method(**case.seeking)
    plan = method.shown(found.q, found.k, method.select(found.q, found.k))
    mask = mask_of(plan).expand(3, -1, -1, -1)
    past = torch.ones(512, 512, dtype=torch.bool).tril(-1)
    share = float((mask & past).sum() / (past.sum() * mask.shape[0] * mask.shape[1]))
    chance = sf.Plan.from_mask((torch.rand(3, 4, 512, 512, generator=generator) < share) & past)
    assert found.kept(plan).mean() >= case.recall
    assert found.kept(chance).mean() < case.recall


@every_case
def test_where_a_method_decodes_one_token_at_a_time_is_the_whole_call(case, generator):
    method = case.method()
    q, k, v, _ = inputs(generator, 60, Hkv=2)
    with torch.no_grad():
        whole = method(q, k, v, backend="reference")
        if not method.decodes or case.full_mask == "all":
            asked = method.across_layers  # a prompt decides for all that follow it
            assert "decode" not in method.phases or case.full_mask == "all" or asked
            return
        for t in range(60):
            now = k[:, :, : t + 1], v[:, :, : t + 1]
            one = method(q[:, :, t : t + 1], *now, ctx={"q_offset": t}, backend="reference")
            torch.testing.assert_close(one, whole[:, :, t : t + 1])


# ---------------------------------------------------------------- symmetry


@every_case
@every_backend
def test_layout_grouping_and_batch_do_not_matter(case, backend, generator):
    q, k, v, _ = inputs(generator, 150, Hkv=2)
    method = case.method()
    with torch.no_grad():
        whole = method(q, k, v, backend=backend)
        assert torch.equal(whole, method(*(x.contiguous() for x in (q, k, v)), backend=backend))
        wide = [torch.zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x) for x in (q, k, v)]
        assert torch.equal(whole, method(*wide, backend=backend))
        selection = method.select(q, k)
        repeated = (x.repeat_interleave(2, 1) for x in (k, v))
        torch.testing.assert_close(whole, method(q, *repeated, backend=backend, selection=selection))
        if case.slug != "qk-sparse":  # whose masks are drawn by batch slot
            for b in range(2):
                alone = method(*(x[b : b + 1] for x in (q, k, v)), backend=backend)
                if backend == "reference":  # whose matrix products depend on the shape of the batch
                    torch.testing.assert_close(alone, whole[b : b + 1])
                else:
                    assert torch.equal(alone, whole[b : b + 1])


# ---------------------------------------------------------------- under PyTorch


@every_case
def test_checkpointing_changes_no_gradient(case, generator):
    q, k, v, dout = inputs(generator, 129)
    method = case.method()
    if method.forward_only:
        pytest.skip("has no gradient")
    plain = torch.autograd.grad(method(q, k, v), (q, k, v), dout)
    torch.manual_seed(5)
    again = torch.autograd.grad(checkpoint(method, q, k, v, use_reentrant=False), (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@every_case
@pytest.mark.parametrize("given", [False, True], ids=["selecting", "given-its-selection"])
def test_compiles_without_a_break(case, given, generator):
    q, k, v, dout = inputs(generator, 70)
    method = case.method()
    selection = method.select(q, k) if given else None
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: method(q, k, v, selection=selection), fullgraph=True, backend="aot_eager"
    )
    with learning(method):
        out, plain = compiled(q, k, v), method(q, k, v)
    assert torch.equal(out, plain)
    if method.forward_only:
        return
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, plain)), strict=True):
        assert torch.equal(a, b)


@every_case
def test_autocast_attends_in_bf16_and_selects_the_same(case, generator):
    q, k, v, _ = inputs(generator, 129)
    method = case.method()
    plain = mask_of(method.select(q, k).plan)
    with torch.autocast("cpu", dtype=torch.bfloat16), learning(method):
        assert torch.equal(plain, mask_of(method.select(q, k).plan))
        assert method(q, k, v).dtype == torch.bfloat16


# ---------------------------------------------------------------- the record, the registry


@every_case
def test_repr_is_the_record_of_the_experiment(case):
    method = case.method()
    assert eval(repr(method), vars(sf.methods)) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.seed = 3


def test_every_method_has_a_case_facts_and_a_name():
    assert {c.slug for c in CASES} == set(sf.methods.names())
    for name in sf.methods.names():
        cls = sf.methods.find(name)
        assert getattr(sf.methods, cls.__name__) is cls
        assert cls.paper and set(cls.phases) <= {"training", "prefill", "decode", "diffusion"} and cls.phases
        assert cls.paper.removeprefix("arXiv ") in cls.__doc__


def test_an_unknown_name_says_which_exist():
    with pytest.raises(sf.SparseFlashError, match=r"'hash_sparse': did you mean 'hash-sparse'\? .*window"):
        sf.methods.get("hash_sparse")
    with pytest.raises(sf.SparseFlashError, match="hash-sparse, .*qk-sparse"):
        sf.methods.get("zzz")


def test_an_unknown_hyper_parameter_says_which_exist():
    with pytest.raises(sf.SparseFlashError, match=r"no hyper-parameter 'bucket'.*nb=16.*planes='per-head'"):
        sf.methods.get("hash-sparse", bucket=4)


@pytest.mark.parametrize(
    ("slug", "wrong", "said"),
    [
        ("hash-sparse", {"nb": 5}, "nb=5: expected an even number"),
        ("hash-sparse", {"nb": 0}, "nb=0"),
        ("hash-sparse", {"nb": 4.0}, "nb=4.0"),
        ("hash-sparse", {"planes": "own"}, "expected one of per-head, shared"),
        ("hash-sparse", {"window_heads": -1}, "window_heads=-1"),
        ("hash-sparse", {"window": 1, "include_self": False}, "window=1"),
        ("qk-sparse", {"q_drop": 30}, "q_drop=30: expected a fraction"),
        ("qk-sparse", {"k_drop": float("nan")}, "k_drop=nan"),
        ("window", {"window": 0}, "window=0"),
        ("window", {"ahead": 3}, "ahead=3: expected .* causal=False"),
        ("dilated", {"dilation": 0}, "dilation=0"),
        ("strided", {"local": 0}, "local=0"),
        ("bigbird", {"random_blocks": -1}, "random_blocks=-1"),
        ("prefix-lm", {"prefix": -1}, "prefix=-1"),
        ("block-causal", {"block": 0}, "block=0"),
        ("documents", {"window": -4}, "window=-4"),
        ("cycle-scan", {"window": -1}, "window=-1"),
        ("grid-window", {"window": (8, -8)}, "window=.8, -8.: expected a tuple of ints >= 1"),
        ("grid-window", {"grid": (8, -1)}, "only the first may be -1"),
        ("grid-window", {"shift": (1,)}, "shift=.1,.: expected 2"),
        ("tree", {"parents": (-1, False)}, "expected a tuple of ints >= -1"),
        ("window", {"causal": False, "ahead": True}, "ahead=True: expected an int"),
        ("tree", {"branching": 0}, "branching=0"),
        ("tree", {"parents": (-1, 2, 1)}, "node 1 is on a cycle"),
        ("tree", {"parents": (-1, 3)}, "parents hold -1..3: nodes are 0..1"),
        ("sink-window", {"sink_tokens": -1}, "sink_tokens=-1"),
        ("reformer", {"bucket": 0}, "bucket=0"),
        ("reformer", {"rounds": 0}, "rounds=0"),
        ("reformer", {"planes": ""}, "planes=''"),
    ],
)
def test_a_value_out_of_range_is_refused_when_the_method_is_made(slug, wrong, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.methods.get(slug, **wrong)


class Recorder(dict):
    """A context that knows which keys it was asked for."""

    def __init__(self, **keys):
        super().__init__(keys)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


@every_case
def test_whatever_ctx_holds_is_read_or_refused(case):
    method, name = case.method(), type(case.method()).__name__
    method = (heads.apart(method) or [method])[0]  # what is told to all is read by each
    q, k = directions(1, 4, 96), directions(1, 4, 96, shift=7)
    step = None if "step" in method.reads else 0  # for some, a first step is dense
    layer = None if method.across_layers else 3  # where the number decides what a layer does
    context = Recorder(v=k, layer=layer, state=None, step=step, q_offset=0)
    whole = mask_of(method.select(q, k, context).plan)
    assert torch.equal(whole, mask_of(method.select(q, k).plan))
    assert context.asked == set(method.reads)
    assert all(f"`{key}" in method.__doc__ for key in method.reads)

    with pytest.raises(sf.SparseFlashError, match=f"'qoffset', which {name} does not read.*'q_offset'?"):
        method(q, k, k, ctx={"qoffset": 20})
    for begin in (case.chunk, torch.tensor([case.chunk], dtype=torch.int32)):
        ctx = {"q_offset": begin}
        if "q_offset" not in method.reads:
            with pytest.raises(sf.SparseFlashError, match=f"{name} does not read it.*to be 0; .*Window"):
                method.select(q, k, ctx)
        elif case.slug != "tree":  # whose queries are all of a tree
            assert torch.equal(
                mask_of(method.select(q[:, :, case.chunk :], k, ctx).plan), whole[:, :, case.chunk :]
            )


def test_a_key_of_another_method_is_refused_with_the_method_that_reads_it():
    x = torch.zeros(1, 1, 8, 16)
    said = (
        r"'cu_seqlens', which Window does not read; Documents reads it: Window.reads: q_offset; any .*layer"
    )
    with pytest.raises(sf.SparseFlashError, match=said):
        sf.methods.Window().select(x, x, {"cu_seqlens": torch.tensor([0, 8])})
    with pytest.raises(
        sf.SparseFlashError, match="'bais', .*did you mean 'bias'. Weighted.reads: bias, gate"
    ):
        Weighted()(x, x, x, ctx={"bais": x})


@pytest.mark.parametrize("name", sf.methods.names())
def test_true_is_no_count(name):
    fields = {f.name: f.default for f in dataclasses.fields(sf.methods.find(name)) if f.name != "seed"}
    for field, default in fields.items():
        if type(default) in (int, float):
            with pytest.raises(sf.SparseFlashError, match=f"{field}=True: expected"):
                sf.methods.get(name, **{field: True})


@every_case
def test_tensors_of_the_wrong_shape_are_named(case):
    x = torch.zeros(1, 4, 8, 16)
    with pytest.raises(sf.SparseFlashError, match="q: shape .*expected a 4-d tensor"):
        case.method()(x[0], x, x)
    with pytest.raises(sf.SparseFlashError, match="q has 3 heads, k 4"):
        case.method()(x[:, :3], x, x)


# ---------------------------------------------------------------- the base class


@dataclasses.dataclass(frozen=True)
class Weighted(Method):
    """A method that learns: a bias on keys and a gate on queries."""

    reads = ("bias", "gate")

    def select(self, q, k, ctx=None):
        plan = sf.Plan.dense(q.shape[2], k.shape[2], causal=True)
        return Selection(plan, key_bias=ctx["bias"], gate=ctx["gate"])


def test_a_bias_and_a_gate_of_a_selection_take_part_and_learn(generator):
    q, k, v, dout = inputs(generator, 40)
    bias = torch.randn(1, 4, 40, generator=generator, requires_grad=True)
    gate = torch.rand(2, 4, 40, generator=generator, requires_grad=True)
    out = Weighted()(q, k, v, ctx={"bias": bias, "gate": gate})
    scores = (q @ k.mT) / 4 + bias[:, :, None]
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf"))
    want = scores.softmax(-1) @ v * gate[..., None]
    torch.testing.assert_close(out, want)
    leaves = (q, k, v, bias, gate)
    got, exact = (torch.autograd.grad(o, leaves, dout) for o in (out, want))
    torch.testing.assert_close(got, exact)


def test_a_method_of_ones_own_stays_out_of_the_registry():
    assert Weighted not in map(sf.methods.find, sf.methods.names())
    with pytest.raises(NotImplementedError, match="Bare"):
        type("Bare", (Method,), {})()(*[torch.zeros(1, 1, 2, 4)] * 3)
