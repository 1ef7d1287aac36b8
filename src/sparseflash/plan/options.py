"""Shared helpers of `plan/`: sizes, offsets, windows and head axes, and their validation.

Integers are clamped or refused when they become int32; they never wrap modulo 2^32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..common.errors import PlanError, require

Fields = dict[str, Any]
"""Fields of a plan by name, as the constructors in `make/` return them."""
Window = tuple[int | None, int | None]

TILE = 128
UNIT = 128
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ANY, NONE = -1, -2
"""Segment labels: ANY matches every segment, NONE marks tokens that are not real."""
FAR = 1 << 40
"""Larger than any position or distance."""
SHORT = torch.iinfo(torch.int32)
"""Range of int32, the dtype of a plan's tensors, and so of positions, lengths and unit numbers."""
FARTHEST = 2**32 - 1
"""Largest distance between two int32 positions."""


def is_count(x: object, least: int = 0) -> TypeGuard[int]:
    """Whether x is an int (no bool) or a symbolic size, of at least `least`."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool) and x >= least


def is_length(x: object, least: int = 0) -> bool:
    """Whether x is a count that int32 holds, as all tensors of a plan are int32."""
    return is_count(x, least) and x < 2**31


def check_options(**options: Any) -> None:
    """Check that `tile` and `unit` are positive ints and every other option is a bool."""
    for name, x in options.items():
        if name in ("tile", "unit"):
            require(
                (is_length(x, 1), lambda: f"{name}={x!r}: expected a positive int of 32 bits"),
                error=PlanError,
            )
        else:
            require((isinstance(x, bool), lambda: f"{name}={x!r}: expected True or False"), error=PlanError)


def host(x: Tensor) -> bool:
    """Whether x's values may be read: x is a plain CPU tensor, and no compiler is tracing."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def precise(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autocast is off, so that products keep the precision of their operands."""
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def known(size: int) -> bool:
    """Whether a size is a concrete number; in a dynamic-shape graph it may be a symbol.

    A branch on a symbol would specialise the graph, so callers then take the path valid for every size.
    """
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return bool(has_static_value(size))


def doublings(size: int) -> int:
    """Doublings of 1 that reach at least `size`; 32, enough for every size, if `size` is a symbol."""
    return max(size, 1).bit_length() if known(size) else 32


def common(*sizes: int) -> int:
    """The greatest common divisor of sizes, which may be symbolic."""
    found = 0
    for n in sizes:
        while n:
            found, n = n, found % n
    return found


def pieces(total: int, step: int) -> list[tuple[int, int]]:
    """Chunks [at, to) of `step` that partition [0, total); one chunk while a compiler traces.

    Tracing would unroll the loop, and so fix the graph to one length; the compiler plans memory itself.
    """
    if torch.compiler.is_compiling():
        return [(0, total)]
    return [(at, min(at + step, total)) for at in range(0, total, step)]


def joint(sizes: Iterable[int]) -> int | None:
    """The size that all `sizes` broadcast to, None if they do not.

    No set is used, because hashing a symbolic size would specialise it to a constant.
    """
    found = 1
    for n in sizes:
        if n != 1 and found == 1:
            found = n
        elif n not in (1, found):
            return None
    return found


def shape_of(x: object) -> str:
    """Describe x for an error message: its shape, or the name of its type if it is no tensor."""
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def fit(x: Tensor, said: str, least: int, most: int, want: str = "expected {least}..{most}") -> Tensor:
    """Ensure least <= x <= most: raise `PlanError` where values can be read, elsewhere clamp.

    The message is `said` (such as "lengths hold"), the values, and `want`; it is formatted only on failure,
    because formatting a symbolic length would specialise it.
    """
    if not host(x):
        return (x if x.dtype in (torch.int32, torch.int64) else x.int()).clamp(least, most)
    if x.numel():
        low, high = (int(end) for end in torch.aminmax(x))
        if low < least or high > most:
            raise PlanError(f"{said} {low}..{high}: {want.format(least=least, most=most)}")
    return x


def narrow(x: Tensor, said: str = "") -> Tensor:
    """Convert integers to int32 without wrapping modulo 2^32 and without a device synchronisation.

    With `said` (as in `fit`), a value out of range raises where values can be read. Without it, and
    elsewhere, values are clamped, so that any large number can mean "never" or "unbounded".
    """
    if x.dtype == torch.int64:
        want = "expected integers of 32 bits"
        x = fit(x, said, SHORT.min, SHORT.max, want) if said else x.clamp(SHORT.min, SHORT.max)
    return x.int()


def normal_window(window: Window | None) -> Window | None:
    """Validate a window; `None` and -1 both mean unbounded on that side."""
    if window is None:
        return None
    require(
        (
            isinstance(window, (tuple, list)) and len(window) == 2,
            lambda: f"window={window!r}: expected (left, right)",
        ),
        error=PlanError,
    )
    sides = tuple(None if w is None or (is_count(w, -1) and w == -1) else w for w in window)
    for side in sides:
        require(
            (
                side is None or is_count(side),
                lambda: (
                    f"window={window!r}: distances are counts of tokens >= 0, or None (or -1) for unbounded"
                ),
            ),
            error=PlanError,
        )
    left, right = sides
    if left is not None and left > FARTHEST:
        left = None
    if right is not None and right > FARTHEST:
        right = None
    return None if left is None and right is None else (left, right)


