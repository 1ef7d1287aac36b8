"""The native library on machines that are not as they should be: it is built, or it is said why not."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import sparseflash as sf
from sparseflash.backends import cpu
from sparseflash.backends.cpu import build
from sparseflash.common import files

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler here")
PORTABLE = [build.LEVELS["portable"]]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the library yet, with an empty cache of its own."""
    for name in ("SPARSEFLASH_CPU_LEVEL", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPARSEFLASH_CACHE", str(tmp_path / "cache"))
    cpu.native.cache_clear()
    yield tmp_path / "cache"
    cpu.native.cache_clear()


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Make a compiler of one's own: a shell script, `$cxx` the real one; each call adds a line to calls."""
    real = build.find_compiler()[0]

    def make(script: str, folder: str = "tools") -> Path:
        path = tmp_path / folder / "c++"
        path.parent.mkdir(parents=True, exist_ok=True)
        calls = tmp_path / "calls"
        path.write_text(f'#!/bin/sh\ncxx="{real}"\necho "$*" >> "{calls}"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return calls

    return make


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A library of the portable level, built once without optimisation."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "COMMON", (*build.COMMON, "-O0"))
        patch.setenv("SPARSEFLASH_CACHE", str(folder))
        return build.library(PORTABLE)[1]


@pytest.fixture
def copying(built, monkeypatch):
    """Instead of compiling, copy the library that is already built; the list counts the times."""
    times = []

    def copy(levels, compiler, target):
        times.append(target)
        shutil.copy(built, target)
        shutil.copy(built.with_suffix(".sha256"), target.with_suffix(".sha256"))

    monkeypatch.setattr(build, "compile_library", copy)
    return times


def right() -> None:
    """Attention of the backend that is chosen now is right."""
    q, k, v = torch.randn(3, 1, 2, 100, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = sf.attention(q, k, v, causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, want)


def test_a_library_is_built_once_and_found_again(fresh, copying):
    first, second = build.library(PORTABLE), build.library(PORTABLE)
    assert first[1] == second[1] and first[1].parent == fresh
    assert len(copying) == 1
    assert second[0].sf_level_name(0) == b"portable"
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700


def apart(path: Path) -> None:
    """Put a copy in place of a file that this process has loaded: what is mapped must stay whole."""
    shutil.copy(path, aside := path.with_suffix(".aside"))
    os.replace(aside, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": cut,
    "one bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "of another program": lambda path: path.write_text("#!/bin/sh\n"),
    "without its checksum": lambda path: path.with_suffix(".sha256").unlink(),
    "with a checksum of garbage": lambda path: path.with_suffix(".sha256").write_bytes(b"\xff\x00\xfe"),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_library_is_built_again(fresh, copying, damage):
    target = build.library(PORTABLE)[1]
    whole = target.read_bytes()
    apart(target)
    damage(target)
    library, path = build.library(PORTABLE)
    assert path == target and len(copying) == 2
    assert library.sf_levels() == 1 and target.read_bytes() == whole


def test_every_process_looks_for_the_same_library():
    script = (
        "from sparseflash.backends.cpu import build\n"
        "print([build._names([level], ['/bin/sh']) for level in build.LEVELS.values()])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(sf.__file__).parent.parent)}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str([build._names([x], ["/bin/sh"]) for x in build.LEVELS.values()])


def test_other_sources_flags_or_compilers_mean_another_library(fresh, monkeypatch, tmp_path):
    name, tool = build._names(PORTABLE, ["/bin/sh"])
    assert build._names([build.LEVELS["avx512"]], ["/bin/sh"])[0] != name
    assert build._names(PORTABLE, ["/bin/sh", "-m64"])[1] != tool
    copy = tmp_path / "native"
    shutil.copytree(build.NATIVE, copy)
    monkeypatch.setattr(build, "NATIVE", copy)
    assert build._names(PORTABLE, ["/bin/sh"]) == (name, tool)
    with open(copy / "kernel.h", "a") as file:
        file.write("\n")
    assert build._names(PORTABLE, ["/bin/sh"])[0] != name
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"another processor"}))
    assert build._names(PORTABLE, None)[0] != name


def test_a_library_outlives_its_compiler(fresh, copying, monkeypatch, tmp_path):
    path = build.library(PORTABLE)[1]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() is None
    assert build.library(PORTABLE)[1] == path
    apart(path)
    cut(path)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found: install"):
        build.library(PORTABLE)


@pytest.mark.parametrize("mode", [0o777, 0o770], ids=["all", "the group"])
def test_a_folder_that_others_can_write_is_not_trusted(fresh, copying, mode):
    fresh.mkdir()
    fresh.chmod(mode)
    with pytest.warns(RuntimeWarning, match="is writable by other users.*SPARSEFLASH_CACHE"):
        path = build.library(PORTABLE)[1]
    assert path.parent != fresh and list(fresh.iterdir()) == []
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def somebody_else(monkeypatch, *paths):
    """Let these belong to another user."""
    me, real = os.getuid(), files.distrust

    def distrust(path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getuid", lambda: me + (path in paths))
            return real(path)

    monkeypatch.setattr(build, "distrust", distrust)


def test_a_folder_of_somebody_else_is_not_trusted(fresh, copying, monkeypatch):
    fresh.mkdir(mode=0o700)
    somebody_else(monkeypatch, fresh)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert build.library(PORTABLE)[1].parent != fresh


@pytest.mark.parametrize("suffix", [".so", ".sha256"])
@pytest.mark.parametrize("whose", ["all can write", "the group can write", "of somebody else"])
def test_a_library_that_others_can_change_is_built_again(fresh, copying, monkeypatch, suffix, whose):
    """A trusted folder may hold files that are not: put there when it was open, or by `cp -p`."""
    target = build.library(PORTABLE)[1]
    file = target.with_suffix(suffix)
    apart(target)
    if whose == "of somebody else":
        somebody_else(monkeypatch, file)
        with pytest.warns(RuntimeWarning, match="loads no libraries"):  # the fresh one is theirs too, here
            assert build.library(PORTABLE)[1].parent != fresh
    else:
        file.chmod(0o702 if whose == "all can write" else 0o720)
        build.library(PORTABLE)
    assert copying.count(target) == 2


def test_what_is_built_under_a_lax_umask_is_trusted(fresh, tool):
    calls = tool('exec "$cxx" "$@" -O0')
    before = os.umask(0)
    try:
        build.library(PORTABLE)
    finally:
        os.umask(before)
    seen = calls.read_text()
    build.library(PORTABLE)
    assert calls.read_text() == seen


def test_a_cache_named_from_the_current_directory_serves_every_process(fresh, copying, monkeypatch):
    """A loader takes a name without a slash for that of a library of the system."""
    fresh.mkdir(mode=0o700)
    monkeypatch.chdir(fresh)
    for name in (".", "deep/er"):
        monkeypatch.setenv("SPARSEFLASH_CACHE", name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = build.library(PORTABLE), build.library(PORTABLE)
        assert first[1] == second[1] and first[1].parent == fresh / name
    assert len(copying) == 2


def test_a_library_in_a_folder_that_cannot_be_written_is_used(fresh, copying, monkeypatch):
    build.library(PORTABLE)
    before = sorted(fresh.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert build.library(PORTABLE)[1].parent == fresh
    assert sorted(fresh.iterdir()) == before and len(copying) == 1


def test_without_a_writable_home_a_temporary_folder_serves_and_goes(built, tmp_path):
    """In a process of its own: the folder goes when that ends."""
    script = (
        "import sys, shutil, pathlib, torch, warnings\n"
        "import sparseflash as sf\n"
        "from sparseflash.backends.cpu import build\n"
        "def copy(levels, compiler, target):\n"
        "    shutil.copy(sys.argv[1], target)\n"
        "    shutil.copy(pathlib.Path(sys.argv[1]).with_suffix('.sha256'), target.with_suffix('.sha256'))\n"
        "build.compile_library = copy\n"
        "q, k, v = torch.randn(3, 1, 2, 65, 16)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    out = sf.attention(q, k, v, causal=True)\n"
        "    sf.attention(q, k, v, causal=True)\n"
        "torch.testing.assert_close(\n"
        "    out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))\n"
        "print(sf.backend_status()['cpu'].detail)\n"
        "print(len(said), said[0].message)\n"
    )
    env = {n: x for n, x in os.environ.items() if n not in ("XDG_CACHE_HOME", "SPARSEFLASH_CACHE", "CXX")}
    env |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path), "SPARSEFLASH_CPU_LEVEL": "portable"}
    env["PYTHONPATH"] = str(Path(sf.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", script, str(built)], env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    used, said = run.stdout.strip().splitlines()
    assert str(tmp_path) in used
    assert said.startswith("1 ") and "/dev/null" in said and "SPARSEFLASH_CACHE" in said
    assert [x for x in tmp_path.iterdir() if x.name.startswith("sparseflash-")] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_two_processes_that_start_together_compile_once(fresh, tool):
    calls = tool('exec "$cxx" "$@" -O0')
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if build.library(PORTABLE)[0].sf_levels() == 1 else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert len(calls.read_text().splitlines()) == 3  # two sources and the link, once


def test_without_a_compiler_the_reference_runs_and_says_so_once(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning) as said:
        q = torch.randn(1, 1, 20, 8)
        sf.attention(q, q, q)
        sf.attention(q, q, q)
    assert len(said) == 1
    (text,) = (str(x.message) for x in said)
    assert "the slow reference runs" in text and "CXX=no-such-compiler" in text and "install g++" in text
    assert "\n" not in text
    status = sf.backend_status()["cpu"]
    assert not status.usable and "no C++ compiler found" in status.detail
    with pytest.raises(sf.BackendError, match="no C\\+\\+ compiler found"):
        sf.attention(q, q, q, backend="cpu")
    right()


def test_a_line_says_that_it_compiles_before_it_does(fresh, tool, caplog):
    """So that half a minute of silence at the first call is no riddle."""
    tool("exit 1")
    with caplog.at_level("WARNING", logger="sparseflash"), pytest.raises(build.CompilerFailed):
        build.library(PORTABLE)
    seen = [record.message for record in caplog.records if record.name == "sparseflash"]
    assert len(seen) == 1 and "compiling the CPU kernels" in seen[0] and "half a minute" in seen[0]


def test_a_compiler_that_fails_leaves_a_log_and_one_line(fresh, tool):
    calls = tool('echo "internal error: out of luck" >&2; exit 3')
    with pytest.warns(
        RuntimeWarning, match="the C\\+\\+ compiler failed; its output is in .*\\.log$"
    ) as said:
        right_q = torch.randn(1, 1, 9, 8)
        sf.attention(right_q, right_q, right_q)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    log = Path(str(said[0].message).rpartition(" ")[2]).read_text()
    assert "out of luck" in log and "exit status 3" in log and "-std=c++17" in log
    assert "-march=native" in calls.read_text().splitlines()[-1] or "api.cpp" in calls.read_text()
    assert sorted(x.suffix for x in fresh.iterdir() if x.suffix in (".so", ".sha256")) == []
    right()


@pytest.mark.skipif(not build.LEVELS["avx512"].needs <= build.cpu_flags(), reason="needs AVX-512")
def test_a_compiler_too_old_for_the_processor_builds_a_simpler_level(fresh, tool):
    tool('case "$*" in *x86-64-v4*) echo "unknown architecture" >&2; exit 1;; esac\nexec "$cxx" "$@" -O0')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.native().names == ("avx2",)
    right()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Whether none of them lives, soon: what was killed takes a moment to die on a busy machine."""
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def sleepers(folder: Path) -> list[int]:
    return [int(x) for x in (folder / "sleepers").read_text().split()]


HANG = 'sleep 100 &\necho $! >> "{}/sleepers"\nwait'


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_compiler_that_hangs_is_given_up(fresh, tool, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "TIME_LIMIT", 1.0)
    tool(HANG.format(tmp_path))
    start = time.monotonic()
    with pytest.raises(build.BuildError, match="did not end within 1 s; its command is in"):
        build.library(PORTABLE)
    assert time.monotonic() - start < 30
    assert sleepers(tmp_path) and gone(sleepers(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_ctrl_c_while_compiling_leaves_nothing_behind(fresh, tool, tmp_path):
    tool(HANG.format(tmp_path))

    def interrupt():
        while not (tmp_path / "sleepers").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        build.library(PORTABLE)
    helper.join()
    assert gone(sleepers(tmp_path))
    assert [x for x in fresh.iterdir() if x.is_dir()] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_what_a_killed_process_left_is_removed_by_the_next(fresh, tool, tmp_path):
    tool(f'[ -e "{tmp_path}/sleepers" ] && exec "$cxx" "$@" -O0\n{HANG.format(tmp_path)}')
    child = os.fork()
    if child == 0:
        build.library(PORTABLE)
        os._exit(0)
    while not (tmp_path / "sleepers").exists():
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for pid in sleepers(tmp_path):
        os.kill(pid, signal.SIGKILL)
    (left,) = [x for x in fresh.iterdir() if x.is_dir()]
    other, old = fresh / f"another{build.WORK}1", fresh / f"another{build.WORK}2"  # who may be at work
    other.mkdir(), old.mkdir()
    os.utime(old, (0, 0))
    build.library(PORTABLE)
    assert not left.exists() and not old.exists() and other.exists()


def test_a_compiler_that_is_not_found_is_named_with_the_one_that_serves(fresh, copying, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.warns(RuntimeWarning, match="CXX=no-such-compiler -m64 is no compiler here: .* is used"):
        build.library(PORTABLE)
    monkeypatch.setenv("CXX", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.library(PORTABLE)


def test_warnings_point_at_the_line_of_the_caller(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    q = torch.randn(1, 1, 20, 8)
    for call in (lambda: sf.attention(q, q, q), sf.backend_status, lambda: sf.methods.Window(4)(q, q, q)):
        cpu.native.cache_clear()
        with pytest.warns(RuntimeWarning) as said:
            call()
        assert {x.filename for x in said} == {__file__}


def test_cxx_may_hold_spaces_or_arguments(fresh, tool, monkeypatch):
    tool("exit 0", folder="my tools")
    path = os.environ["CXX"]
    assert build.find_compiler() == [path]
    monkeypatch.setenv("CXX", f"'{path}' -m64 -DX=1")
    assert build.find_compiler() == [path, "-m64", "-DX=1"]
    monkeypatch.setenv("CXX", f"{shutil.which('sh')} -e")
    assert build.find_compiler() == [shutil.which("sh"), "-e"]
    for given in ("gone", "'", "", "gone -m64"):  # the usual names then
        monkeypatch.setenv("CXX", given)
        assert Path(build.find_compiler()[0]).name in ("c++", "g++", "clang++")


@pytest.mark.parametrize(
    ("asked", "flags", "said"),
    [
        ("avx9000", None, "expected one of portable, neon, avx2, avx512, avx512bf16, amx, amx-emulated"),
        ("amx", frozenset(), "this processor lacks amx_bf16, amx_tile,.*it runs portable$"),
    ],
)
def test_a_level_that_cannot_be_is_an_error_not_a_slow_surprise(fresh, monkeypatch, asked, flags, said):
    monkeypatch.setenv("SPARSEFLASH_CPU_LEVEL", asked)
    if flags is not None:
        monkeypatch.setattr(build, "cpu_flags", lambda: flags)
    q = torch.randn(1, 1, 8, 8)
    with pytest.raises(sf.BackendError, match=f"SPARSEFLASH_CPU_LEVEL={asked}: .*{said}"):
        sf.attention(q, q, q)
    status = sf.backend_status()["cpu"]
    assert not status.usable and f"SPARSEFLASH_CPU_LEVEL={asked}" in status.detail
    sf.attention(q, q, q, backend="reference")


def test_levels_follow_the_processor(monkeypatch):
    monkeypatch.delenv("SPARSEFLASH_CPU_LEVEL", raising=False)
    full = build.LEVELS["amx"].needs

    def names(flags):
        monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags))
        return [[level.name for level in levels] for levels in build.choices()]

    portable = [["portable"], ["portable"]]  # for this processor, and for any
    assert names(full) == [["avx512", "amx"], ["avx512", "avx512bf16"], ["avx512"], ["avx2"], *portable]
    assert names(full - {"amx_tile"})[0] == ["avx512", "avx512bf16"]
    assert names(build.LEVELS["avx512"].needs) == [["avx512"], ["avx2"], *portable]
    assert names({"avx2", "fma", "f16c"}) == [["avx2"], *portable]
    assert names({"asimd"}) == [["neon"], *portable]
    assert names({"avx2", "fma"}) == names({}) == portable
    assert build.choices()[-1][0].flags == ()


@pytest.mark.parametrize("name", build.LEVELS)
def test_every_level_can_be_asked_for(monkeypatch, name):
    level = build.LEVELS[name]
    monkeypatch.setattr(build, "cpu_flags", lambda: level.needs)
    monkeypatch.setenv("SPARSEFLASH_CPU_LEVEL", name)
    first = build.choices()[0]
    assert first == ([build.LEVELS["avx512"], level] if level.bf16 else [level])


@pytest.mark.parametrize(
    ("machine", "said", "chosen"),
    [
        ("arm64", "", "neon"),
        ("x86_64", "FPU SSE AVX1.0 FMA F16C\nSMEP AVX2 BMI1\n", "avx2"),
        ("x86_64", "", "portable"),
    ],
)
def test_macs_are_asked_what_they_are(monkeypatch, machine, said, chosen):
    monkeypatch.delenv("SPARSEFLASH_CPU_LEVEL", raising=False)
    monkeypatch.setattr(build.sys, "platform", "darwin")
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said))
    monkeypatch.setattr(build, "cpu_flags", build.cpu_flags.__wrapped__)
    assert build.choices()[0][0].name == chosen


def test_an_emulated_machine_is_not_taken_for_its_host(monkeypatch):
    """A container for Arm, run on another machine by an emulator, sees the host's /proc/cpuinfo."""
    monkeypatch.delenv("SPARSEFLASH_CPU_LEVEL", raising=False)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(build, "cpu_flags", build.cpu_flags.__wrapped__)
    assert [level.name for level in build.choices()[0]] == ["neon"]


def test_a_compiler_that_knows_no_native_builds_for_any_processor(fresh, tool, monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", frozenset)
    tool('case "$*" in *-march=*) echo "unknown architecture" >&2; exit 1;; esac\nexec "$cxx" "$@" -O0')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.native().names == ("portable",)
    right()
