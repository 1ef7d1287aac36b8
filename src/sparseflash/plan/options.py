"""What all of `plan/` says alike: sizes, offsets, windows and head axes, and how they are checked.

Numbers become int32 here, never modulo 2^32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import PlanError, require

Fields = dict[str, Any]
"""Fields of a plan by name, as constructors make them."""
Window = tuple[int | None, int | None]

TILE = 128
UNIT = 128
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ANY, NONE = -1, -2
"""Segments: one that matches all, and one of no real token."""
FAR = 1 << 40
"""Further than any position or distance."""
SHORT = torch.iinfo(torch.int32)
"""What the tensors of a plan hold, and so what a position, a length and a number of a unit can be."""
FARTHEST = 2**32 - 1
"""No two positions are further apart."""


def is_count(x: object, least: int = 0) -> TypeGuard[int]:
    """Whether x is an int (no bool) of at least that much; a symbolic size counts."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool) and x >= least


def is_length(x: object, least: int = 0) -> bool:
    """Whether x counts tokens: all tensors of a plan are int32."""
    return is_count(x, least) and x < 2**31


def check_options(**options: Any) -> None:
    """Tiles and units are positive, whatever else is given here True or False."""
    for name, x in options.items():
        if name in ("tile", "unit"):
            require(
                (is_length(x, 1), lambda: f"{name}={x!r}: expected a positive int of 32 bits"),
                error=PlanError,
            )
        else:
            require((isinstance(x, bool), lambda: f"{name}={x!r}: expected True or False"), error=PlanError)


def host(x: Tensor) -> bool:
    """Whether values may be looked at: they lie in main memory, and this is no trace of a later run."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def precise(x: Tensor) -> AbstractContextManager[Any]:
    """Where products have the precision of what is multiplied, whatever autocast is on."""
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def known(size: int) -> bool:
    """Whether a size is a number now; in a graph for all lengths it may be a symbol, which no branch may ask.

    Where it is one, code takes the way that is right for every size.
    """
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return bool(has_static_value(size))


def doublings(size: int) -> int:
    """How often 1 is doubled until it is as large as `size`; often enough for any size, if it is a symbol."""
    return max(size, 1).bit_length() if known(size) else 32


def common(*sizes: int) -> int:
    """The greatest common divisor, of sizes that may be symbols too."""
    found = 0
    for n in sizes:
        while n:
            found, n = n, found % n
    return found


def pieces(total: int, step: int) -> list[tuple[int, int]]:
    """Ranges [at, to) of `step` that make up [0, total): what is held at once. A trace takes it whole.

    It would unroll the loop, and so hold for one length alone; a compiler sees to memory itself.
    """
    if torch.compiler.is_compiling():
        return [(0, total)]
    return [(at, min(at + step, total)) for at in range(0, total, step)]


def joint(sizes: Iterable[int]) -> int | None:
    """The one size beside 1 that all broadcast to, 1 where there is no other; None where they do not fit.

    Without a set: to hash a size that a compiler has put a symbol for makes it a constant.
    """
    found = 1
    for n in sizes:
        if n != 1 and found == 1:
            found = n
        elif n not in (1, found):
            return None
    return found


def shape_of(x: object) -> str:
    """What a message says of something that should have been a tensor of another shape."""
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def fit(x: Tensor, said: str, least: int, most: int, want: str = "expected {least}..{most}") -> Tensor:
    """x, whose values lie in least..most: refused where they can be seen, elsewhere moved to the nearest.

    The message is `said` (such as "lengths hold"), the values, and what is wanted; filled in only then, since
    a number in a message would pin a symbolic length.
    """
    if not host(x):
        return (x if x.dtype in (torch.int32, torch.int64) else x.int()).clamp(least, most)
    if x.numel():
        low, high = (int(end) for end in torch.aminmax(x))
        if low < least or high > most:
            raise PlanError(f"{said} {low}..{high}: {want.format(least=least, most=most)}")
    return x


def narrow(x: Tensor, said: str = "") -> Tensor:
    """Integers as int32, never modulo 2^32, and without waiting for a device.

    With `said` (as in `fit`), a value that does not fit is refused where it can be seen. Without, and
    elsewhere, it becomes the nearest that does: "never" and "unbounded" are any large number.
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
    """Split a window and a sink that may hold a tensor [H] into numbers, and tables [1,H,2] and [1,H,1]."""
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
    """An offset so many tokens before; `normal_offset` says where that is too early."""
    offset = normal_offset(q_offset)
    return (offset.long() if isinstance(offset, Tensor) else offset) - n


def same_offset(a: Any, b: Any) -> bool:
    """Whether two offsets are equal, as far as that can be seen without waiting for a device."""
    given = [x for x in (a, b) if isinstance(x, Tensor)]
    if not given:
        return bool(a == b)
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in given):
        return len(given) == 2
    return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())


def shift_of(q_offset: int | Tensor, dims: int) -> int | Tensor:
    """An offset that broadcasts over `dims` axes behind that of the batch, int64."""
    return q_offset.long().reshape(-1, *[1] * dims) if isinstance(q_offset, Tensor) else q_offset


def shift_at(q_offset: int | Tensor, b: Tensor) -> int | Tensor:
    """The offset of each of some places of the batch."""
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
    """A plan tensor [B|1,H',...] with a row for every batch slot and head, without memory of its own."""
    return spread_heads(x, heads).expand(batch, -1, *x.shape[2:])


def common_heads(*tensors: Tensor) -> int:
    """Smallest head count that every head axis (dim 1) divides."""
    return multiple(*(t.shape[1] for t in tensors))


def multiple(*sizes: int) -> int:
    """The least common multiple; a symbolic size is compared, where `math.lcm` wants its number."""
    found = 1
    for n in sizes:
        if n == 0 or found % n:
            found = n if n and n % found == 0 else math.lcm(found, n)
    return found


def divisor(*sizes: int) -> int:
    """The greatest common divisor; symbolic sizes are compared, too."""
    found = sizes[0] if sizes else 0
    for n in sizes[1:]:
        if found == 0 or n % found:
            found = n if n and found % n == 0 else math.gcd(found, n)
    return found


def same_batch(a: Tensor, b: Tensor, names: str) -> int:
    """The common batch size (0 of an empty batch) of two plan tensors on one device."""
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
