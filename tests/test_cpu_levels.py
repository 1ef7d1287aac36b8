"""Every instruction-set level of the native backend against fp64, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparseflash
from sparseflash.backends.cpu import build

CASES = Path(__file__).with_name("cpu_cases.py")
SEED = int(os.environ.get("SPARSEFLASH_SEED", "0"))


def hold(level: str, seeds: tuple[int, int], **env: str) -> str:
    """What cpu_cases.py says about a level; skips where the processor or the compiler cannot."""
    missing = sorted(build.LEVELS[level].needs - build.cpu_flags())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler here")
    run = subprocess.run(
        [sys.executable, str(CASES), "--seeds", *map(str, seeds)],
        env={
            **os.environ,
            "SPARSEFLASH_CPU_LEVEL": level,
            "PYTHONPATH": str(Path(sparseflash.__file__).parent.parent),
            **env,
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return run.stdout


@pytest.mark.parametrize("level", build.LEVELS)
def test_a_level_agrees_with_fp64(level):
    said = hold(level, (100 * SEED, 100 * SEED + 12))
    name = "amx" if level == "amx-emulated" else level
    assert f"bf16: {level}," in said or f"bf16: {name}," in said, said


@pytest.mark.slow
@pytest.mark.parametrize("level", build.LEVELS)
def test_a_level_agrees_with_fp64_over_many_cases(level):
    hold(level, (10_000 + 1000 * SEED, 10_400 + 1000 * SEED))