def head_rules(window: Any, sink: Any) -> tuple[Window | None, int, Tensor | None, Tensor | None]:
    """Split a window and a sink into numbers or, if either holds a tensor [H], tables [1,H,2] and [1,H,1]."""
    sides = tuple(window) if isinstance(window, (tuple, list)) and len(window) == 2 else ()
    given = [x for x in (*sides, sink) if isinstance(x, Tensor)]
    if not given:
        return normal_window(window), min(sink, 2**31) if is_count(sink) else sink, None, None
    for x in given:
        require(
            (
                x.dim() == 1 and x.shape[0] > 0 and x.dtype in INTEGERS,
                lambda: f"window and sink per head: expected integers [H], got {shape_of(x)} {x.dtype}",
            ),
            error=PlanError,
        )
    heads = math.lcm(*[x.shape[0] for x in given])

    def table(x: Any, far: int) -> Tensor:
        if isinstance(x, Tensor):
            want = "distances are counts of tokens >= 0, or -1 for unbounded"
            x = fit(x, "window or sink per head holds", -1, torch.iinfo(x.dtype).max, want)
            if x.dtype == torch.int64:
                x = torch.where(x > SHORT.max, far, x)
            return spread_heads(narrow(x)[None], heads)
        require(
            (x is None or is_count(x, -1), lambda: f"{x!r}: expected a count, None or a tensor [H]"),
            error=PlanError,
        )
        x = -1 if x is None else far if x > SHORT.max else x
        return torch.full((1, heads), x, dtype=torch.int32, device=given[0].device)

    pair = torch.stack([table(x, -1) for x in (sides or (None, None))], -1)
    return None, 0, pair, table(sink, SHORT.max)[..., None]


def normal_offset(q_offset: int | Tensor) -> int | Tensor:
    """Validate a `q_offset`; a tensor becomes int32."""
    if isinstance(q_offset, Tensor):
        require(
            (
                q_offset.dtype in INTEGERS and q_offset.dim() <= 1,
                lambda: (
                    f"q_offset: {shape_of(q_offset)} {q_offset.dtype}; expected an int, or int32, 0-d or [B]"
                ),
            ),
            error=PlanError,
        )
        return narrow(q_offset, "q_offset holds")
    fits = isinstance(q_offset, torch.SymInt) or (is_count(q_offset, -(2**31)) and q_offset < 2**31)
    require(
        (fits, lambda: f"q_offset={q_offset!r}: expected an int of 32 bits, or an int32 tensor"),
        error=PlanError,
    )
    return q_offset


def earlier(q_offset: int | Tensor, n: int) -> int | Tensor:
    """The offset lowered by n; a later `normal_offset` refuses it if it leaves int32."""
    offset = normal_offset(q_offset)
    return (offset.long() if isinstance(offset, Tensor) else offset) - n


def same_offset(a: Any, b: Any) -> bool:
    """Whether two offsets are equal; of offsets not on the CPU, or traced, only whether both are tensors."""
    given = [x for x in (a, b) if isinstance(x, Tensor)]
    if not given:
        return bool(a == b)
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in given):
        return len(given) == 2
    return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())


def shift_of(q_offset: int | Tensor, dims: int) -> int | Tensor:
    """Reshape an offset to broadcast over `dims` axes after the batch axis, int64."""
    return q_offset.long().reshape(-1, *[1] * dims) if isinstance(q_offset, Tensor) else q_offset


def shift_at(q_offset: int | Tensor, b: Tensor) -> int | Tensor:
    """Gather the offset at batch indices b."""
    if not isinstance(q_offset, Tensor):
        return q_offset
    each = q_offset.long().reshape(-1)
    return each[b if each.numel() > 1 else torch.zeros_like(b)]


def spread_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat the head axis (dim 1) of a plan tensor to `heads`: list head = h * H // heads."""
    own = x.shape[1]
    if own == heads:
        return x
    if own == 1:
        return x.expand(-1, heads, *x.shape[2:])
    return x[:, torch.arange(heads, device=x.device) * own // heads]


def laid_out(x: Tensor, batch: int, heads: int) -> Tensor:
    """Expand a plan tensor [B|1,H',...] to [batch, heads, ...]; a view unless head groups repeat."""
    return spread_heads(x, heads).expand(batch, -1, *x.shape[2:])


def common_heads(*tensors: Tensor) -> int:
    """Smallest head count that every head axis (dim 1) divides."""
    return multiple(*(t.shape[1] for t in tensors))


def multiple(*sizes: int) -> int:
    """The least common multiple; compares symbolic sizes where `math.lcm` would specialise them."""
    found = 1
    for n in sizes:
        if n == 0 or found % n:
            found = n if n and n % found == 0 else math.lcm(found, n)
    return found


def divisor(*sizes: int) -> int:
    """The greatest common divisor; compares symbolic sizes, as `multiple` does."""
    found = sizes[0] if sizes else 0
    for n in sizes[1:]:
        if found == 0 or n % found:
            found = n if n and found % n == 0 else math.gcd(found, n)
    return found


def same_batch(a: Tensor, b: Tensor, names: str) -> int:
    """The common batch size (0 for an empty batch) of two plan tensors, which must share a device."""
    batch = b.shape[0] if a.shape[0] == 1 else a.shape[0]
    require(
        (
            a.shape[0] in (1, batch) and b.shape[0] in (1, batch),
            lambda: f"{names}: batch sizes {a.shape[0]} and {b.shape[0]}; expected one size, or 1",
        ),
        (
            a.shape[1] > 0 and b.shape[1] > 0,
            lambda: f"{names}: {a.shape[1]} and {b.shape[1]} heads; expected some",
        ),
        (a.device == b.device, lambda: f"{names} are on {a.device} and {b.device}: move them to one device"),
        error=PlanError,
    )
    return batch
