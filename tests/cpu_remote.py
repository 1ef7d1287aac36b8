"""The native library in a process of its own, perhaps of another architecture under an emulator.

`Remote` has the entry points of the library that `backends.cpu` calls. It sends the C structure of a call
and all the memory it points to through a pipe to cpu_driver.cpp, and writes what comes back where it belongs.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparseflash.backends.cpu import build, call, indexer, linear

DRIVER = Path(__file__).with_name("cpu_driver.cpp")
ENTRIES = (
    *("sf_forward", "sf_backward", "sf_stats"),
    *("sf_linear_forward", "sf_linear_backward", "sf_stick_forward", "sf_stick_backward"),
    *("sf_indexer", "sf_indexer_loss", "sf_decode"),
)
ITEM = (4, 2, 2)  # bytes, by the code of a dtype


def make(folder: Path, level: str, compiler: list[str], flags: tuple[str, ...] | None = None) -> Path:
    """Build the driver with one level, its sources as they are shipped; all libraries inside."""
    found = build.LEVELS[level]
    program = folder / f"driver-{level}"
    have = f"-DSF_WITH_{(found.source or found.name).upper()}=1"
    sources = (("api.cpp", build.NATIVE / "api.cpp", (have,)), ("driver", DRIVER, (f"-I{build.NATIVE}",)))
    jobs = [*sources, ("level", found.path, found.flags if flags is None else flags)]
    objects = [str(folder / f"{name}.o") for name, _, _ in jobs]
    running = [
        subprocess.Popen([*compiler, *build.COMMON, *extra, "-c", str(source), "-o", to])
        for (_, source, extra), to in zip(jobs, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    subprocess.run([*compiler, "-static", "-pthread", *objects, "-o", str(program)], check=True)
    return program


def _extent(view: Any, *shape: int) -> int:
    """Elements from the first to the last of a view."""
    if 0 in shape:
        return 0
    strides = (view.batch, view.head, view.row, view.lane)
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _linear_segments(c: Any) -> Iterator[tuple[int, int, int]]:
    """Of all memory that a call of linear attention names: offset of its pointer, address, bytes."""
    q, k = (c.B, c.Hq, c.T), (c.B, c.Hkv, c.T)
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        x = getattr(c, name)
        wide = c.D if name in ("q", "k", "dq", "dk") else c.Dv
        shape = (*(k if name in ("k", "v", "dk", "dv") else q), wide)
        yield getattr(linear.Call, name).offset, x.data, _extent(x, *shape) * ITEM[c.dtype]
    yield linear.Call.rate.offset, c.rate, 4 * c.Hq
    for name in ("first", "dlast", "last", "dfirst"):
        yield getattr(linear.Call, name).offset, getattr(c, name), 4 * c.B * c.Hq * c.D * c.Dv


def _indexer_segments(c: Any) -> Iterator[tuple[int, int, int]]:
    """The same for an indexer's choice."""
    for name, shape in (("q", (c.B, c.H, c.Tq, c.D)), ("k", (c.B, 1, c.Tk, c.D))):
        x = getattr(c, name)
        yield getattr(indexer.Call, name).offset, x.data, _extent(x, *shape) * ITEM[c.dtype]
    rows = c.B * c.Tq
    items = {"weights": 4 * rows * c.H, "low": 4 * rows, "high": 4 * rows, "keep": c.B * c.Tk}
    for name, size in (items | {"index": 4 * rows * c.topk, "scores": 4 * rows * c.topk}).items():
        yield getattr(indexer.Call, name).offset, getattr(c, name), size


def _loss_segments(c: Any) -> Iterator[tuple[int, int, int]]:
    """The same for an indexer's loss."""
    views = {
        "q_index": ((c.B, c.H, c.Tq, c.D), c.index_dtype), "k_index": ((c.B, 1, c.Tk, c.D), c.index_dtype),
        "q": ((c.B, c.Hq, c.Tq, c.Dm), c.dtype), "k": ((c.B, c.Hkv, c.Tk, c.Dm), c.dtype),
    }  # fmt: skip
    for name, (shape, dtype) in views.items():
        x = getattr(c, name)
        yield getattr(indexer.LossCall, name).offset, x.data, _extent(x, *shape) * ITEM[dtype]
    rows = c.B * c.Tq
    items = {
        **{"weights": rows * c.H, "lse": rows * c.Hq, "low": rows, "high": rows, "index": rows * c.n},
        **{"loss": rows, "dq": rows * c.H * c.D, "dk": c.B * c.Tk * c.D, "dw": rows * c.H},
    }
    yield indexer.LossCall.keep.offset, c.keep, c.B * c.Tk
    for name, size in items.items():
        yield getattr(indexer.LossCall, name).offset, getattr(c, name), 4 * size


