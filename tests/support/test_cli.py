"""The command line: what it teaches, and that every mistake is one line."""

import dataclasses
import re
import sys
import typing
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

import sparseflash as sf
from benchmarks.experiments.commands import experiments
from sparseflash import __main__ as cli
from sparseflash import methods
from sparseflash.bench import demo, harness, results
from sparseflash.bench.commands import app as bench_app
from sparseflash.bench.commands import methods as bench_methods
from sparseflash.bench.commands import options
from sparseflash.train import TrainConfig

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it brings, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script with arguments, or an experiment by its name; its exit status, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparseflash", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            bench_app.call(experiments if arguments[0] in bench_app.EXPERIMENTS else cli.app)
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), ANSI.sub("", out), ANSI.sub("", err)

    return call


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of {i * i % 13}\n" for i in range(300)))
    return path


TINY = ("--length", 16, "--layers", 1, "--width", 16, "--heads", 2, "--steps", 3, "--eval-sequences", 1)


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    for command in ("train", "sample", "demo", "bench", "doctor", "methods", "show"):
        assert re.search(rf"^\W*{command}\b", out, re.MULTILINE), command


def commands(group, name=""):
    for child, command in group.commands.items():
        yield f"{name} {child}".strip(), command
        if hasattr(command, "commands"):
            yield from commands(command, child)


def test_every_option_of_every_command_is_explained():
    import typer

    found = dict(commands(typer.main.get_command(cli.app)))
    found |= dict(commands(typer.main.get_command(experiments)))
    assert {"train", "bench curves", "mqar"} <= found.keys()
    assert [name for name, command in found.items() if not command.help] == []
    self_evident = {"layers", "heads"}
    options = [(name, p) for name, command in found.items() for p in command.params]
    assert [(n, p.name) for n, p in options if not p.help and p.name not in self_evident] == []


def test_every_number_has_a_range():
    apps = (cli.app, cli.bench, experiments)
    functions = dict.fromkeys(x.callback for app in apps for x in app.registered_commands)
    free, numbers = [], 0
    for function in (*functions, cli.bench.registered_callback.callback):
        for name, hint in typing.get_type_hints(function, include_extras=True).items():
            kind, *info = typing.get_args(hint) or (None,)
            if info and {int, float} & {kind, *typing.get_args(kind)}:
                numbers += 1
                free += [f"{function.__name__}: {name}"] if info[0].min is None else []
    assert free == [] and numbers > 50


def test_what_needs_more_memory_than_there_is_says_so(run, tmp_path):
    status, _, err = run("show", "window", "--length", 2**36)
    assert status == 1 and "GiB at once; ask for less" in err


def test_a_file_is_what_its_name_says(run, tmp_path):
    status, _, err = run("show", "window", "--out", tmp_path / "plan.jpg")
    assert status == 1 and "ends in .png, .svg, .pdf, .txt" in err and not list(tmp_path.iterdir())


