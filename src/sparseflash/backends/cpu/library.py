"""The loaded native library: its levels, and calls to its entry points."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from ...common.errors import warn
from . import build, shipped
from .call import Call


@dataclass(frozen=True)
class Native:
    """The loaded library, and the levels of it that run fp32 and bf16."""

    library: ctypes.CDLL
    path: str
    fp32: int
    bf16: int
    names: tuple[str, ...]


def borrow_threads(library: ctypes.CDLL) -> None:
    """Run on the threads of torch's OpenMP runtime, if any: two pools would compete for the cores."""
    with contextlib.suppress(OSError, AttributeError):
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.sf_borrow_threads(ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p))


def _names(library: ctypes.CDLL) -> tuple[str, ...]:
    """Names of a library's levels, in its order."""
    names: list[str] = []
    while name := library.sf_level_name(len(names)).decode():
        names.append(name)
    return tuple(names)


@functools.cache
def native() -> Native | str:
    """The native library, or the reason why there is none (warned about once).

    Raises
    ------
    LevelError
        If `SPARSEFLASH_CPU_LEVEL` asks for an impossible level: no other one is substituted.
    """
    failure = "no level runs here"
    try:
        for levels in build.choices():
            try:
                library, path = shipped.find(levels) or build.library(levels)
            except build.CompilerFailed as error:  # compiler too old for these instructions: try simpler ones
                failure = str(error)
                continue
            if library.sf_call_size() != ctypes.sizeof(Call):
                raise build.BuildError(f"{path} does not match this version")
            if levels[-1].name == "amx" and library.sf_request_amx() != 0:
                continue  # the kernel denies the AMX tile registers
            borrow_threads(library)
            called = {level.source or level.name: level.name for level in levels}
            names = tuple(called.get(name, name) for name in _names(library))
            fp32 = names.index(levels[0].name)
            bf16 = next((names.index(level.name) for level in levels if level.bf16), fp32)
            return Native(library, str(path), fp32, bf16, names)
    except (build.BuildError, OSError) as error:
        failure = str(error)
    warn(f"sparseflash: the native CPU backend is not available, the slow reference runs instead: {failure}")
    return failure


_FAILURES = {
    1: (MemoryError, "not enough memory for the scratch of this call"),
    2: (RuntimeError, "this level does not run the dtype"),
    3: (ValueError, "the plan does not fit the tensors (plan.check() says where)"),
    4: (RuntimeError, "an exception inside the native code"),
}


def run(name: str, call: ctypes.Structure, dtype: torch.dtype) -> None:
    """Call an entry point at the level that runs the dtype; a failure code is raised as its error."""
    found = native()
    if isinstance(found, str):
        raise RuntimeError(found)
    level = found.bf16 if dtype == torch.bfloat16 else found.fp32
    code = getattr(found.library, name)(ctypes.byref(call), level)
    if code:
        kind, why = _FAILURES.get(code, (RuntimeError, f"code {code}"))
        raise kind(f"sparseflash native {name}: {why}")


def read(x: torch.Tensor) -> int:
    """Read a contiguous tensor's memory as fast as possible, to measure bandwidth.

    The result is the sum of its 64-bit words, and of the bytes after whole pieces of 4 MiB, modulo 2^64.
    """
    found = native()
    if isinstance(found, str):
        raise RuntimeError(found)
    threads = torch.get_num_threads()
    return int(found.library.sf_read(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.nbytes), threads))
