"""The ops under the transforms of `torch.func`, which know nothing of custom ops with a backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

from ..errors import DerivativeError
from ._arguments import transformed

Call = Callable[..., Any]
_REVERSE = "gradients here are those of reverse mode, once: grad, vjp, jacrev or backward()"
_TANGENT = f"an input has a tangent (jvp, jacfwd, hessian, forward_ad): {_REVERSE}"


def differentiable(op: Any, backward: Call, setup_context: Call) -> Call:
    """Register the backward of an op, and return the op for callers that may stand under a transform.

    `grad`, `vjp`, `jacrev` and `vmap`, within one another, want a Function that keeps its context apart. It
    refuses forward mode, where an op would drop tangents without a word.
    """
    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(functools.partial(_each, op))
    context = setup_context

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*given: Any) -> Any:
            return op(*given)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return tuple(None if isinstance(x, list) else x for x in backward(ctx, *grads))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise DerivativeError(_TANGENT)

    def call(*given: Any) -> Any:
        if torch.compiler.is_compiling():  # it cannot trace such a Function, and it enters levels for real
            if forward_ad._current_level >= 0:
                raise DerivativeError(_TANGENT)
            return op(*given)
        if not transformed():
            return op(*given)
        return Transformed.apply(*given)  # type: ignore[no-untyped-call]  # torch declares no types for it

    return call


def last(op: Any) -> Call:
    """The same for an op that has no gradient itself: one that computes gradients, or decodes."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise DerivativeError(f"a second derivative was asked for, or one of decoding: {_REVERSE}")

    return differentiable(op, refuse, lambda ctx, inputs, output: None)


def _each(op: Any, info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
    """One call for each place of the axis, whatever tensors have it: plans, sinks and rates may."""
    flat, spec = _pytree.tree_flatten(given)
    dims = _pytree.tree_leaves(in_dims)

    def at(place: int) -> Any:
        own = [x if d is None else x.select(d, place) for x, d in zip(flat, dims, strict=True)]
        return op(*_pytree.tree_unflatten(own, spec))

    parts = [at(place) for place in range(info.batch_size)]
    if isinstance(parts[0], Tensor):
        return torch.stack(parts), 0
    return tuple(torch.stack(x) for x in zip(*parts, strict=True)), (0,) * len(parts[0])


@torch.library.custom_op("sparseflash::once", mutates_args=())
def _copy(grad: Tensor, of: Tensor | None) -> Tensor:
    return grad.clone()


@_copy.register_fake
def _(grad: Any, of: Any) -> Tensor:
    return torch.empty_like(grad)


_once = last(_copy)


def once(grad: Tensor, of: Tensor | None = None) -> Tensor:
    """A gradient that plain PyTorch has computed, made to refuse a second derivative as those of ops do.

    `of`: an output of the op, where `grad` is computed from constants alone: what depends on it reaches it.
    """
    found: Tensor = _once(grad, of) if torch.is_grad_enabled() else grad
    return found
