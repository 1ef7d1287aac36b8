"""Methods or settings that differ between heads, combined in one selection and one attention call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SparseFlashError
from ..plan import Plan

Context = Mapping[str, Any]
WHOLE = frozenset(("rope", "grid", "text", "modality", "q_offset", "state", "cache"))
"""Keys of `ctx` whose tensors have no head axis."""


def settings(method: Any) -> dict[str, tuple[Any, ...]]:
    """Fields that hold a tuple of one value per query head, except those that `select` takes as a tuple."""
    if not any(type(x) is tuple for x in vars(method).values()):  # fast path: runs at every call
        return {}
    own = type(method).per_head
    return {
        f.name: x
        for f in dataclasses.fields(method)
        if isinstance(x := getattr(method, f.name), tuple)
        and f.name not in own
        and "tuple" not in str(f.type)
    }


def apart(method: Any) -> list[Any] | None:
    """Split into one method per query head if fields hold a value per head; otherwise return None."""
    spread = settings(method)
    if not spread:
        return None
    counts = {name: len(x) for name, x in spread.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise SparseFlashError(
            f"{type(method).__name__}: settings of heads {counts}: expected one value for each query head"
        )
    return [
        dataclasses.replace(method, **{name: x[h] for name, x in spread.items()})
        for h in range(next(iter(counts.values())))
    ]


def groups(methods: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Group equal methods (None: dense), with the heads of each."""
    return [(m, [h for h, own in enumerate(methods) if own == m]) for m in dict.fromkeys(methods)]


def of_heads(x: Any, heads: list[int], H: int) -> Any:
    """Select from a tensor [B, n, ...] the list heads `h * n // H` of query heads h, of H."""
    n = x.shape[1]
    at = torch.tensor(heads, device=x.device) * n // H
    return x if n == 1 else x[:, at]


def context(ctx: Context | None, heads: list[int], H: int) -> dict[str, Any]:
    """Restrict the tensors of `ctx` to some heads, and drop its state."""
    return {
        name: of_heads(x, heads, H) if isinstance(x, Tensor) and x.dim() > 2 and name not in WHOLE else x
        for name, x in (ctx or {}).items()
        if name != "state"
    }


def select(methods: Sequence[Any], q: Tensor, k: Tensor, ctx: Context | None) -> dict[str, Any]:
    """Select with each head's own method, and combine the results into the fields of one selection."""
    H = q.shape[1]
    if len(methods) != H:
        raise SparseFlashError(f"settings for {len(methods)} heads, q has {H}: expected one each")
    parts: list[tuple[Any, ...]] = []
    heads: list[list[int]] = []
    states = (ctx or {}).get("state") or {}
    kept = {}
    for method, own in groups(methods):
        heads.append(own)
        if method is None:
            at = (ctx or {}).get("q_offset", 0)
            dense = Plan.dense(q.shape[2], k.shape[2], causal=True, q_offset=at, device=q.device)
            parts.append(((dense,), None, None))
            continue
        given = context(ctx, own, H) | ({"state": states[method]} if method in states else {})
        part = method.select(of_heads(q, own, H), of_heads(k, own, H), given)
        if part.inputs is not None:
            raise SparseFlashError(
                f"{method!r} attends other rows than it is given: it serves all heads or none"
            )
        if part.skip_below is not None:
            raise SparseFlashError(
                f"{method!r} lets the kernel skip blocks, by one threshold for all heads: give it all heads "
                "of the layer, with one setting"
            )
        plans = tuple(part.plan) if isinstance(part.plan, (tuple, list)) else (part.plan,)
        parts.append((plans, part.key_bias, part.gate))
        if part.state is not None:
            kept[method] = part.state
    plans, biases, gates = zip(*parts, strict=True)
    return {
        "plan": beside(plans, heads),
        "key_bias": _joined(biases, heads, 0.0),
        "gate": _joined(gates, heads, 1.0),
        "state": kept or None,
    }


def observe(
    methods: Sequence[Any], q: Tensor, k: Tensor, out: Tensor, lse: Tensor, selection: Any, ctx: Context
) -> dict[Any, Any] | None:
    """Collect the state of each head's method for its next call, by method."""
    H, found, kept = q.shape[1], {}, selection.state or {}
    for method, own in groups(methods):
        if method is None:
            continue
        part = dataclasses.replace(selection, state=kept.get(method))
        parts = (of_heads(x, own, H) for x in (q, k, out, lse))
        state = method.observe(*parts, part, context(ctx, own, H))
        found |= {} if state is None else {method: state}
    return found or None


def notes(methods: Sequence[Any], q: Tensor, k: Tensor, ctx: Context | None) -> dict[str, Tensor]:
    """Collect what each head's method says of it, [Hq] by name; NaN for heads whose method does not."""
    H, found = q.shape[1], dict[str, Tensor]()
    for method, own in groups(methods):
        if method is None:
            continue
        given = {name: x for name, x in context(ctx, own, H).items() if name in method.reads}
        for name, said in method.notes(of_heads(q, own, H), of_heads(k, own, H), given).items():
            found.setdefault(name, torch.full((H,), float("nan")))[own] = said.float().cpu()
    return found


def beside(plans: Sequence[tuple[Plan, ...]], heads: list[list[int]]) -> Plan | tuple[Plan, ...]:
    """Concatenate the plans of groups of heads; a tuple if some group has several."""
    made = []
    for n in range(max(map(len, plans))):
        row = [own[n] if n < len(own) else _nothing(own[0]) for own in plans]
        made.append(Plan.by_head(row, heads=heads))
    return made[0] if len(made) == 1 else tuple(made)


def _nothing(plan: Plan) -> Plan:
    """Make an empty plan like `plan`."""
    none = torch.zeros(1, 1, -(-plan.Tq // plan.tile), 0, 2, dtype=torch.int64, device=plan.device)
    empty = Plan.from_spans(none, Tq=plan.Tq, Tk=plan.Tk, tile=plan.tile, unit=plan.unit)
    return empty._changed(causal=plan.causal, q_offset=plan.q_offset)


def _joined(given: Sequence[Tensor | None], heads: list[list[int]], blank: float) -> Tensor | None:
    """Concatenate tensors [B|1, H|1, T] of groups of heads; `blank` fills groups without one."""
    some = [x for x in given if x is not None]
    if not some:
        return None
    B, T = max(x.shape[0] for x in some), some[0].shape[-1]
    H = sum(map(len, heads))
    rows: list[Tensor | None] = [None] * H
    for x, own in zip(given, heads, strict=True):
        x = some[0].new_full((1, 1, T), blank) if x is None else x
        for i, h in enumerate(own):
            rows[h] = x[:, i * x.shape[1] // len(own)].expand(B, T)
    return torch.stack([x for x in rows if x is not None], 1)
