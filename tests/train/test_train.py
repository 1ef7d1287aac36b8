"""The trainer: what it learns, what it saves, and that nothing is lost."""

import csv
import errno
import functools
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("safetensors")

from sparseflash.train import (
    GPT,
    Corpus,
    TrainConfig,
    Trainer,
    TrainError,
    checkpoint,
    load,
    load_model,
    resume_config,
    sample,
)
from sparseflash.train.log import read

TEXT = b"".join(
    b"line %d of a short text that repeats itself, with %d small changes.\n" % (i, i * i % 97)
    for i in range(400)
)
TINY = {
    "data": "",
    "length": 32,
    "layers": 2,
    "width": 32,
    "heads": 2,
    "steps": 12,
    "batch": 2,
    "eval_every": 5,
    "eval_sequences": 2,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it brings, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def tiny(**changes):
    return TrainConfig(**{**TINY, **changes})


def outcome(directory):
    """Everything of a finished run that must not depend on when it was interrupted."""
    rows = [(r["step"], r["loss"], r["val_bpb"]) for r in csv.DictReader((directory / "log.csv").open())]
    return rows, checkpoint.load(directory)[0]


def assert_same_run(a, b):
    rows_a, tensors_a = outcome(a)
    rows_b, tensors_b = outcome(b)
    assert rows_a == rows_b
    assert tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []


def command(*arguments, **environment):
    return {
        "args": [sys.executable, "-m", "sparseflash", *map(str, arguments)],
        "env": {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


# learning


@pytest.mark.parametrize("qk", ["untied", "tied"])
def test_the_loss_starts_at_eight_bits_and_falls(qk):
    trainer = Trainer(tiny(qk=qk, steps=60), Corpus([TEXT]))
    first = trainer.step().loss
    assert first == pytest.approx(math.log(256), abs=1e-4)  # a zero head predicts every byte equally
    for _ in range(59):
        last = trainer.step().loss
    assert last < 0.65 * first
    assert trainer.validate() < 0.65 * 8


def test_tied_keys_are_normalised_queries():
    seen = []
    model = GPT(tiny(qk="tied"))
    model.blocks[0].attention.attention = lambda q, k, v: seen.append((q, k)) or v
    model(torch.arange(32)[None])
    q, k = seen[0]
    torch.testing.assert_close(k, q / q.norm(dim=-1, keepdim=True))


def test_the_model_is_causal():
    model = GPT(tiny())
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    tokens = torch.randint(256, (1, 32))
    changed = tokens.clone()
    changed[:, 20:] = torch.randint(256, (1, 12))
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :20], b[:, :20])
    assert not torch.allclose(a[:, 20:], b[:, 20:])


def test_rotary_scores_depend_on_distance_only():
    from sparseflash.train.model import rotary_table, rotate

    table = rotary_table(64, 16)
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    qs, ks = rotate(q.expand(1, 64, 1, 16).clone(), table), rotate(k.expand(1, 64, 1, 16).clone(), table)
    scores = qs[0, :, 0] @ ks[0, :, 0].T
    for distance in (0, 1, 7):
        line = scores.diagonal(-distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-4, rtol=1e-4)


def test_accumulated_passes_equal_one_large_batch():
    corpus = Corpus([TEXT])
    large, small = Trainer(tiny(batch=4), corpus), Trainer(tiny(batch=1, accumulate=4), corpus)
    for _ in range(3):
        a, b = large.step(), small.step()
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_bf16_autocast_trains():
    trainer = Trainer(tiny(dtype="bf16", steps=20), Corpus([TEXT]))
    losses = [trainer.step().loss for _ in range(20)]
    assert losses[-1] < losses[0]


# methods


@pytest.mark.parametrize("name", ["hash-sparse", "qk-sparse", "window", "reformer"])
def test_every_method_trains(name):
    trainer = Trainer(tiny(attention=name, steps=40), Corpus([TEXT]))
    losses = [trainer.step().loss for _ in range(40)]
    assert losses[-1] < 0.75 * losses[0]


def test_a_full_budget_method_trains_like_dense():
    corpus = Corpus([TEXT])
    dense, sparse = (
        Trainer(tiny(attention=name, options=options), corpus)
        for name, options in (("dense", {}), ("hash-sparse", {"nb": 1}))
    )
    for _ in range(5):
        assert dense.step().loss == pytest.approx(sparse.step().loss, rel=1e-5)


def test_random_masks_change_with_the_step_and_not_between_validations():
    trainer = Trainer(tiny(attention="qk-sparse"), Corpus([TEXT]))
    sparse = trainer.model.blocks[0].attention.attention
    seen = []
    select = sparse.method.select
    q = torch.randn(1, 2, 32, 16)
    for _ in range(2):
        trainer.step()
        seen.append(select(q, q, sparse.context).plan.to_dense())
        trainer.validate()
        seen.append(select(q, q, sparse.context).plan.to_dense())
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_layers_hash_with_different_planes_and_tied_ones_leave_out_the_own_key():
    untied, tied = (GPT(tiny(attention="hash-sparse", qk=qk)) for qk in ("untied", "tied"))
    methods = [block.attention.attention.method for model in (untied, tied) for block in model.blocks]
    assert len({m.seed for m in methods[:2]}) == 2
    assert [m.include_self for m in methods] == [True, True, False, False]


# data


def test_letters_alone_take_the_entropy_of_their_frequencies():
    assert Corpus([bytes(range(64)) * 2000]).letters() == pytest.approx(6, abs=0.01)
    assert Corpus([b"ab" * 5000]).letters() == pytest.approx(1, abs=0.05)


def test_the_tail_of_each_file_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 95 + b"A" * 5)
    (tmp_path / "b.txt").write_bytes(b"b" * 190 + b"B" * 10)
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "late.bin").write_bytes(b"c" * 5000 + b"\0")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    corpus = load(tmp_path)
    assert corpus.files == 2
    assert bytes(corpus.train.tolist()) == b"a" * 95 + b"\0" + b"b" * 190
    assert bytes(corpus.val.tolist()) == b"A" * 5 + b"\0" + b"B" * 10


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Grüße\r\n\tund\fweiter\x1b[0m".encode(), True),
        ("Grüße".encode("latin-1"), True),
        ("Привет".encode("koi8-r"), True),
        ("Grüße".encode("utf-16"), False),
        (b"\x7fELF\x02\x01", False),
        (b"a" * 5000 + b"\x00", False),
    ],
)
def test_what_is_text_as_a_file_is_text_in_a_folder(tmp_path, data, text):
    (tmp_path / "a.txt").write_bytes(data * 40)
    for path in (tmp_path, tmp_path / "a.txt"):
        if text:
            assert bytes(load(path).train.tolist()) == (data * 40)[: -(len(data) * 2)]
        else:
            with pytest.raises(TrainError, match="without control characters such as NUL"):
                load(path)


