"""Atomic file writes, and checks that a path is a regular file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def no_file(path: str | os.PathLike[str]) -> str:
    """Kind of thing that a path names if it is not a regular file (reading may block); "" if it is one.

    Raises
    ------
    OSError
        If nothing exists there, or it cannot be inspected.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "no regular file")


def cache() -> Path:
    """Folder for compiled kernels and the like: `SPARSEFLASH_CACHE`, else `sparseflash` in the user's cache.

    Raises
    ------
    NotADirectoryError
        If the user has no home folder either.
    """
    if given := os.environ.get("SPARSEFLASH_CACHE"):
        return Path(given).expanduser().absolute()  # dlopen searches names without a slash
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise NotADirectoryError(errno.ENOTDIR, "there is no home folder")
    return Path(base, "sparseflash")


def distrust(path: Path) -> str:
    """Why files at `path` must not be trusted; "" if only the current user can write there.

    Raises
    ------
    OSError
        If nothing exists there, or it cannot be inspected.
    """
    if not hasattr(os, "getuid"):
        return ""
    info = path.stat()
    if info.st_uid != os.getuid():
        return "belongs to another user"
    return "is writable by other users" if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end of the block it atomically replaces `path`.

    After a kill, an exception or a full disk the old file is unchanged, or still absent. A symbolic link
    stays a link; a path that is no regular file (a pipe, /dev/stdout) is written to directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and no_file(path):
        yield path
        return
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file atomically; text is encoded as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
