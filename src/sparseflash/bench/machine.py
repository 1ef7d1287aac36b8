"""Description of the machine, stored with every figure."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import torch


@cache
def describe() -> dict[str, str]:
    """Processor, cores, threads and versions, as columns of a result file."""
    import sparseflash as sf

    backend = next((s for s in sf.backend_status().values() if s.usable), None)
    return {
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparseflash": sf.__version__,
        "git": git_hash(),
        # drop the library's path, which contains a home folder
        "backend": re.sub(r", [^,]*\.so$", "", f"{backend.name}: {backend.detail}") if backend else "none",
    }


def cpu_name() -> str:
    """Model name of the processor."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def has_amx() -> bool:
    """Whether the processor multiplies bf16 tiles in hardware."""
    return any(line.startswith("flags") and "amx_bf16" in line.split() for line in _cpuinfo())


def git_hash() -> str:
    """Commit of the checkout that the package is imported from; "" for an install."""
    here = Path(__file__).resolve().parent
    try:
        top = _git(here, "rev-parse", "--show-toplevel")
        if not (Path(top) / "src" / "sparseflash").is_dir():
            return ""
        # changed results do not make the code dirty
        changed = ("--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        dirty = _git(here, "--no-optional-locks", "status", *changed)
        return _git(here, "rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


@cache
def _cpuinfo() -> tuple[str, ...]:
    try:
        return tuple(Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        return ()
