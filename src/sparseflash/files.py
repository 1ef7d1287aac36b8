"""Files that are whole at every moment, and files that end."""

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
    """What a path names instead of a regular file, which has an end and waits for nobody; "" if it is one.

    Raises
    ------
    OSError
        If there is nothing, or it cannot be looked at.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "no regular file")


def cache() -> Path:
    """The folder for what is made once: `SPARSEFLASH_CACHE`, else `sparseflash` in the user's cache.

    Raises
    ------
    NotADirectoryError
        If there is no home folder either.
    """
    if given := os.environ.get("SPARSEFLASH_CACHE"):
        return Path(given).expanduser().absolute()  # a name without a slash is no path to a loader
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise NotADirectoryError(errno.ENOTDIR, "there is no home folder")
    return Path(base, "sparseflash")


def distrust(path: Path) -> str:
    """Why nothing must be run that lies there; empty when it is ours alone to write.

    Raises
    ------
    OSError
        If there is nothing, or it cannot be looked at.
    """
    if not hasattr(os, "getuid"):
        return ""
    info = path.stat()
    if info.st_uid != os.getuid():
        return "belongs to another user"
    return "is writable by other users" if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to, beside `path`, and put it in its place at the end of the block.

    A kill, an exception or a full disk leaves the old file as it was, and none where there was none. A link
    stays one, and what is no file (a pipe, /dev/stdout) is written to as it is.
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
    """Write a file, all of it or nothing; a text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
