"""Two trees side by side in a folder: the older one out of git, this one as it is, changes included."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from sparseflash.common.errors import SparseFlashError

from . import ROOT


def commit_of(name: str) -> str:
    """The full hash of a commit.

    Raises
    ------
    SparseFlashError
        If there is no such commit.
    """
    try:
        return (
            _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
            .decode()
            .strip()
        )
    except subprocess.CalledProcessError:
        raise SparseFlashError(
            f"OLD={name}: there is no such commit here; give a hash, a branch or a tag, such as OLD=HEAD~1"
        ) from None
    except OSError as error:
        raise SparseFlashError(
            f"git could not be run ({error.strerror}): it is what older trees come from"
        ) from None


def older(commit: str, folder: Path) -> Path:
    """The `src` of a commit, unpacked into a folder.

    Raises
    ------
    SparseFlashError
        If the commit has none.
    """
    try:
        packed = _git("archive", "--format=tar", commit, "--", "src")
    except subprocess.CalledProcessError:
        raise SparseFlashError(
            f"OLD={commit[:12]} has no folder src: give a commit with the library in it"
        ) from None
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def this(folder: Path) -> Path:
    """A copy of this tree's `src`: nobody's edit during the run reaches it, and both trees lie alike."""
    return Path(shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__")))


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
