"""Attention over ranks is that of one process: each kind of plan, layout, transport, with all gradients."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
import torch

import plans
import ranks
import sparseflash as sf
import tolerance
from sparseflash.backends.numerics import dropout_bar
from sparseflash.backends.reference.dropout import left
from sparseflash.ops.costs import TERMS, Costs
from sparseflash.plan.entries import standing

KINDS = [*sorted(plans.KINDS), "several"]
WAYS = [
    ("contiguous", "ring"),
    ("zigzag", "groupcast"),
    ("striped", "ring"),
    ("auto", "auto"),
    ("chunks", "groupcast"),
    ("zigzag", "ulysses"),
]


@pytest.fixture(scope="module")
def group():
    """Four processes, of which calls take the first few."""
    made = ranks.Ranks(4)
    yield made
    made.close()


def check(group, seed, kind, world, **options):
    """Results of ranks against fp64."""
    results = group(ranks.attend, world=world, seed=seed, kind=kind, **options)
    shape = options.get("shape", (None, None))
    plan, mask, line = ranks.plan_of(seed, kind, Tq=shape[0], Tk=shape[1])
    made = {"dtype": torch.float32, "kv_heads": 2, "D": 16, "extras": False} | options
    given = ranks.inputs(
        seed, plan, made["dtype"], heads=4, **{n: made[n] for n in ("kv_heads", "D", "extras")}
    )
    q, k, v = (given.pop(n) for n in "qkv")
    dlse = given.pop("dlse")
    if drop := options.get("drop", 0.0):
        tokens = [torch.arange(T).expand(2, 4, T) for T in (plan.Tq, plan.Tk)]
        i, j = standing(plan, *tokens)
        given["pair_bias"] = -ranks.SLOPES[:, None, None] * (i[..., None] - j[..., None, :]).abs()
        given["factor"] = left(torch.tensor(seed), dropout_bar(drop), *tokens).double() / (1 - drop)
    tolerance.compare(
        ranks.joined(results), q, k, v, mask, dlse=dlse, note=f"{line} {world} ranks {options}", **given
    )
    return results, plan


def seeds(kind, n=1):
    """Seeds of a kind, the same every time, of plans that see something."""
    start = zlib.crc32(kind.encode()) % 1000
    found = []
    while len(found) < n:
        plan, mask, _ = ranks.plan_of(start, kind)
        one = plan[0] if isinstance(plan, tuple) else plan
        if min(one.Tq, one.Tk) > 14 and bool(mask.any()):
            found.append(start)
        start += 1
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plan_on_two_and_four_ranks(group, kind):
    at = KINDS.index(kind)
    for n, (seed, world) in enumerate(zip(seeds(kind, 2), (2, 4))):
        layout, transport = WAYS[(at + 3 * n) % len(WAYS)]
        way = {"layout": layout, "transport": transport, "extras": bool((at + n) % 2)}
        check(group, seed, kind, world, kv_heads=4 if transport == "ulysses" else 2, repeats=2, **way)


@pytest.mark.parametrize(
    ("kind", "world", "options"),
    [
        ("dense", 3, {"shape": (131, 131), "transport": "ring", "extras": True}),
        ("window", 4, {"shape": (3, 3), "layout": "contiguous", "transport": "groupcast"}),  # a rank has none
        ("sink", 4, {"shape": (257, 257), "nodes": 2, "transport": "ring", "extras": True}),
        ("buckets", 4, {"shape": (300, 300), "nodes": 2, "transport": "ring", "layout": "striped"}),
        ("several", 3, {"shape": (201, 201), "transport": "groupcast", "layout": "zigzag"}),
        ("dense", 1, {"shape": (77, 77), "extras": True}),
        ("sink", 4, {"shape": (257, 257), "dtype": torch.bfloat16, "D": 40, "transport": "ring"}),
    ],
)
def test_shapes_that_do_not_fit(group, kind, world, options):
    """Three ranks, lengths that no number divides, ranks without a token, nodes of two ranks, bf16."""
    (seed,) = seeds(kind)
    results, plan = check(group, seed, kind, world, **options)
    if world > 1:
        from sparseflash.plan.figures import parts_of, visible_pairs

        every = sum(visible_pairs(p) / (p.extent()[0] * p.extent()[1]) for p in parts_of(plan))
        assert sum(r["pairs"] for r in results) == pytest.approx(every, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "world", "options"),
    [
        ("dense", 2, {"shape": (131, 131), "transport": "ring"}),
        ("free", 3, {"layout": "striped", "transport": "groupcast"}),
        ("buckets", 4, {"shape": (300, 300), "nodes": 2, "transport": "ring", "layout": "striped"}),
        ("window", 2, {"layout": "zigzag", "transport": "ulysses", "kv_heads": 4}),
        ("window", 1, {}),
    ],
)
def test_dropout_and_alibi_are_those_of_one_process(group, kind, world, options):
    """By the tokens and heads of all: also where no rule asks for positions, and where heads move."""
    (seed,) = seeds(kind)
    check(group, seed, kind, world, drop=0.3, extras=True, repeats=2, **options)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("layout", "transport"), [("zigzag", "ring"), ("striped", "groupcast"), ("contiguous", "ulysses")]
)
def test_the_same_weights_are_left_out_bit_for_bit(group, world, layout, transport, generator):
    bucket = torch.randint(3, (1, 2, 100), generator=generator)
    for plan in (sf.Plan.dense(100, 100, causal=True), sf.Plan.from_buckets(bucket, bucket, tile=16)):
        want = left(torch.tensor(11), dropout_bar(0.4), *[torch.arange(100).expand(1, 4, 100)] * 2)
        want = (want & plan.to_dense().repeat_interleave(4 // plan.extent()[1], 1))[0].numpy()
        for found in group(ranks.drawn, world=world, plan=plan, layout=layout, transport=transport):
            np.testing.assert_array_equal(found, want)


def test_without_a_seed_the_first_rank_draws_one(group):
    for error, same in group(ranks.seeded, world=3):
        assert error < 2e-6 and not same


def test_what_does_not_go_over_ranks_is_refused_by_name():
    q = torch.randn(1, 2, 40, 16)
    with sf.distributed.context_parallel(None, sf.Plan.dense(40, 40)):
        for name, given in (
            ("causal", True),
            ("pair_bias", torch.zeros(1, 1, 40, 40)),
            ("skip_below", 1.0),
            ("return_block_max", (8, 8)),
            ("dropout", 0.1),
        ):
            with pytest.raises(sf.SparseFlashError, match=f"no argument '{name}': "):
                sf.distributed.attention(q, q, q, **{name: given})
    cp = sf.distributed.context_parallel(None)
    with pytest.raises(sf.SparseFlashError, match="dropout_p= of decode over ranks"):
        sf.distributed.decode(cp, q, q, q, dropout_p=0.1)


@pytest.mark.parametrize("what", ["plan", "layout", "options", "shape", "dropout", "alibi_slopes"])
def test_ranks_that_differ_are_told_before_anybody_waits(group, what):
    for said in group(ranks.differ, world=3, what=what):
        assert f"ranks differ in the {what}" in said
        assert "rank 2 is not as rank 0" in said


@pytest.mark.parametrize(
    "method",
    [sf.methods.Window(window=40), sf.methods.HashSparse(nb=4), sf.methods.XAttention(block=32)],
    ids=lambda m: type(m).__name__,
)
def test_a_method_attends_over_ranks_as_over_all(group, method):
    for found in group(ranks.chosen, world=2, method=method):
        np.testing.assert_allclose(found["out"], found["whole"], atol=2e-6)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs anonymous files, of Linux")
@pytest.mark.parametrize("transport", ["ring", "groupcast", "ulysses"])
def test_ranks_of_one_machine_share_memory(group, transport):
    """The same bits as through the process group; slots are filled again, step after step."""
    for slots, same in group(ranks.through_memory, world=2, transport=transport):
        assert same
        assert len(slots) == 1 and 1 <= slots[0] <= 4


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs anonymous files, of Linux")
@pytest.mark.parametrize("transport", ["ring", "groupcast"])
def test_some_ranks_share_memory_and_others_do_not(group, transport):
    assert group(ranks.two_machines, world=4, transport=transport) == [True] * 4


@pytest.mark.parametrize("world", [2, 3])
def test_a_video_model_over_ranks(group, world):
    """Dense, frames that attend to few others, and tiles of space and time; 5 x 6 x 6 tokens."""
    M = sf.methods
    methods = [None, M.EfficientVDiT(references=2), M.SlidingTile(tile=(2, 3, 3), window=(1, 1, 3))]
    for error, size in group(ranks.video, world=world, methods=methods, frames=5):
        assert error < 1e-5 * size and size > 0.1


def test_dtensors_in_and_out(group):
    assert max(group(ranks.as_dtensors, world=4)) < 2e-5


@pytest.mark.parametrize(
    ("how", "transport", "phase"),
    [
        ("dies", "ring", "forward"),
        ("dies", "groupcast", "backward"),
        pytest.param("dies", "groupcast", "forward", marks=pytest.mark.slow),
        pytest.param("stalls", "ring", "forward", marks=pytest.mark.slow),
        pytest.param("stalls", "groupcast", "backward", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_is_named_within_the_timeout(how, transport, phase):
    """By every other, with the step, in a loss or its gradient; also by those who wait for one who waits."""
    seconds = 6.0
    made = ranks.Ranks(4)
    try:
        made.start(ranks.lose, world=4, how=how, seconds=seconds, transport=transport, phase=phase)
        said = {}
        for _ in range(3):
            rank, found, error = made.results.get(timeout=60)
            assert error is None, error
            said[rank] = found
    finally:
        for process in made.processes:
            process.kill()
    assert sorted(said) == [0, 2, 3]
    for text in said.values():
        took, _, message = text.partition(" ")
        assert message.startswith("rank 1 died or stalls"), said
        assert "of call 2, step" in message or "of call 3" in message
        assert float(took) < seconds + 4
    if transport == "groupcast":  # keys that were sent before a rank died arrive: then the gradients do not
        assert any(f"{x} of call 2, step" in text for x in (phase, "backward") for text in said.values()), (
            said
        )


M = sf.methods
SELECTING = [  # a method, and the most that a rank may send for its selection: a share of its q and k
    (M.Window(window=40), 0),
    (M.MTraining(vertical=40, slash=9, granularity=32, near=4, sinks=4), 0.08),
    (M.MInference(vertical=40, slash=20, near=4, sinks=4), 0.08),
    (M.MInference(pattern="block-sparse", blocks=3), 0.07),
    (M.MInference(pattern=("vertical-slash", "a-shape", *["block-sparse"] * 2), vertical=9, slash=9), 1),
    (M.FlexPrefill(gamma=0.5, block=64, min_budget=64, tau=0.5), 0.2),
    (M.BlockTopK(blocks=4, block=64, share="sum"), 0.07),
    (M.PBSAttn(threshold=0.5, block=64, segment=128), 0.2),
    (M.PBSAttn(threshold=0.5, block=64, segment=128, pooling="max"), 0.2),
    (M.HashSparse(nb=4), 0.02),
    (M.AnchorAttention(theta=1.0, block=64, step=2, anchor="pooled"), 0.4),  # every key, no query
    (M.XAttention(threshold=0.5, block=64), 1.0),  # everything, once
]


@pytest.mark.parametrize(("method", "most"), SELECTING, ids=lambda x: getattr(type(x), "__name__", ""))
def test_methods_select_over_ranks_what_they_select_over_all(group, method, most):
    """The same pairs, to rounding; from a few numbers a token or a vector a block, unless they read all."""
    for alike, _ in group(ranks.overlap, world=4, method=method, T=700):
        assert alike >= 0.99
    if most < 1:
        for _, sent in group(ranks.overlap, world=4, method=method, T=8192, compare=False):
            assert sent <= most


def test_group_cast_sends_a_window_and_star_its_anchor(group):
    T = 4096
    window = sf.Plan.dense(T, T, causal=True, window=(300, 0))
    got = group(ranks.sent, world=4, plan=window, layout="contiguous")
    assert got[0] == 0 and all(300 <= n <= 1.2 * 300 for n in got[1:])
    q = torch.zeros(1, 1, T, 8)
    star = sf.methods.StarAttention(block=T // 4, anchor=128, last=0).select(q, q).plan
    assert group(ranks.sent, world=4, plan=star, layout="contiguous") == [0, 128, 128, 128]


TRAFFIC = {
    "dense": lambda: sf.Plan.dense(1000, 1000, causal=True),
    "window": lambda: sf.Plan.dense(1000, 1000, causal=True, window=(90, 0), sink_tokens=2),
    "hash": lambda: sf.Plan.from_buckets(*[torch.arange(1000).view(1, 1, -1) % 7 % 3] * 2, tile=32),
}


@pytest.mark.parametrize(
    ("kind", "layout", "transport", "nodes"),
    [
        ("dense", "zigzag", "ring", 1),
        ("hash", "contiguous", "ring", 2),
        ("hash", "striped", "groupcast", 1),
        ("window", "contiguous", "groupcast", 1),
    ],
)
def test_the_simulator_knows_bytes_and_balance_of_four_ranks(group, kind, layout, transport, nodes):
    """Exactly: what each rank sends, and the area that each visits."""
    plan = TRAFFIC[kind]()
    found = group(ranks.traffic, world=4, plan=plan, layout=layout, transport=transport, nodes=nodes)
    costs = Costs("", {f"{way} fp32": [1e-6] * len(TERMS) for way in ("forward", "both")}, {})
    said = sf.distributed.simulate(
        plan, sf.distributed.Layout.of(layout, 1000, 4), costs=costs, heads=2, kv_heads=2, D=16, dtype="fp32",
        transport="double ring" if nodes > 1 else transport, links=sf.distributed.Links(node=4 // nodes),
    )  # fmt: skip
    assert [sent for sent, _ in found] == said.sent
    area = torch.tensor([visits for _, visits in found], dtype=torch.float64)
    assert said.balance == pytest.approx(float(area.sum(1).max() / area.sum(1).mean()), rel=1e-12)
    steps = torch.stack([torch.diagonal(area.roll(n, 1)) for n in range(4)])
    assert said.critical == pytest.approx(float(steps.amax(1).sum() / area.sum(1).mean()), rel=1e-12)


@pytest.mark.parametrize("transport", ["ring", "groupcast"])
def test_memory_of_a_rank_is_that_of_its_share(group, transport):
    """Of q, k and v of its tokens: keys and gradients held, coming and made, and out in two parts."""
    for world in (2, 4):
        share = 3 * 2 * 8192 * 32 * 4 // world
        found = max(group(ranks.peak, world=world, T=8192, transport=transport))
        assert found <= 5.5 * share, (world, found / share)


def test_decoding_merges_the_caches_of_all_ranks(group):
    assert max(group(ranks.generate, world=4)) < 2e-6


@pytest.mark.parametrize(
    ("family", "world", "options"),
    [
        ("llama", 2, {}),
        ("llama", 4, {"nodes": 2, "behind": 7}),  # two groups of two: data parallel beside
        ("mistral", 2, {"layout": "striped", "documents": True}),  # windows
        ("gpt-oss", 3, {}),  # sinks, windows in every other layer
        ("llama", 2, {"method": sf.methods.HashSparse(nb=4)}),
    ],
)
def test_a_transformers_model_over_ranks_learns_as_on_one_process(group, family, world, options):
    pytest.importorskip("transformers")
    results = group(ranks.fine_tune, world=world, family=family, **options)
    for loss, slopes, _ in results:
        assert loss < 1e-6 and slopes < 2e-5, results
    assert sum(n for *_, n in results) == 75 * options.get("nodes", 1)


TRAINED = {
    "dense": {},
    "mtraining": {"vertical": 8, "slash": 4, "granularity": 32, "last": 16, "sinks": 2, "near": 2},
    "hash-sparse": {"nb": 4},
}


@pytest.mark.parametrize(
    ("attention", "steps"),
    [("dense", 6), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in TRAINED)],
)
def test_training_over_ranks_has_the_losses_of_one_process(group, attention, steps, tmp_path):
    """Four to a sequence, then two to each of two: a run goes on on another number of ranks."""
    from sparseflash.train import Corpus, TrainConfig, Trainer

    corpus, options = Corpus([ranks.TEXT]), TRAINED[attention]
    config = TrainConfig("", attention, options, batch=4, **ranks.SIZE)
    alone = Trainer(config, corpus)
    want = [alone.step().loss for _ in range(steps)]
    run = {"attention": attention, "options": options, "folder": str(tmp_path)}
    half = steps // 2
    first = group(ranks.train, world=4, size=4, steps=half, resume=False, **run)
    rest = group(ranks.train, world=4, size=2, steps=steps - half, resume=True, **run)
    for one, other in zip(first, rest):
        np.testing.assert_allclose([*one[:half], *other[:-1]], want, rtol=0, atol=1e-5)
        assert other[-1] == pytest.approx(alone.validate(), abs=1e-5)


def test_training_with_dropout_leaves_out_what_one_process_does(group, tmp_path):
    from sparseflash.train import Corpus, TrainConfig, Trainer

    options = {"window": 50, "sink_tokens": 2}
    config = TrainConfig("", "sink-window", options, batch=4, dropout=0.3, **ranks.SIZE)
    alone = Trainer(config, Corpus([ranks.TEXT]))
    want = [alone.step().loss for _ in range(3)]
    run = {"attention": "sink-window", "options": options, "folder": str(tmp_path), "dropout": 0.3}
    for found in group(ranks.train, world=4, size=4, steps=3, resume=False, **run):
        np.testing.assert_allclose(found[:-1], want, rtol=0, atol=1e-5)