def test_validation_windows_do_not_depend_on_the_run():
    corpus = Corpus([TEXT])
    windows = list(corpus.validation(100, 4))
    assert len(windows) == 4
    joined = bytes(corpus.val.tolist())
    for tokens, targets in windows:
        assert bytes(tokens[0].tolist()) in joined
        assert torch.equal(tokens[0, 1:], targets[0, :-1])


def test_batches_are_a_function_of_seed_and_step():
    corpus = Corpus([TEXT])
    whole, _ = corpus.batch(3, 7, slice(0, 4), 4, 32)
    part, targets = corpus.batch(3, 7, slice(2, 4), 4, 32)
    assert torch.equal(whole[2:], part)
    assert torch.equal(part[:, 1:], targets[:, :-1])
    assert not torch.equal(whole, corpus.batch(3, 8, slice(0, 4), 4, 32)[0])


# nothing is lost


def test_a_killed_run_resumes_bit_for_bit(tmp_path, text_file):
    options = ["--data", text_file, "--length", 32, "--layers", 1, "--width", 32, "--heads", 2]
    options += ["--steps", 12, "--eval-every", 4, "--eval-sequences", 2, "--save-every", 5]
    # The killed run dies inside step 9: after the checkpoint of step 5 and with rows 6 to 8 already logged.
    kill = (
        "import os, signal, sys\nfrom sparseflash.train import Trainer\nstep = Trainer.step\n"
        "def dying(self):\n    if self.done == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self)\n"
        "Trainer.step = dying\nfrom sparseflash.__main__ import main\nmain()"
    )
    request = command("train", *options, "--out", tmp_path / "killed")
    request["args"][1:3] = ["-c", kill]
    killed = subprocess.run(**request)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read(tmp_path / "killed")) == 8
    assert checkpoint.read_meta(tmp_path / "killed")["step"] == 5
    # What continues it, and what never stopped, are of another process than what began.
    config = resume_config(tmp_path / "killed", {})
    Trainer(config, load(text_file)).run(tmp_path / "killed", resume=True)
    Trainer(config, load(text_file)).run(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_the_learning_rate_at_every_corner_of_its_schedule():
    corpus, about = Corpus([TEXT]), functools.partial(pytest.approx, rel=1e-12)
    rate = Trainer(tiny(steps=40, lr=0.5, warmup=0.1), corpus).learning_rate
    assert [rate(n) for n in range(5)] == about([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rate(22) == about(0.275)  # half of the way down
    assert rate(40) == about(0.05) and rate(5) < 0.5
    assert all(rate(n) > rate(n + 1) for n in range(4, 40))
    rate = Trainer(tiny(steps=40, lr=0.5, warmup=0.0), corpus).learning_rate
    assert rate(0) == about(0.5) and rate(1) == about(0.5)  # one step of warm-up, the full rate
    rate = Trainer(tiny(steps=4, lr=0.5, warmup=1.0), corpus).learning_rate
    assert [rate(n) for n in range(4)] == about([0.125, 0.25, 0.375, 0.5])
    trainer = Trainer(tiny(steps=40, lr=0.5), corpus)
    trainer.step()
    assert [x["lr"] for x in trainer.optimizer.param_groups] == about([0.125] * 2)


def test_a_resumed_run_draws_the_random_numbers_that_it_would_have_drawn(tmp_path):
    """Whatever draws from torch's own generator, such as a dropout, goes on where it was."""
    corpus = Corpus([TEXT])
    first = Trainer(tiny(), corpus)
    first.step()
    torch.manual_seed(77)
    torch.rand(5)
    first.save(tmp_path)
    want = torch.rand(5)
    second = Trainer(tiny(), corpus)
    assert not torch.equal(torch.rand(5), want)
    second.load(tmp_path)
    assert torch.equal(torch.rand(5), want)


@pytest.mark.parametrize("attention", ["dense", "hash-sparse"])
def test_dropout_differs_by_process_and_step_and_a_resumed_run_draws_what_it_would_have(tmp_path, attention):
    corpus, config = Corpus([TEXT]), tiny(attention=attention, dropout=0.5)
    straight = Trainer(config, corpus)
    rows = [straight.step().loss for _ in range(4)]
    first = Trainer(config, corpus)
    assert [first.step().loss for _ in range(2)] == rows[:2]
    torch.manual_seed(
        99
    )  # what else draws in this process, or a checkpoint of another one, makes no difference
    first.save(tmp_path)
    second = Trainer(config, corpus)
    second.load(tmp_path)
    assert [second.step().loss for _ in range(2)] == rows[2:]
    for name, x in straight.model.named_parameters():
        assert torch.equal(x, dict(second.model.named_parameters())[name])
    assert straight.validate() == second.validate()  # which leaves out nothing

    drawn, plain = set(), set()
    same = corpus.batch(0, 0, slice(0, 2), 4, 32)
    corpus.batch = lambda *_: same
    for rank in range(2):
        for p, losses in ((0.5, drawn), (0.0, plain)):
            trainer = Trainer(tiny(attention=attention, dropout=p, lr=1e-9), corpus)
            trainer.model.load_state_dict(straight.model.state_dict())
            trainer.context.groups, trainer.context.group_rank = 2, rank
            losses.update(trainer.step().loss for _ in range(2))
    assert len(drawn) == 4 and max(plain) - min(plain) < 1e-5
    with pytest.raises(TrainError, match="--dropout is 1"):
        tiny(dropout=1.0)


def test_ctrl_c_saves_and_names_the_command_that_continues(tmp_path, text_file):
    out = tmp_path / "run"
    options = ["--data", text_file, "--length", 32, "--layers", 1, "--width", 32, "--heads", 2]
    options += ["--steps", 100_000]
    process = subprocess.Popen(**command("train", *options, "--out", out))
    deadline = time.monotonic() + 60
    while not (out / "log.csv").exists() or len(read(out)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    step = checkpoint.read_meta(out)["step"]
    assert step == read(out)[-1].step >= 2
    assert f"step {step} is saved" in stdout
    assert f"sparseflash train --resume --out {out}" in stdout
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "attention, options",
    [
        ("dense", {}),
        ("hash-sparse", {"nb": 4, "window_heads": 1, "head_window": 8}),
        ("qk-sparse", {"q_drop": 0.3, "k_drop": 0.3}),
    ],
)
def test_resuming_in_one_process_equals_never_stopping(tmp_path, attention, options):
    corpus = Corpus([TEXT])
    config = tiny(attention=attention, options=options)
    Trainer(config, corpus).run(tmp_path / "a")
    part = Trainer(config, corpus)
    step, part.step = part.step, lambda: step() if part.done < 7 else stop()

    def stop():
        part.save(tmp_path / "b")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        part.run(tmp_path / "b")
    Trainer(config, corpus).run(tmp_path / "b", resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(tiny(), Corpus([TEXT]))
    trainer.step()
    trainer.save(tmp_path)
    before = (tmp_path / checkpoint.FILE).read_bytes()
    trainer.step()
    # A real failing write: files of this process may not grow beyond a few kilobytes.
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(TrainError, match="checkpoint of step 1 is intact.*--resume"):
            trainer.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.FILE]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainError, match="No space left on device"):
        trainer.save(tmp_path)
    assert (tmp_path / checkpoint.FILE).read_bytes() == before


# data parallel


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, text_file):
    options = ["--data", text_file, "--length", 32, "--layers", 1, "--width", 32, "--heads", 2, "--steps", 4]
    options += ["--eval-every", 2, "--eval-sequences", 4, "--device", "cpu", "--accumulate", 2]
    request = command("train", *options, "--batch", 1, "--out", tmp_path / "two")
    # A thread of the group that outlives the run may abort the process while the interpreter ends.
    script = tmp_path / "command.py"
    script.write_text(
        "import atexit, os, pathlib\n"
        "from sparseflash import __main__ as cli\n"
        "names = lambda: [p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "atexit.register(lambda: any('gloo' in name for name in names()) and os._exit(9))\n"
        "cli.main()\n"
    )
    request["args"][1:3] = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script]
    two = subprocess.run(**request, timeout=120)
    assert two.returncode == 0, two.stderr
    Trainer(
        TrainConfig(
            str(text_file),
            length=32,
            layers=1,
            width=32,
            heads=2,
            steps=4,
            batch=2,
            accumulate=2,
            eval_every=2,
        )
    ).run(tmp_path / "one")
    for a, b in zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert (a.val_bpb is None) == (b.val_bpb is None)
        if a.val_bpb is not None:
            assert a.val_bpb == pytest.approx(b.val_bpb, rel=1e-5)


