"""Older versions of Transformers, down to the oldest supported: the tests of the newest, run on these."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

HERE = Path(__file__).resolve().parent
FILES = ("test_transformers.py", "test_transformers_control.py", "test_transformers_documents.py")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.0.0", "5.16.0"])
def test_older_versions_of_transformers_pass_the_same_tests(version, request):
    """Installed once into pytest's cache, in front of the one that is there; torch stays the same."""
    folder = request.config.cache.mkdir(f"transformers-{version}")
    if not (folder / "ready").exists():
        wanted = ["--target", str(folder), "--upgrade", f"transformers=={version}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        made = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"transformers {version} cannot be installed: {made.stderr.strip()[-200:]}")
        (folder / "ready").touch()
    path = os.pathsep.join([str(folder), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    say = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(say, env=env, capture_output=True, text=True).stdout.strip() == version
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, *(str(HERE / name) for name in FILES)],
        env=env,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
