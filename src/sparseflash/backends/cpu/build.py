"""The native library: compiled on first use with the machine's own C++ compiler, kept in a private cache.

One shared library with a plain C interface; it links neither torch nor Python. Compiling takes a few seconds and
happens once per set of sources, flags and compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
COMMON = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-w")
AVX512 = ("-march=x86-64-v4", "-mtune=native")
TIME_LIMIT = 240


@dataclass(frozen=True)
class Level:
    """One instruction-set level: its source file, its flags, and what the processor must have."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    bf16: bool
    source: str = ""

    @property
    def path(self) -> Path:
        """The level's source file."""
        return NATIVE / f"level_{self.source or self.name}.cpp"


_512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "fma", "avx2"})
LEVELS = {
    level.name: level
    for level in (
        Level("portable", ("-march=native",) if platform.machine() in ("x86_64", "AMD64", "aarch64") else (),
              frozenset(), False),
        Level("avx512", AVX512, _512, False),
        Level("avx512bf16", (*AVX512, "-mavx512bf16"), _512 | {"avx512_bf16"}, True),
        Level("amx", (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
              _512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, True),
        Level("amx-emulated", (*AVX512, "-mavx512bf16", "-DSF_AMX_EMULATED=1"), _512 | {"avx512_bf16"}, True, "amx"),
    )
}
"""By name. `amx-emulated` runs the AMX kernels with the tile instructions in C++: for tests, slow."""


class BuildError(RuntimeError):
    """The library could not be built; the message is one line that names the log."""


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this processor (Linux on x86; elsewhere none are known, and the portable level runs)."""
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((x for x in text.splitlines() if x.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def choose_levels() -> list[Level]:
    """The levels to build here: the best one for fp32 and, where there is one, the best for bf16.

    `SPARSEFLASH_CPU_LEVEL` names one to use instead (a bf16 level brings its fp32 companion).
    """
    have = cpu_flags()
    asked = os.environ.get("SPARSEFLASH_CPU_LEVEL", "")
    if asked:
        if asked not in LEVELS:
            raise BuildError(f"SPARSEFLASH_CPU_LEVEL={asked}: expected one of {', '.join(LEVELS)}")
        level = LEVELS[asked]
        missing = sorted(level.needs - have)
        if missing:
            raise BuildError(f"SPARSEFLASH_CPU_LEVEL={asked}: this processor lacks {', '.join(missing)}")
        return [LEVELS["avx512"], level] if level.bf16 else [level]
    if not LEVELS["avx512"].needs <= have:
        return [LEVELS["portable"]]
    chosen = [LEVELS["avx512"]]
    for name in ("amx", "avx512bf16"):
        if LEVELS[name].needs <= have:
            return [*chosen, LEVELS[name]]
    return chosen


def find_compiler() -> str | None:
    """Path of the C++ compiler: `CXX`, else c++, g++ or clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _private(path: Path) -> bool:
    """Whether a folder is ours alone to write: code is loaded from it."""
    if not hasattr(os, "getuid"):
        return True
    info = path.stat()
    return info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def cache_folder() -> Path:
    """A private, writable folder: `SPARSEFLASH_CACHE`, else the user's cache, else a temporary one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for base in (os.environ.get("SPARSEFLASH_CACHE"), os.path.join(home, "sparseflash")):
        if not base:
            continue
        folder = Path(base)
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _private(folder) and os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="sparseflash-"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that processes that start together compile once."""
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:
            pass  # no advisory locks here: the final rename is atomic anyway
        yield


def _run(command: list[str], log: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
        said, failed = done.stderr + done.stdout, done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        said, failed = str(error), True
    if failed:
        with open(log, "a") as file:
            file.write(" ".join(command) + "\n" + said + "\n")
        raise BuildError(f"the C++ compiler failed; its output is in {log}")


def _compile(levels: list[Level], compiler: str, target: Path) -> None:
    log = target.with_suffix(".log")
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        have = [f"-DSF_WITH_{(x.source or x.name).upper()}=1" for x in levels]
        jobs = [(NATIVE / "api.cpp", [*have])] + [(x.path, list(x.flags)) for x in levels]
        objects = [os.path.join(work, f"{i}.o") for i in range(len(jobs))]

        def one(i: int) -> None:
            source, flags = jobs[i]
            _run([compiler, *COMMON, *flags, "-c", str(source), "-o", objects[i]], log)

        with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
            list(pool.map(one, range(len(jobs))))
        built = os.path.join(work, "lib.so")
        _run([compiler, "-shared", "-pthread", *objects, "-o", built], log)
        os.replace(built, target)


def library(levels: list[Level]) -> tuple[ctypes.CDLL, Path]:
    """The loaded library for these levels, built if need be (or rebuilt, if the cached one does not load)."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    about = hashlib.sha256()
    for file in sorted(NATIVE.iterdir()):
        if file.suffix in (".cpp", ".h"):
            about.update(file.name.encode() + file.read_bytes())
    info = os.stat(compiler)
    model = sorted(cpu_flags())
    about.update(repr((levels, COMMON, compiler, info.st_size, info.st_mtime_ns, platform.machine(), model)).encode())
    folder = cache_folder()
    target = folder / f"native-{about.hexdigest()[:20]}.so"
    with _locked(folder / f"{target.stem}.lock"):
        for attempt in range(2):
            if not target.exists():
                _compile(levels, compiler, target)
            try:
                loaded = ctypes.CDLL(str(target))
                loaded.sf_call_size.restype = ctypes.c_int64
                loaded.sf_level_name.restype = ctypes.c_char_p
                return loaded, target
            except (OSError, AttributeError) as error:  # a torn or foreign file: build it again, once
                target.unlink(missing_ok=True)
                if attempt:
                    raise BuildError(f"the library just built does not load: {error}") from error
    raise AssertionError("unreachable")
