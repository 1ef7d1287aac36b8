"""What tasks launch, compiled and not run: a share of it in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from . import first
from .ahead import gpu


def pretend(target: str) -> None:
    """From now on launches compile and do nothing else, for a card that need not be here."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from sparseflash.backends import triton as backend
    from sparseflash.backends.triton import blocks, softmax
    from sparseflash.ops import _register

    card = gpu(target)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: card,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    blocks.target.cache_clear()
    softmax.multiprocessors = lambda device: 132
    backend.refuse = lambda *tensors: []  # tensors without values are on no card
    _register.untraced = lambda *tensors: True  # and ops would say shapes alone
    start, seen = JITFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = start(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            _launcher(kernel)
        return kernel

    JITFunction.run = run


def _launcher(kernel: Any) -> None:
    """Up to Triton 3.6 every signature has a function in C that hands its arguments over: built now."""
    from triton.backends.nvidia.driver import CudaLauncher

    with contextlib.suppress(Exception):  # it is built and kept, and needs a driver only to be loaded
        CudaLauncher(kernel.src, kernel.metadata)


def _stand_in(folder: str) -> None:
    """A library with the name of NVIDIA's driver, to link against where there is none."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None or "TRITON_LIBCUDA_PATH" in os.environ:
        return
    name = "libcuda.so.1"
    command = [compiler, "-shared", "-x", "c", "/dev/null", "-o", f"{folder}/{name}", f"-Wl,-soname,{name}"]
    if subprocess.run(command, capture_output=True).returncode == 0:
        os.environ["TRITON_LIBCUDA_PATH"] = folder


def work(target: str, names: Sequence[str], share: Sequence[int]) -> list[str]:
    """Compile what every n-th task of some parts launches; what failed."""
    logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)
    failed = []
    pretend(target)
    with tempfile.TemporaryDirectory() as folder:
        _stand_in(folder)
        for task in first.of_parts([x for x in first.PARTS if x.name in names])[share[0] :: share[1]]:
            for row in task.each():
                if row.get("error"):
                    failed.append(", ".join(f"{name} {x}" for name, x in row.items()))
    return failed


def main() -> None:
    """Compile a share, and say as a line of JSON what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1))
    given = parser.parse_args()
    print(json.dumps(work(given.target, given.parts, given.share)))


if __name__ == "__main__":
    main()
