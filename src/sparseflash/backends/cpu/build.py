"""The native library: compiled on first use with the machine's C++ compiler, kept in a private cache.

One shared library with a plain C interface; it links neither torch nor Python. Compiling takes a few seconds
and happens once per set of sources, flags, compiler and kind of processor.

Code is loaded from the cache: so a folder is used only if nobody else can write to it, and a library only if
it is byte for byte the one that was built (a truncated one would end the process while loading).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...common.errors import BackendError, warn
from ...common.files import cache, distrust

NATIVE = Path(__file__).parent / "native"
COMMON = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-w")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mtune=native")
AVX512 = ("-march=x86-64-v4", "-mtune=native")
TIME_LIMIT = 240.0
"""Seconds after which a compiler is killed."""
WORK = ".compiling-"
"""Part of the names of folders in which a compiler works."""


@dataclass(frozen=True)
class Level:
    """One instruction-set level: its source file, compiler flags, and required processor features."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    bf16: bool
    source: str = ""

    @property
    def path(self) -> Path:
        """The level's source file."""
        return NATIVE / f"level_{self.source or self.name}.cpp"


_512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "fma", "avx2", "f16c"})
_NATIVE = ("-march=native",) if platform.machine() in ("x86_64", "AMD64", "aarch64") else ()
LEVELS = {
    level.name: level
    for level in (
        Level("portable", _NATIVE, frozenset(), False),
        Level("neon", ("-march=armv8-a", "-mtune=native"), frozenset({"asimd"}), False),
        Level("avx2", AVX2, frozenset({"avx2", "fma", "f16c"}), False),
        Level("avx512", AVX512, _512, False),
        Level("avx512bf16", (*AVX512, "-mavx512bf16"), _512 | {"avx512_bf16"}, True),
        Level(
            "amx",
            (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
            _512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
            True,
        ),
        Level(
            "amx-emulated",
            (*AVX512, "-mavx512bf16", "-DSF_AMX_EMULATED=1"),
            _512 | {"avx512_bf16"},
            True,
            "amx",
        ),
    )
}
"""Levels by name. `amx-emulated` runs the AMX kernels with the tile instructions in C++: for tests, slow."""


PREFERENCE = (("avx512", "amx"), ("avx512", "avx512bf16"), ("avx512",), ("avx2",), ("neon",), ("portable",))


class BuildError(RuntimeError):
    """The library could not be built; the message is one line that names the log."""


class CompilerFailed(BuildError):
    """The compiler ended with an error: perhaps it is too old for these instructions."""


class LevelError(BackendError):
    """`SPARSEFLASH_CPU_LEVEL` names a level that does not exist, or that this processor cannot run."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this processor, by their names on Linux; empty if the system does not tell.

    Every 64-bit Arm processor has asimd. It is not asked for: a container of another kind of machine, run by
    an emulator, sees the host's /proc/cpuinfo.
    """
    if platform.machine() in ("aarch64", "arm64"):
        return frozenset({"asimd"})
    if sys.platform == "darwin":
        ask = ["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout
            return frozenset(said.lower().split())
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        line = next((x for x in text.splitlines() if x.startswith("flags")), "")
        return frozenset(line.partition(":")[2].split())
    return frozenset()


def choices() -> list[list[Level]]:
    """List the sets of levels to build here, best first; each has the fp32 level and, if any, the bf16 one.

    Later sets are for compilers too old for the first; the last uses no instruction-set flags at all.
    `SPARSEFLASH_CPU_LEVEL` names a level to use instead (a bf16 level brings its fp32 companion).
    """
    have = cpu_flags()
    asked = os.environ.get("SPARSEFLASH_CPU_LEVEL", "")
    if asked:
        if asked not in LEVELS:
            raise LevelError(
                f"SPARSEFLASH_CPU_LEVEL={asked}: expected one of {', '.join(LEVELS)}, or nothing"
            )
        level = LEVELS[asked]
        missing = sorted(level.needs - have)
        if missing:
            able = ", ".join(name for name, x in LEVELS.items() if x.needs <= have)
            raise LevelError(
                f"SPARSEFLASH_CPU_LEVEL={asked}: this processor lacks {', '.join(missing)}; it runs {able}"
            )
        every = [["avx512", asked] if level.bf16 else [asked]]
    else:
        every = [list(names) for names in PREFERENCE]
    found = [[LEVELS[name] for name in names] for names in every]
    able = [levels for levels in found if all(level.needs <= have for level in levels)]
    return able + [[replace(level, flags=())] for level in able[-1] if level.name == "portable"]


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command: `CXX` (with its arguments, if any), else c++, g++ or clang++."""
    return _first(*_given(), ["c++"], ["g++"], ["clang++"])


def not_found() -> str:
    """The value of `CXX` if no such compiler exists; else ""."""
    return "" if _first(*_given()) else os.environ.get("CXX", "")


def _given() -> tuple[list[str], list[str]]:
    """The two readings of `CXX`: a path with spaces in it, or a command with arguments."""
    given = os.environ.get("CXX", "")
    try:
        return [given], shlex.split(given)
    except ValueError:  # an unbalanced quote
        return [given], []


def _first(*commands: list[str]) -> list[str] | None:
    """The first command whose program exists."""
    for command in commands:
        if command and command[0] and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    return None


# ---------------------------------------------------------------- the cache


def cache_folders() -> Iterator[Path]:
    """Yield folders of the library: `SPARSEFLASH_CACHE` or the user's cache, if private; then a fresh one."""
    folder = Path(os.path.expanduser("~"))  # named in the warning if `cache()` fails
    try:
        folder = cache()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        why = distrust(folder)
    except OSError as error:
        why = f"cannot be used: {error.strerror}"
    if not why:
        yield folder
        why = "loads no libraries" if os.access(folder, os.W_OK) else "is not writable"
    warn(
        f"sparseflash: the cache folder {folder} {why}; compiling into a temporary one, "
        "again in every process. Set SPARSEFLASH_CACHE to a private folder to compile once"
    )
    yield _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    """A private folder, removed when the process ends unless it holds the log of a failure."""
    folder, owner = Path(tempfile.mkdtemp(prefix="sparseflash-")), os.getpid()

    def clean() -> None:
        if os.getpid() == owner and not any(folder.glob("*.log")):
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clean)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file, so that processes that start together compile once; yield whether locks work here."""
    alone = False
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):  # no locks here: the final rename is atomic anyway
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        yield alone


def _sum_file(target: Path) -> Path:
    return target.with_suffix(".sha256")


def opened(target: Path) -> ctypes.CDLL:
    """Load a library that is known to be ours, and declare its result types."""
    loaded = ctypes.CDLL(str(target))
    loaded.sf_call_size.restype = ctypes.c_int64
    loaded.sf_level_name.restype = ctypes.c_char_p
    loaded.sf_read.restype = ctypes.c_uint64
    return loaded


def _load(target: Path) -> ctypes.CDLL | str:
    """Load the library in a file, or say why not: it must be complete, and the one that was built."""
    try:
        for file in (target, _sum_file(target)):
            if why := distrust(file):
                return f"{file} {why}"
        if _sum_file(target).read_text() != hashlib.sha256(target.read_bytes()).hexdigest():
            return f"{target} is damaged"
        return opened(target)
    except (OSError, UnicodeDecodeError, AttributeError) as error:
        return str(error)


# ---------------------------------------------------------------- the compiler


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a compiler and everything it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _run(commands: list[list[str]], work: Path, log: Path) -> None:
    """Run commands in parallel; whatever stops us, none of them is left running."""
    limit, started = time.monotonic() + TIME_LIMIT, []
    try:
        for n, command in enumerate(commands):
            with open(work / f"{n}.txt", "wb") as said:
                started.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
                    )
                )
        for n, process in enumerate(started):
            process.wait(max(0.0, limit - time.monotonic()))
            if process.returncode:
                text = (work / f"{n}.txt").read_text(errors="replace")
                log.write_text(f"{shlex.join(commands[n])}\nexit status {process.returncode}\n{text}")
                raise CompilerFailed(f"the C++ compiler failed; its output is in {log}")
    except subprocess.TimeoutExpired:
        log.write_text("\n".join(map(shlex.join, commands)) + f"\nno end after {TIME_LIMIT:g} s\n")
        raise BuildError(
            f"the C++ compiler did not end within {TIME_LIMIT:g} s; its command is in {log}"
        ) from None
    except OSError as error:
        raise BuildError(f"the C++ compiler could not be run: {error}") from error
    finally:
        for process in started:
            if process.poll() is None:
                _end(process)


def _sweep(target: Path, alone: bool) -> None:
    """Remove what killed compilers left: of this library if we hold its lock, of others if it is old."""
    for left in target.parent.glob(f"*{WORK}*"):
        with contextlib.suppress(OSError):
            ours = alone and left.name.startswith(target.stem)
            if ours or time.time() - left.stat().st_mtime > 2 * TIME_LIMIT:
                shutil.rmtree(left)


def compile_library(
    levels: Sequence[Level], compiler: list[str], target: Path, link: Sequence[str] = ()
) -> None:
    """Compile levels into one library with its digest beside it; both appear only when complete."""
    log = target.with_suffix(".log")
    log.unlink(missing_ok=True)
    logging.getLogger("sparseflash").warning(
        "sparseflash: compiling the CPU kernels with %s, once for this machine and version; it takes about "
        "half a minute",
        Path(compiler[0]).name,
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}{WORK}") as made:
        work = Path(made)
        have = [f"-DSF_WITH_{(x.source or x.name).upper()}=1" for x in levels]
        jobs = [(NATIVE / "api.cpp", have), *((x.path, list(x.flags)) for x in levels)]
        objects = [str(work / f"{n}.o") for n in range(len(jobs))]
        _run(
            [
                [*compiler, *COMMON, *flags, "-c", str(source), "-o", name]
                for (source, flags), name in zip(jobs, objects, strict=True)
            ],
            work,
            log,
        )
        built = work / "lib.so"
        _run([[*compiler, *COMMON, "-shared", "-pthread", *link, *objects, "-o", str(built)]], work, log)
        digest = work / "lib.sha256"
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        for made_now in (built, digest):
            made_now.chmod(0o700)  # whatever the umask grants to a group
        os.replace(built, target)
        os.replace(digest, _sum_file(target))


def sources() -> str:
    """SHA-256 digest of all sources of the library."""
    about = hashlib.sha256()
    for file in sorted(NATIVE.iterdir()):
        if file.suffix in (".cpp", ".h"):
            about.update(file.name.encode() + file.read_bytes())
    return about.hexdigest()


def _names(levels: list[Level], compiler: list[str] | None) -> tuple[str, str]:
    """File name parts that depend on all that the library depends on: sources, flags, processor; compiler."""
    made_of = [(level.name, level.source, level.flags) for level in levels]  # a set has no fixed order
    about = hashlib.sha256(repr((COMMON, made_of, platform.machine(), sorted(cpu_flags()))).encode())
    about.update(sources().encode())
    tool = ""
    if compiler is not None:
        info = os.stat(compiler[0])
        tool = hashlib.sha256(repr((compiler, info.st_size, info.st_mtime_ns)).encode()).hexdigest()[:8]
    return f"native-{about.hexdigest()[:20]}", tool


def library(levels: list[Level]) -> tuple[ctypes.CDLL, Path]:
    """The loaded library for these levels, built if necessary (or again, if the cached one is damaged).

    Without a compiler, a library that another compiler built from the same sources is used.
    """
    compiler, why = find_compiler(), ""
    if compiler is not None and (other := not_found()):
        warn(f"sparseflash: CXX={other} is no compiler here: {compiler[0]} is used; install it, or unset CXX")
    name, tool = _names(levels, compiler)
    for folder in cache_folders():
        target = folder / f"{name}-{tool}.so"
        if compiler is None:
            for target in sorted(folder.glob(f"{name}-*.so")):
                if not isinstance(found := _load(target), str):
                    return found, target
            break
        found = _load(target)
        if isinstance(found, str) and os.access(folder, os.W_OK):
            with _locked(target.with_suffix(".lock")) as alone:
                found = _load(target)  # another process may have built it meanwhile
                if isinstance(found, str):
                    _sweep(target, alone)
                    compile_library(levels, compiler, target)
                    found = _load(target)
        if not isinstance(found, str):
            return found, target
        why = found
    if compiler is None:
        given = os.environ.get("CXX")
        hint = f" (CXX={given} is none)" if given else ""
        raise BuildError(f"no C++ compiler found{hint}: install g++ or clang++, or set CXX")
    raise BuildError(f"the library just built does not load: {why}")
