"""What arguments of attention cost: each call beside the same one without; and wide heads beside narrow.

`ratio` is the call's time over its twin's. Of wide heads it is the rate in multiplications a second over that
of 128 dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, Timing, interleave

WIDE = ((256, 256), (512, 512), (576, 512), (576, 576))
NARROW = 128


def options(H: int, T: int) -> dict[str, dict[str, Any]]:
    """Arguments by a name; those that have no backward are named in `FORWARD`."""
    return {
        "block maxima, 64 x 64": {"return_block_max": (64, 64)},
        "block maxima, 128 x 32": {"return_block_max": (128, 32)},
        "skipping, nothing is skipped": {"skip_below": 1e4},
        "dropout 0.1": {"dropout_p": 0.1, "dropout_seed": 1},
        "alibi": {"alibi_slopes": torch.rand(H)},
        "bias by distance": {"pair_bias": torch.randn(1, H, 2 * T - 1)},
        "bias by distance, learning": {"pair_bias": torch.randn(1, H, 2 * T - 1, requires_grad=True)},
    }


FORWARD = ("block maxima", "skipping")


def measure(
    *,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    length: int = 2048,
    dims: Sequence[int] = (64, 128),
    heads: int = 2,
    rounds: int = 7,
    minutes: float = 6.0,
    threads: int = 0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """A row for each argument, dtype, head dimension and direction; then those of wide heads."""
    box, before = Box(minutes * 60), torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for dtype in dtypes:
            for dim in dims:
                shape: Row = {"bench": "arguments", "dtype": dtype, "T": length, "heads": heads, "dim": dim}
                inputs = _inputs(heads, length, dim, dim, dtype)
                for back in (False, True):
                    calls = {"": _call(inputs, {}, back)}
                    for name, given in options(heads, length).items():
                        if not (back and name.startswith(FORWARD)):
                            calls[name] = _call(inputs, given, back)
                    if not back:
                        calls["skipping, nearly all"] = _call(_sunk(inputs), {"skip_below": 1.0}, False)
                    found = interleave(calls, rounds=rounds, box=box, on_run=on_run)
                    for name in list(calls)[1:]:
                        yield shape | _row(name, back, found[name], found[""])
            yield from _wide(dtype, length, heads, rounds, box, on_run)
    finally:
        torch.set_num_threads(before)


def _row(name: str, back: bool, own: Timing, twin: Timing) -> Row:
    direction = "both" if back else "forward"
    return {
        "case": name, "direction": direction, "ms": own.median * 1e3, "ms_twin": twin.median * 1e3,
        "ratio": own.over(twin), "rounds": len(own.times),
    }  # fmt: skip


def _inputs(H: int, T: int, D: int, Dv: int, dtype: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, H, T, d, generator=g).to(DTYPES[dtype]) for d in (D, D, Dv, Dv)]


def _sunk(inputs: list[Tensor]) -> list[Tensor]:
    """The same where all look at the first keys: nearly every block may be skipped."""
    q, k, *rest = (x.clone() for x in inputs)
    q[..., 0], k[..., 0] = 30, 0
    k[:, :, :8, 0] = 30
    return [q, k, *rest]


def _call(inputs: list[Tensor], given: dict[str, Any], back: bool) -> Callable[[], object]:
    q, k, v, dout = inputs
    if not back:
        return torch.no_grad()(lambda: sf.attention(q, k, v, causal=True, **given))

    def both() -> object:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        bias = given.get("pair_bias")
        learns = (
            {} if bias is None or not bias.requires_grad else {"pair_bias": bias.detach().requires_grad_()}
        )
        out = sf.attention(*leaves, causal=True, **(given | learns))
        return torch.autograd.grad(out, [*leaves, *learns.values()], dout)

    return both


def _wide(
    dtype: str, length: int, heads: int, rounds: int, box: Box, on_run: Callable[[str], None]
) -> Iterator[Row]:
    for back in (False, True):
        sizes = {"": (NARROW, NARROW)} | {f"D = {d}, Dv = {dv}": (d, dv) for d, dv in WIDE}
        calls = {name: _call(_inputs(heads, length, *size, dtype), {}, back) for name, size in sizes.items()}
        found = interleave(calls, rounds=rounds, box=box, on_run=on_run)
        for name in list(calls)[1:]:
            D, Dv = sizes[name]
            row = _row(name, back, found[name], found[""])
            row["ratio"] = (D + Dv) / (2 * NARROW) / float(row["ratio"] or 1)
            yield {"bench": "arguments", "dtype": dtype, "T": length, "heads": heads, "dim": D} | row
