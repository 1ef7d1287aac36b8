"""The wheel: complete, small in its needs, and working when it is installed alone."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sparseflash
from sparseflash.backends.cpu import build, shipped
from test_imports import imports_of

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "src" / "sparseflash"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build with the installed hatchling: no network, no isolated environment."""
    out = tmp_path_factory.mktemp("wheel")
    run = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Unpack the wheel into a folder that holds nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(target), str(wheel)], check=True, capture_output=True, text=True)
    return target


def test_the_wheel_carries_every_file_of_the_package(wheel):
    wanted = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".json", ".csv") or path.name == "py.typed"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wanted <= names, sorted(wanted - names)
    native = [name for name in names if name.startswith("sparseflash/backends/cpu/native/")]
    assert any(name.endswith(".cpp") for name in native), (
        "the CPU backend is compiled from sources in the wheel"
    )
    assert "sparseflash/py.typed" in names


def test_the_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if not n.startswith(("sparseflash/", "sparseflash-"))] == []
    assert [n for n in names if re.search(r"\.(pyc|so|o|dylib|log)$|__pycache__", n)] == []


def test_the_core_needs_torch_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    needs = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    assert [n for n in needs if "extra ==" not in n] == ["torch>=2.11"]


@pytest.mark.parametrize("part", ["bench", "train"])
def test_an_extra_has_what_its_part_imports_first_thing(part):
    extra = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"][part]
    names = {re.match(r"[A-Za-z0-9_.-]+", need)[0] for need in extra} | {"torch", "sparseflash"}
    for path in (PACKAGE / part).rglob("*.py"):
        tops = {name.split(".")[0] for _, name, inside in imports_of(path, PACKAGE) if not inside}
        assert tops - names <= sys.stdlib_module_names, path


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    pins = dict(
        re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    )
    names = {re.match(r"[A-Za-z0-9_.-]+", need)[0] for need in needed}
    assert names <= set(pins), sorted(names - set(pins))
    assert pins["torch"] == "2.13.0"
    assert re.search(
        r'^triton==3\.7\.1; sys_platform == "linux"$', (REPO / "constraints.txt").read_text(), re.M
    )


def test_one_version_everywhere(wheel):
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert sparseflash.__version__ == version
    assert wheel.name == f"sparseflash-{version}-py3-none-any.whl"
    assert f"\nversion: {version}\n" in (REPO / "CITATION.cff").read_text()


ALONE = """
import sys
import torch
import sparseflash as sf

folder, backend = sys.argv[1:]
assert sf.__file__.startswith(folder), sf.__file__
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 129, 32, requires_grad=True) for _ in range(3))
sparse = sf.attention(q, k, v, causal=True, backend=backend)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(sparse, dense)
for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (sparse, dense))):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
bucket = torch.arange(129).view(1, 1, 129) % 4
plan = sf.Plan.from_buckets(bucket, bucket)
mask = plan.to_dense().expand(1, 2, 129, 129)
torch.testing.assert_close(
    sf.attention(q, k, v, plan, backend=backend),
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask),
)
print("works alone")
"""


def test_the_installed_wheel_works_alone(installed, tmp_path):
    """From a folder with nothing but the wheel, an empty compile cache, and outside the repository."""
    env = {n: v for n, v in os.environ.items() if not n.startswith("SPARSEFLASH_")}
    env |= {"PYTHONPATH": str(installed), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = build.find_compiler()
    if found:  # every level is compiled; optimising them would only take longer
        quick = tmp_path / "quick-c++"
        quick.write_text(f'#!/bin/sh\nexec {shlex.join(found)} "$@" -O0\n')
        quick.chmod(0o755)
        env["CXX"] = str(quick)
    command = [sys.executable, "-c", ALONE, str(installed), "cpu" if found else "reference"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("works alone")


@pytest.fixture(scope="module")
def shipped_library(tmp_path_factory) -> Path:
    """The simplest level as a wheel ships it, not optimised."""
    found = build.find_compiler()
    if not found or platform.machine() not in shipped.LEVELS:
        pytest.skip("needs a C++ compiler, on a kind of machine that wheels bring a library for")
    folder = tmp_path_factory.mktemp("shipped")
    quick = folder / "quick-c++"
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(found)} "$@" -O0\n')
    quick.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(quick))
        patch.setattr(shipped, "LEVELS", {platform.machine(): ("portable",)})
        shipped.make(folder / "prebuilt")
    return folder / "prebuilt"


def test_a_shipped_library_is_loaded_where_it_holds_what_runs_here(shipped_library, tmp_path):
    assert {path.name for path in shipped_library.iterdir()} == {"about.json", "libsparseflash.so"}
    portable = [build.LEVELS["portable"]]
    library, path = shipped.find(portable, shipped_library)
    assert path.parent == shipped_library and library.sf_level_name(0) == b"portable"
    assert shipped.find([build.LEVELS["avx2"]], shipped_library) is None
    assert shipped.find(portable, tmp_path) is None


@pytest.mark.parametrize("fault", ["damaged", "of other sources", "for another machine", "no JSON"])
def test_a_shipped_library_that_is_not_ours_is_passed_over(shipped_library, tmp_path, fault):
    for path in shipped_library.iterdir():
        shutil.copy(path, tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    wrong = {"of other sources": {"sources": "0" * 64}, "for another machine": {"machine": "vax"}}
    about |= wrong.get(fault, {})
    (tmp_path / "about.json").write_text("{" if fault == "no JSON" else json.dumps(about))
    if fault == "damaged":
        (tmp_path / "libsparseflash.so").write_bytes(b"\x7fELF")
    assert shipped.find([build.LEVELS["portable"]], tmp_path) is None


def test_what_ships_says_nothing_of_the_processor_that_compiled_it():
    for machine, names in shipped.LEVELS.items():
        for name in names:
            flags = shipped._general(build.LEVELS[name].flags, machine)
            assert not [x for x in flags if "native" in x], (name, flags)
    with pytest.raises(ValueError, match="expected one of x86_64, aarch64"):
        shipped.make(machine="vax")


def test_the_command_says_in_one_line_what_it_misses(installed, tmp_path):
    """Without typer and rich the command line names the extra to install, and prints no traceback."""
    block = (
        "import sys\n"
        "for name in ('typer', 'rich', 'click'):\n"
        "    sys.modules[name] = None\n"
        "from sparseflash.__main__ import main\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert "sparseflash[train]" in run.stderr


def test_the_installed_bench_writes_below_the_current_directory(installed, tmp_path):
    pytest.importorskip("typer")
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    tiny = ["--methods", "window", "--lengths", "16", "--heads", "1", "--head-dim", "16", "--quick"]
    command = [sys.executable, "-m", "sparseflash", "bench", *tiny]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.csv")] == [
        "bench/attention.csv"
    ]


def test_the_whole_check_lints_before_it_tests_and_help_names_every_target():
    root = Path(__file__).parents[2]
    made = (root / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: help (.*)$", made, re.MULTILINE)[1].split()
    assert set(targets) == set(re.findall(r"^\t@echo 'make ([\w-]+)", made, re.MULTILINE))
    lint = re.search(r"^lint: .*\n((?:\t.*\n)+)", made, re.MULTILINE)[1]
    assert [x for x in ("ruff check", "ruff format --check", "mypy") if x not in lint] == []
    if (root / ".ci" / "run").exists():  # not where a source distribution was unpacked
        assert (root / ".ci" / "run").read_text().endswith("make lint\nmake test\n")