# samples


def test_samples_come_from_the_saved_model_and_the_seed(tmp_path):
    Trainer(tiny(), Corpus([TEXT])).run(tmp_path)
    model, config = load_model(tmp_path)

    def draw(**options):
        return bytes(sample(model, b"line ", 40, length=config.length, **options))

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert draw(temperature=0, seed=1) == draw(temperature=0, seed=2)
    with pytest.raises(TrainError, match="--prompt is empty"):
        next(sample(model, b"", 1, length=8))


# bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 30, "heads": 4}, "--width 30 is not divisible by --heads 4; use --width 32"),
        ({"width": 36, "heads": 4}, "head dimension 9, which is odd.*use --width 40"),
        ({"qk": "both"}, "--qk 'both' is unknown; choose one of: untied, tied"),
        ({"dtype": "fp8"}, "--dtype 'fp8' is unknown; choose one of: fp32, bf16"),
        ({"steps": 0}, "--steps is 0; expected at least 1"),
        ({"lr": -1.0}, "--lr is -1.0"),
    ],
)
def test_impossible_options_are_named(changes, message):
    with pytest.raises(TrainError, match=message):
        tiny(**changes)


def test_bad_data_is_named(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"x" * 100)
    (tmp_path / "none").mkdir()
    for path, message in [
        ("absent", "does not exist"),
        ("empty.txt", "is empty"),
        ("none", "has no text files"),
    ]:
        with pytest.raises(TrainError, match=message):
            load(tmp_path / path)
    with pytest.raises(
        TrainError, match="has 95 bytes for training.*--length 128 needs at least 129; use --length 47"
    ):
        Trainer(tiny(length=128), load(tmp_path / "short.txt"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_data_is_named(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_bytes(TEXT)
    path.chmod(0)
    with pytest.raises(TrainError, match="cannot be read"):
        load(path)


def test_a_diverging_run_says_so():
    trainer = Trainer(tiny(), Corpus([TEXT]))
    with torch.no_grad():
        trainer.model.embed.weight.fill_(math.nan)
    with pytest.raises(TrainError, match="the loss became nan at step 1; use a smaller --lr"):
        trainer.step()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    corpus = Corpus([TEXT])
    Trainer(tiny(steps=1), corpus).run(tmp_path)
    with pytest.raises(TrainError, match="another shape: --width 32 there, 64 given"):
        resume_config(tmp_path, {"width": 64})
    with pytest.raises(
        TrainError, match="another shape: .*is \\(32, 32\\) there and \\(64, 64\\) in this model"
    ):
        Trainer(tiny(width=64), corpus).run(tmp_path, resume=True)
    with pytest.raises(TrainError, match="not the text this run was started with"):
        Trainer(tiny(), Corpus([TEXT + b"!"])).run(tmp_path, resume=True)


def test_an_existing_run_is_not_overwritten(tmp_path):
    corpus = Corpus([TEXT])
    Trainer(tiny(steps=1), corpus).run(tmp_path)
    before = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(
        TrainError, match="already holds a run; continue it with: sparseflash train --resume --out"
    ):
        Trainer(tiny(steps=1), corpus).run(tmp_path)
    assert (tmp_path / "log.csv").read_bytes() == before


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(TrainError, match="has no checkpoint"):
        Trainer(tiny(), Corpus([TEXT])).run(tmp_path, resume=True)
    (tmp_path / checkpoint.FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(TrainError, match="not a readable checkpoint"):
        Trainer(tiny(), Corpus([TEXT])).run(tmp_path, resume=True)
