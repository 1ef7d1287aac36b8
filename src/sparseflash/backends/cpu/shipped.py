"""The native library inside a wheel: every level in one file, so that no compiler is needed.

`make` (of the Makefile: `make wheel`) compiles the sources beside this file for this kind of machine, or for
that of the cross compiler in `CXX`; the wheel that is built next contains the library. It is tuned for no
particular processor: one that lacks features runs a simpler level. If the sources have changed since, they
are compiled as if there were no wheel.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import build

FOLDER = Path(__file__).parent / "prebuilt"
LIBRARY, SAID = "libsparseflash.so", "about.json"
LEVELS = {
    "x86_64": ("portable", "avx2", "avx512", "avx512bf16", "amx"),
    "aarch64": ("portable", "neon"),
}
"""Levels of the library for each kind of machine; on other machines the sources are compiled."""
_STRIPPED = ("-Wl,-s",)


def find(levels: Sequence[build.Level], folder: Path = FOLDER) -> tuple[ctypes.CDLL, Path] | None:
    """The shipped library, if there is one, of these sources and this machine, that holds these levels."""
    try:
        about = json.loads((folder / SAID).read_text())
        library = (folder / LIBRARY).read_bytes()
    except (OSError, ValueError):
        return None
    held = {level.name for level in levels} <= set(about["levels"])  # "amx-emulated" is not
    ours = (about["machine"], about["sources"]) == (platform.machine(), build.sources())
    if not held or not ours or hashlib.sha256(library).hexdigest() != about["sha256"]:
        return None
    try:  # whoever can write here can write this package too, so the library is trusted as much
        return build.opened(folder / LIBRARY), folder / LIBRARY
    except (OSError, AttributeError):
        return None  # linked to a newer C library than this system's, for example


def make(folder: Path = FOLDER, machine: str = "") -> Path:
    """Compile every level of a kind of machine into one library, and describe it in a JSON file beside it.

    Raises
    ------
    BuildError
        Where there is no compiler, or it fails; ValueError for a machine without levels of its own.
    """
    machine = machine or platform.machine()
    if machine not in LEVELS:
        raise ValueError(f"machine {machine!r}: expected one of {', '.join(LEVELS)}")
    compiler = build.find_compiler()
    if compiler is None:
        raise build.BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    every = (build.LEVELS[name] for name in LEVELS[machine])
    levels = [replace(level, flags=_general(level.flags, machine)) for level in every]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / LIBRARY
    build.compile_library(levels, compiler, target, _STRIPPED)
    about: dict[str, Any] = {
        "machine": machine,
        "levels": LEVELS[machine],
        "sources": build.sources(),
        "sha256": target.with_suffix(".sha256").read_text(),
    }
    target.with_suffix(".sha256").unlink()
    target.chmod(0o755)
    (folder / SAID).write_text(json.dumps(about, indent=2) + "\n")
    return target


def _general(flags: tuple[str, ...], machine: str) -> tuple[str, ...]:
    """Flags of a level without options for the processor that compiles."""
    tuned = "-mtune=generic" if machine == "x86_64" else ""
    named = (tuned if x == "-mtune=native" else x for x in flags if x != "-march=native")
    return tuple(x for x in named if x)