@pytest.fixture
def full_disk():
    """No file may grow beyond 64 bytes: what a full disk does to a program, without one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [None, "what was there\n"])
@pytest.mark.parametrize("name", ["plan.png", "plan.svg", "plan.pdf", "plan.txt", "rows.csv", "lines.svg"])
def test_a_full_disk_leaves_files_whole_or_none(run, tmp_path, request, name, old):
    out = tmp_path / "out" / name
    out.parent.mkdir()
    if name.startswith("plan"):
        command = ("show", "window", "--length", 32, "--out", out)
    elif name.endswith(".csv"):
        command = ("bench", "curves", "--out", out, "--lengths", "16", "--heads", 1, "--dim", 16)
    else:
        row = {"bench": "curves", "dtype": "fp32", "case": "window", "ms": 1.0}
        results.write(tmp_path / "curves.csv", [{**row, "T": n} for n in (8, 16)])
        out = out.with_name("curves-fp32.svg")
        command = ("bench", "plot", tmp_path / "curves.csv", "--out", out.parent)
    if old:
        out.write_text(old)
    request.getfixturevalue("full_disk")
    status, _, err = run(*command)
    assert status == 1 and err.startswith("error: ") and "large" in err, err
    assert [x.name for x in out.parent.iterdir()] == [out.name] * bool(old)
    assert not old or out.read_text() == old


def test_doctor_builds_and_says_so(run, monkeypatch):
    status, out, _ = run("doctor", "--build")
    assert status == 0 and re.search(r"^CPU kernels +ready after \d+ s: fp32", out, re.MULTILINE)
    monkeypatch.setattr("sparseflash.backends.cpu.status", lambda: (False, "no C++ compiler found"))
    status, out, _ = run("doctor", "--build")
    assert status == 1 and re.search(r"^CPU kernels +failed: no C\+\+ compiler", out, re.MULTILINE)


def test_a_seed_that_no_generator_takes_is_a_usage_error(run):
    for command in (("show", "window"), ("train", "--data", "x", "--out", "y"), ("demo",)):
        status, _, err = run(*command, "--seed", 10**22)
        assert status == 2 and "--seed" in err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("sample", "run", "--tokens", -1), "--tokens"),
        (("show", "window", "--length", 0), "--length"),
        (("bench", "curves", "--heads", 0), "--heads"),
        (("bench", "--methods", "window", "--density", 1.5), "--density"),
    ],
)
def test_a_number_out_of_range_is_a_usage_error(run, arguments, option):
    status, _, err = run(*arguments)
    assert status == 2 and option in err and "than or equal to" in err


def test_numbers_in_lists_have_a_range(run):
    for option, *command in (
        ("--lengths", "bench", "curves"),
        ("--dims", "bench", "breakeven"),
        ("--rates", "long-run"),
    ):
        status, _, err = run(*command, option, "-8")
        assert status == 1 and "'-8' has -8" in err
    assert "names none" in run("bench", "curves", "--lengths", ",")[2]


def test_a_run_can_be_trained_resumed_and_sampled(run, tmp_path, text_file):
    out_dir = tmp_path / "run"
    status, out, err = run("train", "--data", text_file, "--out", out_dir, *TINY)
    assert status == 0, err
    assert "validation" in out and "sparseflash sample" in out
    assert sorted(p.name for p in out_dir.iterdir()) == ["checkpoint.safetensors", "curves.png", "log.csv"]
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = run("train", "--resume", "--out", out_dir, "--steps", 5)
    assert status == 0, err
    assert [line.split(",")[0] for line in (out_dir / "log.csv").read_text().split()[1:]] == [
        "1",
        "2",
        "3",
        "4",
        "5",
    ]
    status, out, err = run("sample", out_dir, "--prompt", "line", "--tokens", 8)
    assert status == 0 and out.startswith("line")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "{tmp}/a"], "no --data given"),
        (["--data", "{tmp}/absent", "--out", "{tmp}/a"], "does not exist"),
        (["--data", "{text}", "--out", "{tmp}/a", "--width", 30], "not divisible by --heads 4"),
        (["--data", "{text}", "--out", "{tmp}/a", "--length", 100000], "use --length"),
        (["--resume", "--out", "{tmp}/a"], "has no checkpoint"),
        (
            ["--data", "{text}", "--out", "{tmp}/a", "--length", 16, "--attention", "nonsense"],
            "choose one of: dense, ",
        ),
        (
            ["--data", "{text}", "--out", "{tmp}/a", "--length", 16, "--nb", 4],
            "dense attention takes no options",
        ),
        (["--data", "{text}", "--out", "{tmp}/a", "--device", "tpu"], "choose one of: auto, cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, text_file, arguments, message):
    filled = [str(a).format(tmp=tmp_path, text=text_file) for a in arguments]
    status, _, err = run("train", *filled)
    assert status == 1
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


def test_unknown_options_and_wrong_types_are_usage_errors(run):
    assert run("train", "--nonsense")[0] == 2
    assert run("train", "--out", "x", "--steps", "many")[0] == 2


def test_doctor_tells_what_is_usable_and_why_not(run):
    status, out, _ = run("doctor")
    assert status == 0
    for name in ("triton", "cpu", "reference"):
        assert re.search(rf"^{name} +(not )?usable: \S", out, re.MULTILINE)


def test_methods_lists_the_registry(run):
    status, out, _ = run("methods")
    assert status == 0
    for name in methods.names():
        assert re.search(rf"^{name}$", out, re.MULTILINE)
        assert repr(methods.get(name)) in out


def test_show_draws_a_plan(run, tmp_path):
    status, out, _ = run("show", "hash-sparse", "--length", 64)
    assert status == 0 and out.startswith("Plan(")
    assert run("show", "hash-sparse", "--length", 64, "--out", tmp_path / "plan.txt")[0] == 0
    assert (tmp_path / "plan.txt").read_text() == out
    status, _, err = run("show", "dense")
    assert status == 1 and "has no plan to draw" in err


def test_fuse_shows_the_derivation_and_draws_it(run, tmp_path):
    sizes = ("--set", "m=256", "--set", "n=256")
    status, out, err = run("fuse", "attention", *sizes, "--emit", "--draw", tmp_path / "steps")
    assert status == 0, err
    assert "R4 swap scale and product" in out and "@triton.jit" in out
    (off,) = re.findall(r"of fp64 inputs: (\S+)", out)
    assert float(off) < 1e-12
    assert len(list((tmp_path / "steps").glob("attention-*.svg"))) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layernorm",), "no program layernorm; expected attention, layernorm-matmul, rmsnorm-swiglu"),
        (("attention", "--set", "z=3"), "sizes of m, d, n, l, z; expected m, d, n, l"),
        (("attention", "--local", "1"), "no blocks of 16 or more fit into 1024 bytes"),
        (("attention", "--set", "m=many"), "a size of m is many; expected a whole number"),
        (("attention", "--draw", "/proc/nowhere"), "cannot write --draw /proc/nowhere"),
    ],
)
def test_fuse_says_what_is_wrong_in_one_line(run, arguments, message):
    status, _, err = run("fuse", *arguments)
    assert status == 1 and message in err and len(err.splitlines()) == 1


def test_bench_writes_its_rows(run, tmp_path):
    status, _, err = run(
        "bench", "curves", "--out", tmp_path / "c.csv", "--lengths", "64", "--heads", 1, "--dim", 16
    )
    assert status == 0, err
    header, *rows = (tmp_path / "c.csv").read_text().splitlines()
    assert {"case", "T", "ms", "density", "recall", "cpu", "torch", "git"} <= set(header.split(","))
    assert len(rows) == 12
    tiny = ("--lengths", "32", "--heads", 1, "--head-dim", 16, "--quick", "--out", tmp_path)
    status, out, err = run("bench", "--methods", "window", "--baselines", "sdpa", "--set", "window=8", *tiny)
    assert status == 0, err
    assert "2 rows" in out and "Window(window=8" in (tmp_path / "attention.csv").read_text()
    assert (tmp_path / "attention-both-fp32.svg").is_file()
    assert run("bench", "compare", tmp_path / "attention.csv", tmp_path / "attention.csv")[0] == 0
    for given, said in (
        (("--methods", "hash"), "did you mean 'hash-sparse'"),
        (("--baselines", "sdpa", "--direction", "up"), "choose from: forward; backward; both"),
        (("--methods", "window,strided", "--set", "window=8"), "write it as --set method.window"),
        (("--methods", "window", "--set", "widow=8"), "it has: window=512, causal=True"),
    ):
        status, _, err = run("bench", *given, *tiny)
        assert status == 1 and said in err, err
    status, _, err = run("bench", "curves", "--lengths", "1k")
    assert status == 1 and "write them as 1024,2048" in err
    status, _, err = run("step", "--dtypes", "fp8")
    assert status == 1 and "choose from: fp32; bf16" in err


def test_bench_says_where_the_experiments_are_and_writes_below_the_current_directory(run):
    import typer

    here = {x.name for x in cli.bench.registered_commands}
    there = {x.name for x in experiments.registered_commands}
    assert there - here == {"tables", *bench_app.EXPERIMENTS} and here <= there
    for name in bench_app.EXPERIMENTS:
        status, _, err = run("bench", name, "--help")
        assert status == 1 and f"run there: python -m benchmarks.experiments {name}\n" in err, err
    for app, folder in ((cli.bench, "bench"), (experiments, "benchmarks/results")):
        group = typer.main.get_command(app)
        with group.make_context("bench", ["curves"]) as above:
            for name, option in (("curves", "out"), ("breakeven", "out"), ("plot", "directory")):
                below = group.commands[name].make_context(name, [], parent=above)
                assert str(below.params[option]).startswith(folder)
    status, _, err = run("bench", "--lengths", "64")
    assert status == 1 and "nothing to measure" in err
    _, out, err = run("bench")
    assert "--methods" in out + err


def test_the_pages_name_commands_that_exist():
    apps = {"sparseflash bench": cli.bench, "benchmarks.experiments": experiments}
    root = Path(__file__).parents[2]
    for page in (root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")):
        for program, name in re.findall(f"({'|'.join(apps)}) ([a-z][a-z-]+)", page.read_text()):
            assert name in {x.name for x in apps[program].registered_commands}, (page, program, name)


def test_the_version_is_the_packages(run):
    assert run("--version") == (0, sf.__version__ + "\n", "")


def test_every_field_of_every_method_is_described(run):
    for name in methods.names():
        fields = dataclasses.fields(methods.find(name))
        said = options.described(methods.find(name))
        assert list(said) == [x.name for x in fields] and all(said.values()), name
        status, out, _ = run("methods", name)
        assert status == 0
        assert re.findall(r"^  (\w+) = (.*)$", out, re.MULTILINE) == [
            (x.name, repr(x.default)) for x in fields
        ]
    status, _, err = run("methods", "windw")
    assert status == 1 and "did you mean 'window'" in err


def test_defaults_are_those_of_the_dataclasses():
    import typer

    for command, cls, kept in (
        ("train", TrainConfig, cli.TRAINING),
        ("bench", harness.Settings, bench_methods.SETTINGS),
    ):
        found = {x.name: x for x in typer.main.get_command(cli.app).commands[command].params}
        for field in dataclasses.fields(cls):
            if field.name in kept:
                assert found[field.name].default == field.default, field.name


@pytest.mark.parametrize(
    ("attention", "given", "expected"),
    [
        (
            "hash-sparse",
            ("--nb", 4, "--window-heads", 1, "--window", 8),
            {"nb": 4, "window_heads": 1, "window": 8},
        ),
        ("hash-sparse", ("--planes", "shared", "--set", "nb=8"), {"planes": "shared", "nb": 8}),
        ("qk-sparse", ("--drop", 0.25), {"q_drop": 0.25, "k_drop": 0.25}),
        ("qk-sparse", ("--set", "q_drop=0.25"), {"q_drop": 0.25}),
        ("window", ("--window", 8), {"window": 8}),
        ("dense", (), {}),
    ],
)
def test_short_names_and_set_reach_the_method(run, monkeypatch, tmp_path, attention, given, expected):
    from sparseflash.train import session

    configs = []
    monkeypatch.setattr(session, "train", lambda config, *_, **__: configs.append(config) or 0)
    status, _, err = run("train", "--data", "x", "--out", tmp_path, "--attention", attention, *given)
    assert status == 0, err
    assert configs == [TrainConfig("x", attention, expected)]


def test_a_value_that_a_method_refuses_is_one_line(run, tmp_path, text_file):
    start = ("train", "--data", text_file, "--out", tmp_path / "a", *TINY)
    for given, said in (
        (("--attention", "hash-sparse", "--nb", "many"), "nb='many': expected an even number"),
        (("--attention", "qk-sparse", "--drop", 2), "q_drop=2"),
        (("--attention", "window", "--set", "widow=3"), "did you mean 'window'? it has: window=512"),
    ):
        status, _, err = run(*start, *given)
        assert status == 1 and said in err and err.count("\n") == 1


def test_the_sparse_models_of_the_demo_take_settings(run):
    changed = demo.sparse({"nb": 4, "window": 32})
    assert [x.changes["options"] for x in changed] == [
        {"nb": 4, "window": 32, "window_heads": n} for n in (1, 0)
    ]
    assert all("(4 buckets)" in x.what for x in changed)
    assert [x.changes["options"] for x in demo.sparse({})] == [{"nb": 16, "window_heads": n} for n in (1, 0)]
    assert "it has: nb=16" in run("demo", "--set", "bucket=4")[2]
    assert "differ in" in run("demo", "--set", "window_heads=4")[2]
