"""Pickling of plans: what is written, and what is checked when a plan is read.

A file may hold anything, and kernels read the addresses that a plan gives. So a plan that is read passes the
checks of a hand-made plan, and derived data (transposed lists, fixed capacities) is rebuilt or verified.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..common.errors import PlanError
from .checks import check_values
from .lists import Lists
from .record import Record
from .transpose import prepared as transposed

_DERIVED = ("span_keys", "unit_keys")


def state(plan: Record) -> dict[str, Any]:
    """The fields of a plan to pickle; instead of transposed lists, only whether the plan has them."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    keys = [fields.pop(name) for name in _DERIVED]
    return {**fields, "prepared": any(x is not None for x in keys)}


def restored(kind: type[Record], state: Any) -> dict[str, Any]:
    """The fields of a plan from its `state`.

    Raises
    ------
    PlanError
        If the state is not that of a valid plan.
    """
    try:
        plan = kind(**{f.name: state[f.name] for f in dataclasses.fields(kind) if f.init and f.name in state})
        prepared, rooms = bool(state["prepared"]), {name: state[name] for name in ("span_room", "room")}
    except (AttributeError, KeyError, TypeError) as fault:
        raise PlanError(f"this is no saved plan, or a broken one: {fault!r}; save it again") from None
    real = plan.device.type != "meta" and all(type(x) is Tensor for x in plan.tensors().values())
    if real and plan.device.type != "cpu":  # the constructor has checked CPU tensors
        check_values(plan)
    for lists in plan.lists():
        name = lists.NAMES["room"]
        if _fits(lists, rooms[name], real=real):
            object.__setattr__(plan, name, rooms[name])
    return vars(transposed(plan) if prepared and real else plan)


def _fits(lists: Lists, room: Any, *, real: bool) -> bool:
    """Whether list n begins at slot n * room, and the pool has exactly `room` slots for each list."""
    if type(room) is not int or room < 1 or len(lists.pool) != lists.count.numel() * room:
        return False
    if not real:  # meta or traced tensors have no values
        return True
    begin = torch.arange(0, len(lists.pool), room, device=lists.start.device)
    return bool((lists.start.flatten() == begin).all()) and bool((lists.count <= room).all())
