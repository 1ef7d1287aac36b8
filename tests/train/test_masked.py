"""Masked-diffusion language models: what is hidden, what it costs, and how text is filled in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

pytest.importorskip("safetensors")

import sparseflash as sf
from nn_cases import one_thread
from sparseflash.__main__ import app
from sparseflash.train import GPT, Corpus, TrainConfig, Trainer, TrainError, fill, load_model, sample
from sparseflash.train.attention import sees_both_ways
from sparseflash.train.masked import LEAST, SHARES, denoise, hide
from sparseflash.train.model import MASK

_one_thread = pytest.fixture(autouse=True)(one_thread)

TEXT = b"".join(b"line %d of a text, with %d changes.\n" % (i, i * i % 97) for i in range(400))
TINY = {"data": "", "objective": "masked", "length": 32, "layers": 2, "width": 32, "heads": 2, "batch": 2}


def tiny(**changes):
    return TrainConfig(**{**TINY, "steps": 12, "eval_every": 5, "eval_sequences": 2, **changes})


def alive(**changes):
    """A model whose every weight matters: fresh ones begin as the identity."""
    model = GPT(tiny(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


# ---------------------------------------------------------------- what is hidden


def test_every_row_hides_its_share_and_weighs_it():
    tokens = torch.randint(256, (64, 500), generator=torch.Generator().manual_seed(1))
    inputs, targets, weights = hide(tokens, 3, slice(None), 64)
    hidden = inputs == MASK
    assert torch.equal(inputs[~hidden], tokens[~hidden])
    assert torch.equal(targets, torch.where(hidden, tokens, -100))
    share = 1 / weights[:, 0]
    assert bool((weights == weights[:, :1]).all()) and bool((share >= LEAST).all() and (share <= 1).all())
    spread = ((share - LEAST) / (1 - LEAST)).sort().values
    torch.testing.assert_close(spread.diff(), torch.full((63,), 1 / 64), atol=1e-5, rtol=0)
    deviation = (share * (1 - share) / 500).sqrt()
    assert bool(((hidden.float().mean(1) - share).abs() <= 4.5 * deviation + 1e-6).all())


def test_rows_of_a_step_hide_the_same_wherever_they_are_drawn():
    tokens = torch.randint(256, (6, 40), generator=torch.Generator().manual_seed(1))
    whole = hide(tokens, 7, slice(None), 6)
    for rows in (slice(0, 2), slice(2, 6)):
        for part, all_ in zip(hide(tokens[rows], 7, rows, 6), whole):
            assert torch.equal(part, all_[rows])
    assert not torch.equal(hide(tokens, 8, slice(None), 6)[0], whole[0])


def test_the_loss_is_what_hidden_bytes_cost_over_their_share_and_over_all_bytes():
    model = alive()
    tokens = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(1))
    inputs, targets, weights = hide(tokens, 0, slice(None), 3)
    want, logits = 0.0, model(inputs).detach()
    for b in range(3):
        for t in range(32):
            if inputs[b, t] == MASK:
                want += float(-logits[b, t].log_softmax(-1)[tokens[b, t]] * weights[b, t])
    assert float(model(inputs, targets, weights=weights)) == pytest.approx(want / (3 * 32), rel=1e-5)


def test_the_loss_is_unbiased_over_the_shares():
    """With costs that do not depend on what is hidden, the mean over masks is the cost of all bytes."""
    tokens, costs = torch.arange(200)[None].expand(4000, -1), torch.rand(200)
    inputs, _, weights = hide(tokens, 0, slice(None), 4000)
    per_row = ((inputs == MASK) * weights * costs).mean(1)
    error = float(per_row.std() / 4000**0.5)
    assert abs(float(per_row.mean()) - float(costs.mean())) <= 4 * error


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "attention, qk",
    [("dense", "untied"), ("dense", "tied"), ("window", "untied"), ("self-attention", "untied")],
)
def test_a_masked_model_sees_both_sides(attention, qk):
    model = alive(attention=attention, qk=qk)
    tokens = torch.full((1, 32), 5)
    other = tokens.clone()
    other[:, -1] = 9
    with torch.no_grad():
        assert bool((model(tokens)[:, 0] != model(other)[:, 0]).any())
    assert not model.decodes and model(tokens).shape == (1, 32, 256)


@pytest.mark.parametrize("name", [n for n in sf.methods.names() if sees_both_ways(n)])
def test_every_method_that_is_let_in_is_not_causal(name):
    """At most the grid must be said; what is refused is refused with the fix."""
    grids = {"grid-window", "sliding-tile", "efficient-vdit", "sparse-vdit", "paro-attention"}
    options = {"grid": (2, 4, 4)} if name in grids else {}
    options |= {"grid": (8, 4), "window": (4, 4)} if name == "grid-window" else {}
    try:
        model = alive(attention=name, options=options)
    except TrainError as refused:
        assert name in ("sparsed", "adaspa", "paro-attention") and f"--attention {name}" in str(refused)
        return
    chosen = model.blocks[0].attention.attention
    plan = chosen.select(*torch.randn(2, 1, 2, 32, 16)).plan
    plans = plan if isinstance(plan, (tuple, list)) else [plan]
    seen = torch.stack([one.to_dense().any(0).any(0) for one in plans]).any(0)
    assert bool(seen.triu(1).any())


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_it_learns_and_validates_by_the_same_masks(attention):
    trainer = Trainer(tiny(attention=attention, steps=60, batch=8), Corpus([TEXT]))
    assert trainer.validate() == pytest.approx(
        8, rel=0.2
    )  # the share that is hidden varies, the cost does not
    losses = [trainer.step().loss for _ in range(60)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert trainer.validate() == trainer.validate()


def test_validation_is_the_bound_of_its_masks():
    trainer = Trainer(tiny(), Corpus([TEXT]))
    trainer.model = alive()
    nats = count = 0.0
    for n, (tokens, _) in enumerate(trainer.corpus.validation(32, 2)):
        inputs, targets, weights = hide(tokens.expand(SHARES, -1), n, slice(None), SHARES)
        with torch.no_grad():
            costs = F.cross_entropy(trainer.model(inputs).transpose(1, 2), targets, reduction="none")
        nats += float((costs * weights).mean(0).sum())
        count += tokens.numel()
    assert trainer.validate() == pytest.approx(nats / count / math.log(2), rel=1e-5)


def test_accumulated_passes_equal_one_large_batch():
    corpus = Corpus([TEXT])
    large, small = Trainer(tiny(batch=4), corpus), Trainer(tiny(batch=1, accumulate=4), corpus)
    for _ in range(3):
        assert large.step().loss == pytest.approx(small.step().loss, rel=1e-5)


# ---------------------------------------------------------------- generation


def test_the_surest_bytes_are_written_first_and_stay():
    model = alive()
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 20:] = MASK
    steps = list(denoise(model, tokens, steps=5))
    assert [int((step.given == MASK).sum(1).max()) for step in steps] == [12, 9, 6, 4, 2]
    last = steps[-1].tokens
    assert not bool((last == MASK).any()) and torch.equal(last[:, :20], tokens[:, :20])
    for step in steps:
        known = step.given != MASK
        assert torch.equal(step.tokens[known], step.given[known])
        sure = step.logits.log_softmax(-1).amax(-1)
        new = (step.tokens != MASK) & ~known
        left = step.tokens == MASK
        for b in range(2):
            if bool(left[b].any()):
                assert sure[b][new[b]].min() >= sure[b][left[b]].max()
        torch.testing.assert_close(step.logits, model(step.given))
    assert len(list(denoise(model, tokens, steps=99))) == 12
    assert list(denoise(model, tokens[:, :20], steps=4)) == []


def test_a_method_keeps_its_patterns_over_the_steps_and_at_full_budget_changes_nothing():
    model = alive()
    given = {"length": 32, "steps": 8, "temperature": 0.0}
    want = fill(model, b"line 3 of a text", 12, **given)
    assert fill(model, b"line 3 of a text", 12, method=sf.methods.SparseD(1.0, block=8), **given) == want
    found, pattern = [], sf.methods.SparseD.pattern

    class Counted(sf.methods.SparseD):
        def pattern(self, q, k, lse, ctx):
            found.append((ctx["step"], ctx["generated"]))
            return pattern(self, q, k, lse, ctx)

    fill(model, b"line 3 of a text", 12, method=Counted(0.3, skip=0.2, block=8), **given)
    assert found == [(2, 12)] * 2  # int(8 * .2) + 1, once a layer
    assert len(fill(model, b"x", 12, method=sf.methods.Window(4, causal=False), **given)) == 12


def test_the_seed_decides_and_a_long_prompt_is_cut():
    model = alive()
    given = {"length": 32, "steps": 4}
    assert fill(model, b"ab", 10, seed=1, **given) == fill(model, b"ab", 10, seed=1, **given)
    assert fill(model, b"ab", 10, seed=1, **given) != fill(model, b"ab", 10, seed=2, **given)
    text = bytes(range(65, 91)) * 3
    assert fill(model, text, 10, seed=1, **given) == fill(model, text[-22:], 10, seed=1, **given)
    assert fill(model, b"ab", 0, **given) == b""


def test_the_command_trains_resumes_and_samples(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT)
    run, runner = tmp_path / "run", CliRunner()
    size = "--length 32 --layers 1 --width 32 --heads 2 --batch 2 --eval-every 4 --eval-sequences 2".split()
    train = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(run), "--objective", "masked"]
    assert runner.invoke(app, [*train, "--steps", "4", *size]).exit_code == 0
    assert runner.invoke(app, ["train", "--resume", "--out", str(run), "--steps", "6"]).exit_code == 0
    words = ["sample", str(run), "--prompt", "line", "--tokens", "8", "--steps", "6"]
    plain = runner.invoke(app, words)
    sparse = runner.invoke(app, [*words, "--attention", "sparsed", "--set", "block=8"])
    assert plain.exit_code == sparse.exit_code == 0 and plain.output.startswith("line")
    assert load_model(run)[1].objective == "masked"
    again = Trainer(tiny(layers=1, length=64), Corpus([TEXT]))
    again.begin(run)


def test_what_does_not_go_is_named():
    for changes, said in (
        ({"objective": "both"}, "--objective 'both' is unknown; choose one of: next, masked"),
        ({"context_parallel": 2}, "--objective masked does not go with --context-parallel"),
    ):
        with pytest.raises(TrainError, match=said):
            tiny(**changes)
    for changes, said in (
        ({"attention": "hash-sparse"}, "hash-sparse sees only what is earlier.*dense, .*window"),
        ({"attention": "window", "options": {"causal": True}}, "window.causal=True"),
        ({"attention": "sparsed"}, "sparseflash sample RUN --attention sparsed"),
        ({"attention": "lookups"}, "--objective masked does not go with lookups"),
    ):
        with pytest.raises(TrainError, match=said):
            GPT(tiny(**changes))
    model, given = alive(), {"length": 32}
    for tokens, more, said in ((32, {}, "at most 31"), (4, {"steps": -1}, "--steps is -1")):
        with pytest.raises(TrainError, match=said):
            fill(model, b"a", tokens, **given, **more)
    with pytest.raises(TrainError, match="use fill"):
        next(sample(model, b"a", 1, length=32))
    with pytest.raises(TrainError, match="draws one byte after the other"):
        fill(GPT(tiny(objective="next")), b"a", 4, **given)
    with pytest.raises(TrainError, match="beside layers that project"):
        model = GPT(tiny(attention="self-attention"))
        list(denoise(model, torch.full((1, 8), MASK), steps=1, attend=lambda step, layer, q, k, v: v))