def _attention_segments(c: Any) -> Iterator[tuple[int, int, int]]:
    """The same for what goes over a plan."""
    plan, at = c.plan, call.Call.plan.offset
    q, k = (c.B, c.Hq, c.Tq), (c.Bk, c.Hkv, c.Tk)
    views = {
        "q": ((*q, c.D), c.dtype), "k": ((*k, c.D), c.dtype), "v": ((*k, c.Dv), c.dtype),
        "out": ((*q, c.Dv), c.out_dtype), "dout": ((*q, c.Dv), c.dtype),
        "dq": ((*q, c.D), c.grad_dtype), "dk": ((*k, c.D), c.grad_dtype), "dv": ((*k, c.Dv), c.grad_dtype),
    }  # fmt: skip
    for name, (shape, dtype) in views.items():
        x = getattr(c, name)
        yield getattr(call.Call, name).offset, x.data, _extent(x, *shape) * ITEM[dtype]
    if c.pair.data:
        yield call.Call.pair.offset, c.pair.data, _extent(c.pair, *q, c.Tk) * ITEM[c.pair_dtype]
    heads, rows = c.B * c.Hq, c.B * c.Hq * c.Tq
    floats = {"lse": rows, "norm": 2 * rows, "dlse": rows, "delta": rows, "dbias": heads * c.Tk}
    floats |= {"stat": heads * c.stat_width, "dpair": rows * c.Tk, "ddistance": heads * (c.Tq + c.Tk - 1)}
    for name, items in floats.items():
        yield getattr(call.Call, name).offset, getattr(c, name), 4 * items
    yield call.Call.skipped.offset, c.skipped, 16 * heads
    tables = [
        (getattr(call.Call, name).offset, getattr(c, name), 4) for name in ("key_bias", "alibi", "distance")
    ]
    for name in (*call._PLAN_TABLES, *call._PLAN_HEADS):
        wide = 8 if name in ("span_start", "start", "bits_start") else 4
        tables.append((at + getattr(call.NativePlan, name).offset, getattr(plan, name), wide))
    for offset, x, wide in tables:
        yield offset, x.data, wide * x.batch * x.heads * x.length
    words = plan.tile * -(-plan.unit // 32)
    for name, items in (
        ("spans", 2 * plan.spans_size),
        ("index", plan.index_size),
        ("bits", words * plan.bits_size),
    ):
        yield at + getattr(call.NativePlan, name).offset, getattr(plan, name), 4 * items


def _decode_segments(c: Any) -> Iterator[tuple[int, int, int]]:
    """The same for decode, whose calls follow the structure."""
    yield call.Decode.sink.offset, c.sink, 4 * c.calls[0].Hq
    for n in range(c.plans):
        at = ctypes.sizeof(call.Decode) + n * ctypes.sizeof(call.Call)
        for offset, address, size in _attention_segments(c.calls[n]):
            yield at + offset, address, size


SEGMENTS = {
    call.Call: _attention_segments,
    call.Decode: _decode_segments,
    linear.Call: _linear_segments,
    indexer.Call: _indexer_segments,
    indexer.LossCall: _loss_segments,
}


class Remote:
    """The library's entry points, in a process that `command` starts."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _read(self, n: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(n)
        assert len(data) == n, f"the driver ended with {self.process.wait()}"
        return data

    def _write(self, *parts: bytes) -> None:
        assert self.process.stdin is not None
        for part in parts:
            self.process.stdin.write(part)
        self.process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def sf_poison(self, on: int) -> None:
        self._write(struct.pack("<qqqq", -1, on, 0, 0))

    def __getattr__(self, name: str) -> Any:
        entry = ENTRIES.index(name)

        def enter(pointer: Any, level: int) -> int:
            c = pointer._obj
            given = {offset: (address, size) for offset, address, size in SEGMENTS[type(c)](c) if address}
            blocks = list(dict.fromkeys(given.values()))  # each once: plans share tensors
            body = bytes(c) + b"".join(map(bytes, c.calls[: c.plans] if name == "sf_decode" else ()))
            self._write(
                struct.pack("<qqqq", entry, len(given), len(blocks), len(body)),
                *(struct.pack("<qq", offset, blocks.index(block)) for offset, block in given.items()),
                *(struct.pack("<q", size) for _, size in blocks),
                body,
                *(ctypes.string_at(address, size) for address, size in blocks),
            )
            (code,) = struct.unpack("<q", self._read(8))
            for address, size in blocks:
                data = self._read(size)
                if ctypes.string_at(address, size) != data:  # inputs may be read-only, and are the same
                    ctypes.memmove(address, data, size)
            return code

        return enter
