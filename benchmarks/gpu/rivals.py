"""The kernels that ours are measured against, each as a callable `(q, k, v) -> out`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash import Plan

from .device import AHEAD, DRY, Times, times

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(plan: Plan) -> Attention:
    """Our kernels, under a plan that is ready."""
    return lambda q, k, v: sf.attention(q, k, v, plan)


def sdpa(kind: str) -> Attention:
    """One of torch's dense causal kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, kind)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def dense() -> dict[str, Attention]:
    """Every dense causal kernel that is here."""
    if AHEAD:
        return {}
    if DRY:
        return {"math": sdpa("MATH")}
    found = {"cudnn": sdpa("CUDNN_ATTENTION"), "flash": sdpa("FLASH_ATTENTION")}
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func

        def three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found["flash 3"] = three
    return found


def flex(plan: Plan) -> dict[str, Attention]:
    """Compiled FlexAttention under the same mask; made at its first call, so that a failure is a row's."""
    if DRY or AHEAD:
        return {}
    made: list[Attention] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not made:
            from torch.nn.attention.flex_attention import flex_attention

            mask, compiled = plan.to_block_mask(), torch.compile(flex_attention, dynamic=False)
            made.append(lambda q, k, v: compiled(q, k, v, block_mask=mask))
        return made[0](q, k, v)

    return {"flex": run}


def both_ways(
    cases: dict[str, Attention], given: tuple[Tensor, Tensor, Tensor, Tensor], *, rounds: int = 20
) -> dict[str, tuple[Times, Times]]:
    """Times of the forward alone and of the backward alone, all cases in turn."""
    q, k, v, dout = given
    plain = [x.detach() for x in (q, k, v)]

    def back(case: Attention) -> Callable[[], object]:
        out: list[Tensor] = []

        def run() -> object:
            if not out:
                out.append(case(q, k, v))
            return torch.autograd.grad(out[0], (q, k, v), dout, retain_graph=True)

        return run

    with torch.no_grad():
        forward = times({n: lambda case=case: case(*plain) for n, case in cases.items()}, rounds=rounds)
    backward = times({n: back(case) for n, case in cases.items()}, rounds=rounds)
    return {name: (forward[name], backward[name]) for name in cases}
