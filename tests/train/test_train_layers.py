"""The trainer with layers in place of attention: patterns, auxiliary losses, states, and longer runs."""

import functools
import math
import subprocess

import pytest
import torch

pytest.importorskip("safetensors")

from typer.testing import CliRunner

import sparseflash as sf
from sparseflash.__main__ import app
from sparseflash.train import GPT, Corpus, TrainConfig, Trainer, TrainError, load_model, sample
from sparseflash.train.attention import Sparse, dense
from sparseflash.train.log import read
from sparseflash.train.trainer import init_config
from test_train import TEXT, assert_same_run, command, tiny

LAYERS = {
    "combiner": {"segment": 8},
    "dynamic-mask-attention": {"window": 8},
    "gated-convolution": {},
    "lightning-attention": {},
    "longgen-attention": {"sparse": "sink-window"},
    "lookups": {},
    "native-sparse-attention": {"block": 8, "stride": 4, "select": 8, "top": 4, "window": 8},
    "routing-attention": {"clusters": 4, "window": 8},
    "self-attention": {"kv_heads": 1},
    "seqboat": {"window": 8},
    "sparsek-attention": {"k": 8, "window": 4},
    "stick-breaking-attention": {},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it brings, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(steps=1, **changes):
    trainer = Trainer(tiny(steps=max(steps, 1), **changes), Corpus([TEXT]))
    for _ in range(steps):
        trainer.step()
    return trainer


def test_every_layer_of_the_registry_is_trained_here():
    assert sorted(LAYERS) == sf.nn.names()


# patterns


def test_a_pattern_is_taken_in_turn_and_options_go_where_they_fit():
    options = {"window": 8, "sink-window.sink_tokens": 2, "routing-attention.clusters": 3}
    model = GPT(tiny(layers=5, attention="sink-window*2, dense,routing-attention", options=options))
    kinds = [block.attention for block in model.blocks]
    assert [type(kind).__name__ for kind in kinds] == [
        "SelfAttention", "SelfAttention", "SelfAttention", "RoutingAttention", "SelfAttention",
    ]  # fmt: skip
    assert [kinds[n].attention.method for n in (0, 1, 4)] == [
        sf.methods.SinkWindow(window=8, sink_tokens=2)
    ] * 3
    assert kinds[2].attention is dense and kinds[3].clusters == 3 and kinds[3].window == 8


def test_layers_know_their_place_and_the_base_of_positions():
    model = GPT(tiny(layers=3, attention="longgen-attention", rope_base=500.0))
    assert [layer.method is None for layer in model.layers()] == [False, True, False]
    assert all(layer.base == 500.0 for layer in model.layers())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": "dense,,dense"}, "'' is no name"),
        ({"attention": "dense*0"}, "is no name, or name\\*count"),
        ({"attention": "dense*3"}, "names 3 layers, --layers is 2; use --layers 3"),
        ({"attention": "dense,nonsense"}, "'nonsense' is unknown"),
        ({"attention": "dense,window", "options": {"nb": 2}}, "none of dense, window has an option 'nb'"),
        ({"attention": "dense", "options": {"window.window": 2}}, "window is not in --attention dense"),
        ({"attention": "lookups", "qk": "tied"}, "--qk tied does not go with lookups"),
        ({"attention": "lookups", "dropout": 0.1}, "--dropout does not go with lookups"),
        ({"attention": "lookups", "context_parallel": 2}, "--context-parallel does not go with lookups"),
        ({"eval_length": 64, "context_parallel": 2}, "--eval-length does not go with --context-parallel"),
        ({"rope_base": 0.0}, "--rope-base is 0.0"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(TrainError, match=message):
        GPT(tiny(**changes))


def test_an_option_that_a_layer_has_not_is_named():
    with pytest.raises(sf.SparseFlashError, match="lookups has no option 'nb': expected some of base, "):
        GPT(tiny(attention="lookups", options={"nb": 3}))


# training


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_trains_from_eight_bits_and_resumes_as_if_never_stopped(tmp_path, name):
    corpus, config = Corpus([TEXT]), tiny(attention=f"{name},dense", options=LAYERS[name], steps=25)
    straight = Trainer(config, corpus)
    rows = straight.run(tmp_path / "a")
    assert rows[0].loss == pytest.approx(math.log(256), abs=1e-4) and rows[-1].loss < 0.8 * rows[0].loss
    part = Trainer(config, corpus)
    step = part.step

    def stop():
        part.save(tmp_path / "b")
        raise RuntimeError("power cut")

    part.step = lambda: step() if part.done < 7 else stop()
    with pytest.raises(RuntimeError):
        part.run(tmp_path / "b")
    Trainer(config, corpus).run(tmp_path / "b", resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_auxiliary_losses_are_learnt_from_and_not_reported():
    """With a penalty alone to learn from, the gates of look-ups close; the log says what text costs."""
    options = {"penalty": 1e3, "lookups": 1}
    plain, pushed = (
        trained(steps=0, attention="lookups", options=options | more) for more in ({"penalty": 0.0}, {})
    )
    losses = [trainer.step().loss for trainer in (plain, pushed)]
    assert losses[0] == losses[1]
    assert pushed.model.aux_loss() > 100 and plain.model.aux_loss() == 0
    gate = [trainer.model.layers()[0].ask.bias.item() for trainer in (plain, pushed)]
    assert gate[1] < 0 == gate[0]  # the first step of text does not reach it: outputs start at 0
    assert plain.validate() == pytest.approx(pushed.validate(), rel=0.1)


def test_what_has_no_gradient_is_learnt_once_a_step_and_not_in_validation():
    trainer = trained(steps=0, attention="routing-attention", options={"clusters": 4, "window": 8})
    seen = [layer.centroid.clone() for layer in trainer.model.layers()]
    trainer.validate()
    assert all(torch.equal(a, layer.centroid) for a, layer in zip(seen, trainer.model.layers()))
    trainer.step()
    assert not any(torch.equal(a, layer.centroid) for a, layer in zip(seen, trainer.model.layers()))


def test_weights_that_no_token_used_count_as_gradient_zero(tmp_path):
    trainer = trained(steps=0, attention="lookups")
    spare = trainer.model.blocks[0].attention.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    assert spare is None
    trainer = Trainer(trainer.config, trainer.corpus)
    weight = torch.nn.Parameter(torch.ones(3))
    trainer.model.blocks[0].attention.spare = weight
    trainer.optimizer.add_param_group({"params": [weight], "weight_decay": 0.0})
    trainer.step()
    assert torch.equal(weight, torch.ones(3)) and len(trainer.optimizer.state[weight]) == 3


def test_numbers_and_vectors_of_layers_do_not_decay():
    trainer = trained(steps=0, attention="seqboat", options={"window": 8})
    decays = {
        id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
    }
    for name, weight in trainer.model.named_parameters():
        free = weight.dim() < 2 or name.endswith("embed.weight")
        assert decays[id(weight)] == (0.0 if free else trainer.config.weight_decay), name


# states


@pytest.mark.parametrize(
    "name, options", [*LAYERS.items(), ("dense", {}), ("sink-window", {"window": 6, "sink_tokens": 2})]
)
def test_tokens_in_parts_are_predicted_as_at_once(name, options):
    trainer = trained(steps=10, attention=name, options=options, layers=3)
    model = trainer.model.eval()
    tokens = torch.tensor(list(TEXT[:60]))[None]
    with torch.no_grad():
        want, state = model(tokens), model.new_state(1)
        found = torch.cat([model(part, state=state) for part in tokens.split([20, 1, 1, 30, 8], 1)], 1)
    torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-3)
    assert [part.length for part in state] == [60] * 3


def test_a_window_keeps_no_more_than_it_sees():
    model = GPT(tiny(attention="sink-window,dense", options={"window": 6, "sink_tokens": 2})).eval()
    state = model.new_state(1)
    with torch.no_grad():
        for token in torch.arange(100)[None].split(1, 1):
            model(token, state=state)
    assert state[0].tensors["k"].shape[2] <= 2 * (2 + 5) and state[1].tensors["k"].shape[2] == 100


@pytest.mark.parametrize("name", ["stick-breaking-attention", "dense", "hash-sparse"])
def test_validation_on_longer_sequences_equals_one_pass(name):
    trainer = trained(steps=10, attention=name, eval_length=100)
    found = trainer.validate()
    assert found == trainer.validate(100) != trainer.validate(32)
    total = 0.0
    with torch.no_grad():
        for tokens, targets in trainer.corpus.validation(100, trainer.config.eval_sequences):
            total += float(trainer.model.eval()(tokens, targets)) / trainer.config.eval_sequences
    assert found == pytest.approx(total / math.log(2), rel=1e-4)


@pytest.mark.parametrize("name", ["stick-breaking-attention", "dense", "hash-sparse"])
def test_samples_with_a_state_are_those_without(tmp_path, name):
    Trainer(tiny(attention=name, layers=1, steps=30), Corpus([TEXT])).run(tmp_path)
    model, config = load_model(tmp_path)
    found = bytes(sample(model, b"line ", 50, length=config.length, temperature=0))
    text = b"line "
    for _ in range(50):
        seen = text if name.startswith("stick") else text[-config.length :]
        text += bytes([int(model(torch.tensor([list(seen)]))[0, -1].argmax())])
    assert found == text[5:]


# longer runs


def test_a_run_begins_with_the_weights_of_a_shorter_one(tmp_path):
    corpus = Corpus([TEXT])
    short = Trainer(tiny(steps=5, layers=3), corpus)
    short.run(tmp_path)
    given = {"length": 64, "attention": "sink-window,dense,sink-window", "steps": 3}
    config = init_config(tmp_path, given)
    assert (config.width, config.layers, config.length, config.options) == (32, 3, 64, {})
    # The slowest pair of a head of 16 turns by base^(-14/16) a token.
    slow = [length * base ** -(14 / 16) for length, base in ((32, 1e4), (64, config.rope_base))]
    assert slow[0] == pytest.approx(slow[1])
    long = Trainer(config, corpus)
    long.begin(tmp_path)
    for name, weight in short.model.named_parameters():
        assert torch.equal(weight, dict(long.model.named_parameters())[name])
    assert isinstance(long.model.blocks[0].attention.attention, Sparse) and long.step().loss < 5.5
    assert init_config(tmp_path, {"length": 64, "rope_base": 7.0}).rope_base == 7.0
    assert init_config(tmp_path, {"length": 32}).rope_base == 1e4
    with pytest.raises(TrainError, match="of another shape"):
        Trainer(init_config(tmp_path, {"width": 64}), corpus).begin(tmp_path)


def test_the_commands(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT)
    shape = ["--data", text, "--length", 32, "--layers", 2, "--width", 32, "--heads", 2, "--steps", 4]
    more = ["--attention", "stick-breaking-attention,dense", "--set", "stick-breaking-attention.rest=drop"]
    longer = ["--init", tmp_path / "a", "--length", 64, "--steps", 2, "--eval-length", 128]
    run = functools.partial(CliRunner().invoke, app)
    for request in (
        ["train", *shape, *more, "--out", tmp_path / "a"],
        ["train", *longer, "--out", tmp_path / "b"],
        ["sample", tmp_path / "b", "--tokens", 100],
    ):
        assert run([str(word) for word in request], catch_exceptions=False).exit_code == 0
    model, config = load_model(tmp_path / "b")
    assert config.rope_base > 2e4 and model.layers()[0].rest == "drop" and model.layers()[1] is None
    refused = ["train", "--resume", "--init", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    assert "give one of them" in str(run(refused).exception)


def test_two_processes_route_like_one_with_the_doubled_batch(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT)
    options = ["--data", text, "--length", 32, "--layers", 1, "--width", 32, "--heads", 2, "--steps", 3]
    options += ["--attention", "routing-attention", "--set", "clusters=4", "--set", "window=8"]
    request = command("train", *options, "--device", "cpu", "--batch", 1, "--out", tmp_path / "two")
    module = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "sparseflash"]
    request["args"][1:3] = module
    two = subprocess.run(**request, timeout=120)
    assert two.returncode == 0, two.stderr
    config = TrainConfig(
        str(text), length=32, layers=1, width=32, heads=2, steps=3, batch=2,
        attention="routing-attention", options={"clusters": 4, "window": 8},
    )  # fmt: skip
    Trainer(config).run(tmp_path / "one")
    one, two = (load_model(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    for name, x in one.items():
        torch.testing.assert_close(x, two[name], atol=1e-4, rtol=1e-3, msg=name)


# what is kept


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"attention": "dense"}, sf.Plan.dense(32, 32, causal=True)),
        ({"attention": "window", "options": {"window": 5}},
         sf.Plan.dense(32, 32, causal=True, window=(4, 0))),
        ({"attention": "self-attention"}, None),
        ({"attention": "window", "options": {"window": 5}, "objective": "masked"},
         sf.Plan.dense(32, 32, window=(4, 4))),
    ],
)  # fmt: skip
def test_a_validation_counts_the_pairs_that_layers_keep_and_visit(changes, want, tmp_path):
    trainer = Trainer(tiny(**{"length": 32, "steps": 2, "eval_every": 2} | changes), Corpus([TEXT]))
    rows = trainer.run(tmp_path)
    assert rows[0].kept is None and rows[0].work is None
    found = rows[1].kept, rows[1].work
    assert found == ((None, None) if want is None else pytest.approx((want.kept, want.work)))
    if changes["attention"] == "window":
        assert all(block.attention.attention.note is None for block in trainer.model.blocks)
    assert [(row.kept, row.work) for row in read(tmp_path)] == [(None, None), found]


def test_layers_that_differ_are_averaged_and_old_logs_are_read(tmp_path):
    trainer = trained(steps=0, attention="window,dense", options={"window": 3}, length=32, layers=2)
    trainer.validate()
    near = sf.Plan.dense(32, 32, causal=True, window=(2, 0))
    assert trainer.kept == pytest.approx((1 + near.kept) / 2)
    (tmp_path / "log.csv").write_text("step,loss,val_bpb,ms_per_step,tokens_per_s\n1,2.5,,3.0,4.0\n")
    (row,) = read(tmp_path)
    assert (row.loss, row.val_bpb, row.kept, row.work) == (2.5, None, None, None)
