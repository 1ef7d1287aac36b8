"""Conformance: a subject that is wrong, sees the future or returns a cached result gets no figures."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseflash.bench.cases import inputs
from sparseflash.bench.subjects import Subject
from sparseflash.ops.attention import attention

LENGTH, HEADS = 129, 2
CHANGED = 70
"""Tokens from this index on are changed; earlier outputs must not move."""


def check(subject: Subject, *, dim: int = 64, dtype: str = "fp32", device: str = "cpu") -> str:
    """Describe what is wrong with a subject; "" if nothing is.

    On two different inputs, output and gradients are compared with the float64 reference over the same
    selection. Allowed is twice the error of the reference in the subject's own precision (three times for
    gradients), plus a few roundings of the largest element. Then later tokens change, and earlier outputs
    must not. A subject that returns a cached result fails on the second input.
    """
    for seed in (0, 1):
        q, k, v, dout = (
            x.detach().to(device) for x in inputs(LENGTH, heads=HEADS, dim=dim, dtype=dtype, seed=seed)
        )
        want, own = (_reference(subject, q, k, v, dout, as_) for as_ in (torch.float64, q.dtype))
        got = _run(subject, q, k, v, dout)
        for name, x in got.items():
            factor, band = (2, 2) if name == "out" else (3, 4)
            allowed = factor * (own[name] - want[name]).abs().max()
            allowed += band * torch.finfo(q.dtype).eps * want[name].abs().max()
            error = (x - want[name]).abs().max()
            if not error <= allowed:
                return f"{name} is off by {error:.2g} on input {seed + 1}; {allowed:.2g} is allowed"
    return _future(subject, q, k, v)


def _run(subject: Subject, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_(subject.backward) for x in (q, k, v)]
    out = subject(*leaves)
    found = {"out": out.detach().double()}
    if subject.backward:
        grads = torch.autograd.grad(out, leaves, dout)
        found |= {f"the gradient of {n}": g.double() for n, g in zip("qkv", grads)}
    return found


def _reference(
    subject: Subject, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The subject's own selection, or dense causal attention, by the reference backend in `dtype`."""
    selection = subject.select(q, k, v)
    learns = subject.backward
    q, k, v = (x.to(dtype).requires_grad_(learns) for x in (q.detach().clone(), k.clone(), v.clone()))
    if selection is None or subject.method is None:
        out = attention(q, k, v, causal=True, backend="reference")
    elif subject.kind == "method":
        out = subject.method(q, k, v, selection=selection, backend="reference")
    else:
        out = attention(q, k, v, selection.plan, backend="reference")
    found = {"out": out.detach().double()}
    if not learns:
        return found
    grads = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
    return found | {f"the gradient of {n}": g.double() for n, g in zip("qkv", grads)}


@torch.no_grad()
def _future(subject: Subject, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Change later values, and also later queries and keys if the selection should be causal."""
    before = subject(q, k, v)[:, :, :CHANGED]
    later = [v]
    if subject.method is None or subject.method.causal_selection:
        later += [k, q]
    changed = [x.clone() for x in (q, k, v)]
    for x in changed[-len(later) :] if len(later) == 1 else changed:
        x[:, :, CHANGED:] = x[:, :, CHANGED:].flip(2).neg() * 3
    after = subject(*changed)[:, :, :CHANGED]
    moved = float((after - before).abs().max())
    allowed = 4 * torch.finfo(q.dtype).eps * float(before.abs().max())
    return (
        "" if moved <= allowed else f"sees the future: outputs move by {moved:.2g} when later tokens change"
    )
