"""Kernels compiled before there is a card: the tasks run on tensors without values, and nothing is launched.

What Triton compiled it keeps by a key that has every file of its own in it, its compiler's too: kernels are
of use to the same build of Triton under the same Python alone, for the same kind of card. So a pack says for
which it is, and one that is for another is left where it lies, with a word about it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ROOT

BUILD = ROOT / "build"
CACHE = BUILD / "triton"
"""Where Triton keeps kernels, unless TRITON_CACHE_DIR says another place."""
ROOM = 20
"""MiB that a pack may have: it travels beside the repository."""


def about(target: str) -> dict[str, str]:
    """What kernels that are compiled here are good for."""
    import triton
    from triton.compiler.compiler import make_backend

    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # before Triton 3.5
        from triton.compiler.compiler import triton_key
    key = triton_key() + make_backend(gpu(target)).hash()
    return {
        "triton": triton.__version__,
        "python": "{}.{}".format(*sys.version_info),
        "target": target,
        "key": hashlib.sha256(key.encode()).hexdigest()[:16],
    }


def sources() -> str:
    """A number that changes with what the tasks launch."""
    found = hashlib.sha256()
    for folder in (ROOT / "src" / "sparseflash", ROOT / "benchmarks" / "gpu"):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if not target.startswith("sm_"):
        raise SystemExit(f"{target}: kernels are compiled ahead for NVIDIA's cards alone, such as sm_90")
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


# ---------------------------------------------------------------- compiling


def compile_all(target: str, names: Sequence[str], workers: int, seconds: float) -> dict[str, Any]:
    """Compile what parts launch, in processes side by side, until all is done or the time is over: a row."""
    env = {**os.environ, "SPARSEFLASH_AHEAD": target, "SPARSEFLASH_BACKEND": "triton"}
    env |= {"TRITON_STORE_BINARY_ONLY": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    command = [sys.executable, "-m", f"{__package__}.launches", target, *names, "--share"]
    running = [
        subprocess.Popen(
            [*command, str(n), str(workers)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        for n in range(workers)
    ]
    failed: list[str] = []
    late = 0
    for process in running:
        try:
            said, _ = process.communicate(timeout=max(0.1, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            late += 1
            continue
        good = process.returncode == 0
        failed += (
            json.loads(said.splitlines()[-1]) if good else [f"a process ended with {process.returncode}"]
        )
    if late:
        failed.insert(0, f"{late} of {workers} processes had no time to end")
    row: dict[str, Any] = {"kernels": len([*cache().glob("*/__grp__*")]), "processes": workers}
    row["seconds"] = time.monotonic() - began
    return row | ({"error": "; ".join(failed)[:600]} if failed else {})


# ---------------------------------------------------------------- a pack that travels


def pack(target: str, names: Sequence[str], git: str) -> Path:
    """The kernels of the cache as one file, with what they are good for."""
    told = about(target) | {"sources": sources(), "parts": " ".join(names), "git": git}
    path = BUILD / f"kernels-{target}-triton-{told['triton']}-python-{told['python']}.tar.xz"
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        says = Path(folder) / "about.json"
        says.write_text(json.dumps(told))
        with tarfile.open(path, "w:xz") as file:
            file.add(says, "about.json")
            for one in sorted(cache().glob("*/*")):
                if one.is_file() and one.suffix != ".source":
                    file.add(one, f"triton/{one.parent.name}/{one.name}")
    if path.stat().st_size > ROOM << 20:
        print(
            f"{path.name} has {path.stat().st_size >> 20} MiB: begin with an empty {cache()}, or fewer parts"
        )
    return path


def cache() -> Path:
    """The folder in which Triton keeps kernels."""
    return Path(os.environ.get("TRITON_CACHE_DIR", CACHE))


def unpack(target: str) -> tuple[dict[str, str], str]:
    """Put a pack that is good here into the cache: what it says of itself, and a line about what there is."""
    here, others = about(target), []
    for path in sorted(BUILD.glob("kernels-*.tar.xz")):
        with tarfile.open(path) as file:
            says = file.extractfile("about.json")
            told: dict[str, str] = json.loads(says.read()) if says else {}
            if any(told.get(name) != here[name] for name in ("key", "target")):
                others.append("Triton {triton}, Python {python}, {target}".format(**told))
                continue
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                file.extractall(folder, filter="data")
                count = _settle(Path(folder) / "triton")
        stale = "" if told["sources"] == sources() else "; sources have changed since, so some may not fit"
        return told, f"{count} compiled kernels from {path.name}{stale}"
    line = "no kernels are compiled ahead (make gpu-prepare)"
    if others:
        own = "Triton {triton}, Python {python}, {target}".format(**here)
        line = f"kernels were compiled ahead for {' and '.join(others)}; here is {own}: of no use"
        if own in others:
            line += ", as that is another build of the same version"
    return {}, line


def _settle(folder: Path) -> int:
    """Move kernels into the cache; the lists of their files, which are by full path, get the new place."""
    count = 0
    for one in sorted(folder.glob("*/*")):
        there = cache() / one.parent.name / one.name
        there.parent.mkdir(parents=True, exist_ok=True)
        if one.name.startswith("__grp__"):
            names = json.loads(one.read_text())["child_paths"]
            one.write_text(json.dumps({"child_paths": {name: str(there.parent / name) for name in names}}))
            count += 1
        os.replace(one, there)
    return count
