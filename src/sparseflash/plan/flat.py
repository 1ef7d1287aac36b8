"""A plan as flat lists of tensors and integers: the schema by which custom ops take plans.

From the first release on slots are only appended, so that graphs compiled by an older version stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .plan import Plan
from .record import KeyLists

TENSORS = (
    "span_start",
    "span_full",
    "span_count",
    "spans",
    "start",
    "full",
    "count",
    "index",
    "bits",
    "bits_start",
    "q_order",
    "k_order",
    "q_offset",
    "q_pos",
    "k_pos",
    "k_end",
    "q_seg",
    "k_seg",
    "head_window",
    "head_sink",
    "overflow",
)
KEYS = ("start", "count", "full", "index", "source", "until")
TENSOR_SLOTS = len(TENSORS) + 2 * len(KEYS)
INT_SLOTS = 20  # 16 in use
UNBOUNDED = -1


def flatten(plan: Plan) -> tuple[list[Tensor], list[int]]:
    """The plan's tensors in slot order, and its integers; the last integer is the bit mask of used slots."""
    offset = plan.q_offset
    left, right = plan.window or (None, None)
    slots: list[Tensor | None] = [
        None if n == "q_offset" and not isinstance(offset, Tensor) else getattr(plan, n) for n in TENSORS
    ]
    for keys in (plan.span_keys, plan.unit_keys):
        slots += [None if keys is None else getattr(keys, n) for n in KEYS]
    ints = [
        plan.Tq,
        plan.Tk,
        plan.tile,
        plan.unit,
        int(plan.causal),
        int(plan.include_self),
        int(plan.window is not None),
        UNBOUNDED if left is None else left,
        UNBOUNDED if right is None else right,
        plan.sink,
        0 if isinstance(offset, Tensor) else offset,
        plan.span_keys.group if plan.span_keys is not None else 0,
        plan.unit_keys.group if plan.unit_keys is not None else 0,
        plan.span_room,
        plan.room,
    ]
    used = sum(1 << n for n, x in enumerate(slots) if x is not None)
    return [x for x in slots if x is not None], ints + [0] * (INT_SLOTS - 1 - len(ints)) + [used]


def unflatten(tensors: Sequence[Tensor], ints: Sequence[int]) -> Plan:
    """Invert `flatten`, without validating again."""
    rest = iter(tensors)
    slots = [next(rest) if ints[-1] >> n & 1 else None for n in range(TENSOR_SLOTS)]
    Tq, Tk, tile, unit, causal, include_self, windowed, left, right, sink, offset, span_group, unit_group = (
        ints[:13]
    )
    values: dict[str, Any] = dict(zip(TENSORS, slots, strict=False))
    values |= {
        "Tq": Tq,
        "Tk": Tk,
        "tile": tile,
        "unit": unit,
        "causal": bool(causal),
        "include_self": bool(include_self),
        "window": (None if left < 0 else left, None if right < 0 else right) if windowed else None,
        "sink": sink,
        "span_room": ints[13],
        "room": ints[14],
    }
    if values["q_offset"] is None:
        values["q_offset"] = offset
    at = len(TENSORS)
    for name, group in (("span_keys", span_group), ("unit_keys", unit_group)):
        values[name] = KeyLists(**dict(zip(KEYS, slots[at:], strict=False)), group=group) if group else None  # type: ignore[arg-type]
        at += len(KEYS)
    plan = object.__new__(Plan)
    for name, value in values.items():
        object.__setattr__(plan, name, value)
    return plan


def flatten_all(plans: Sequence[Plan]) -> tuple[list[Tensor], list[int]]:
    """Flatten several plans and concatenate the results."""
    tensors: list[Tensor] = []
    ints: list[int] = []
    for plan in plans:
        t, i = flatten(plan)
        tensors += t
        ints += i
    return tensors, ints


def unflatten_all(tensors: Sequence[Tensor], ints: Sequence[int]) -> list[Plan]:
    """Invert `flatten_all`."""
    plans, at = [], 0
    for n in range(0, len(ints), INT_SLOTS):
        own = ints[n : n + INT_SLOTS]
        count = int(own[-1]).bit_count()
        plans.append(unflatten(tensors[at : at + count], own))
        at += count
    return plans
