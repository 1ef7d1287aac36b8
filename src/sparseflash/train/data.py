"""Bytes of any text, split into a training part and a held-out tail.

The vocabulary is the 256 byte values, so there is no tokenizer to train, ship or mismatch. Batches are a pure
function of (seed, step): the position in the data is the step number, which is what makes resuming exact and
data-parallel runs equal to single-process ones.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparseflash.common.files import no_file
from sparseflash.train.errors import TrainError

HELD_OUT = 0.05
SEPARATOR = b"\0"  # between files; text never contains it
TEXT = "any encoding of single bytes, such as UTF-8 and Latin-1, without control characters such as NUL"
_CONTROL = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b"))


class Corpus:
    """Training and validation bytes.

    Parameters
    ----------
    texts : list of bytes
        One entry per file; the last 5 % of each is held out.
    name : str
        Name of the data in error messages.

    Attributes
    ----------
    train, val : uint8 tensors [n]
    fingerprint : str
        Digest of the bytes; a resumed run refuses other data.
    """

    def __init__(self, texts: list[bytes], name: str = "data") -> None:
        cuts = [len(text) - int(len(text) * HELD_OUT) for text in texts]
        self.name = name
        self.files = len(texts)
        self.train = _tensor(SEPARATOR.join(text[:cut] for text, cut in zip(texts, cuts, strict=True)))
        self.val = _tensor(
            SEPARATOR.join(text[cut:] for text, cut in zip(texts, cuts, strict=True) if cut < len(text))
        )
        digest = hashlib.blake2b(digest_size=16)
        for text in texts:
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
        self.fingerprint = digest.hexdigest()

    def check(self, length: int) -> None:
        """Raise when sequences of `length` bytes cannot be drawn."""
        have = len(self.train)
        if have < length + 1:
            raise TrainError(
                f"{self.name} has {have} bytes for training (95 % of the text), --length {length} "
                f"needs at least {length + 1}; use --length {max(have // 2, 1)} or give more text"
            )
        if len(self.val) < 2:
            raise TrainError(
                f"{self.name} is too short to hold out 5 % for validation; give at least 40 bytes"
            )

    def letters(self) -> float:
        """Bits per held-out byte of an order-0 model: byte frequencies without context."""
        count = torch.bincount(self.train.long(), minlength=256).double() + 1
        return float(-(count / count.sum()).log2()[self.val.long()].mean())

    def batch(self, seed: int, step: int, rows: slice, total: int, length: int) -> tuple[Tensor, Tensor]:
        """Draw one step's `total` sequences; inputs and targets of `rows` of them, int64 [n, length]."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        starts = torch.randint(len(self.train) - length, (total,), generator=generator)[rows]
        window = self.train[starts[:, None] + torch.arange(length + 1)].long()
        return window[:, :-1], window[:, 1:]

    def validation(self, length: int, sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Evenly spaced held-out windows [1, length]: the same for every run on this text."""
        length = min(length, len(self.val) - 1)
        last = len(self.val) - length - 1
        starts = sorted({round(i * last / max(sequences - 1, 1)) for i in range(sequences)})
        for start in starts:
            window = self.val[start : start + length + 1].long()[None]
            yield window[:, :-1], window[:, 1:]


def load(path: str | Path) -> Corpus:
    """Read a text file, or every text file below a directory (sorted, hidden ones skipped).

    Raises
    ------
    TrainError
        The path does not exist, cannot be read, or holds no text.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            texts = _texts(_walk(path))
            if not texts:
                raise TrainError(f"--data {path} has no text files in it ({TEXT}); give another directory")
        elif kind := no_file(path):
            raise TrainError(
                f"--data {path} is {kind}: it may have no end; give a text file or a directory of text files"
            )
        else:
            data = path.read_bytes()
            if not data:
                raise TrainError(f"--data {path} is empty; give a text file with at least a few kilobytes")
            if not _is_text(data):
                raise TrainError(
                    f"--data {path} is no text ({TEXT}); give a text file, of UTF-16: iconv -t utf-8"
                )
            texts = [data]
    except FileNotFoundError:
        raise TrainError(
            f"--data {path} does not exist; give a text file or a directory of text files"
        ) from None
    except OSError as error:
        raise TrainError(f"--data {path} cannot be read ({error.strerror}); check its permissions") from None
    return Corpus(texts, name=f"--data {path}")


def named(path: str | Path) -> Corpus:
    """Load the text that ``--data`` names; Python's standard library if it is empty."""
    return load(path) if path else stdlib()


def stdlib() -> Corpus:
    """Load Python's standard library, without tests and installed packages: real text on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (f for f in _walk(root) if f.suffix == ".py" and skipped.isdisjoint(f.relative_to(root).parts))
    texts = _texts(files)
    if not texts:
        raise TrainError(
            f"this Python has no readable standard library sources in {root}; give a text file with --data"
        )
    return Corpus(texts, name="the Python standard library")


def _walk(root: Path) -> list[Path]:
    files = (
        p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)
    )
    return sorted(p for p in files if p.is_file())


def _is_text(data: bytes) -> bool:
    return len(data.translate(None, _CONTROL)) == len(data)


def _texts(files: Iterable[Path]) -> list[bytes]:
    """Contents of those files that are non-empty text."""
    found = []
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(4096)
            if head and _is_text(head) and _is_text(data := head + stream.read()):
                found.append(data)
    return found


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
