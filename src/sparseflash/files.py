"""Files that are whole at every moment, and files that end."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, beside `path`, and put it in its place at the end of the block.

    A kill, an exception or a full disk leaves the old file as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
