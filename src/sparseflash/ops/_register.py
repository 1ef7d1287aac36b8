"""Register functions as PyTorch custom ops, in one way for all ops.

An op's function takes tensors, then a plan or plans if it reads any, then its options, a NamedTuple of
numbers and strings. `register` makes a custom op of it with a flat schema (tensors, the plans' tensors and
integers, one argument per option), a fake kernel, a backward, a vmap rule and support for the transforms of
`torch.func`; and a fast path for eager code that passes plans as objects and skips the dispatcher.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

from ..common.errors import DerivativeError
from ..plan import Plan
from ..plan.flat import flatten_all, unflatten, unflatten_all
from ._arguments import casts

_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)
Call = Callable[..., Any]
P = ParamSpec("P")
R = TypeVar("R")
_REVERSE = "gradients here are those of reverse mode, once: grad, vjp, jacrev or backward()"
_TANGENT = f"an input has a tangent (jvp, jacfwd, hessian, forward_ad): {_REVERSE}"


def transformed() -> bool:
    """Whether a `torch.func` transform or a forward-mode AD level is active."""
    return _transforms() is not None or forward_ad._current_level >= 0


def untraced(*tensors: Tensor | None) -> bool:
    """True if no compiler, dispatch mode, functorch transform, tensor subclass or meta tensor is involved.

    An op's body may then run without the dispatcher, which takes longer than the kernel in a short call.
    """
    if torch.compiler.is_compiling() or _modes() or transformed():
        return False
    for x in tensors:
        if x is not None and (type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta):
            return False
    return True


def learning(*tensors: Tensor | None) -> bool:
    """Whether autograd records for one of the tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


class Flat(NamedTuple):
    """Plans in the flat form that custom ops take (`plan/flat.py`)."""

    tensors: Sequence[Tensor]
    ints: Sequence[int]


class Gradient(NamedTuple):
    """Defines how an op is differentiated."""

    find: Call
    """(run, kept, slopes, [plans,] [options]) -> a gradient or None for each tensor argument, in any floating
    dtype. `run` is the op `by`, traced or direct; `slopes` are the gradients of the results, None if nothing
    depends on a result."""
    keep: Callable[[Sequence[Any], Any], Sequence[Tensor | None]]
    """(tensors, results) -> the tensors to save for `find`."""
    by: Op[..., Any] | None = None
    """The op that computes the gradients, None if `find` needs none."""
    constants: int = 0
    """How many of the last results have no gradient: `keep` saves them, callers do not use them."""
    told: int = 0
    """How many of these, the first ones, callers get as results nevertheless."""


class _Form:
    """The signature of an op's function, and its conversion to and from the flat schema."""

    def __init__(self, run: Call) -> None:
        given = inspect.signature(run, eval_str=True)
        takes = [p for p in given.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.options: Any = None
        self.one = self.many = False
        named: dict[str, Any] = {}
        for p in takes:
            if p.annotation == Plan or p.annotation == Sequence[Plan]:
                self.one, self.many = p.annotation == Plan, p.annotation != Plan
                named |= {"plan_tensors": Sequence[Tensor], "plan_ints": Sequence[int]}
            elif hasattr(p.annotation, "_fields"):
                self.options = p.annotation
                named |= get_type_hints(p.annotation)
            else:
                named[p.name] = p.annotation
        self.plans = self.one or self.many
        self.tensors = len(takes) - self.plans - (self.options is not None)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.signature = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=what) for name, what in named.items()],
            return_annotation=given.return_annotation,
        )

    def flat(self, given: Sequence[Any]) -> tuple[Any, ...]:
        """Convert arguments of the function to those of the custom op."""
        rest = given[self.tensors :]
        options = rest[-1] if self.options is not None else ()
        if not self.plans:
            return (*given[: self.tensors], *options)
        plans = rest[0]
        if not isinstance(plans, Flat):
            every = (plans,) if self.one else plans
            tensors, ints = flatten_all(every)
            if torch.is_grad_enabled() and any(one.of_inference for one in every):
                tensors = [_own.traced(x) for x in tensors]
            plans = Flat(tensors, ints)
        return (*given[: self.tensors], *plans, *options)

    def whole(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Convert arguments of the op to the function's: tensors, then (`Flat` plans, options)."""
        at = self.tensors
        rest: tuple[Any, ...] = ()
        if self.plans:
            rest, at = (Flat(flat[at], flat[at + 1]),), at + 2
        if self.options is not None:
            rest = (*rest, self.options(*flat[at:]))
        return tuple(flat[: self.tensors]), rest

    def plan(self, flat: Flat) -> Any:
        """Rebuild the plan or plans."""
        return unflatten(*flat) if self.one else unflatten_all(*flat)


class Op(Generic[P, R]):
    """An op with the call signature of its function.

    `direct` runs the function without the dispatcher; `traced` calls the PyTorch custom op. `__call__` picks
    the cheapest form that is valid.
    """

    def __init__(
        self, name: str, run: Callable[P, R], fake: Call, gradient: Gradient | None, inference: Call | None
    ) -> None:
        form = _Form(run)
        self._tensors = form.tensors
        self.direct = _precise(run)
        self._inference = self.direct if inference is None else _precise(inference)
        self.traced = _traced(name, form, self.direct, fake, gradient)
        self._learning = self.traced if gradient is None else _of_whole(form, self.direct, gradient)

    def __call__(self, *given: P.args, **named: P.kwargs) -> R:
        assert not named, "an op takes its arguments in their order"
        tensors: Any = given[: self._tensors]
        run = self.traced
        if untraced(*tensors):
            run = self._learning if learning(*tensors) else self._inference
        found: R = run(*given)
        return found


def register(
    name: str,
    run: Callable[P, R],
    fake: Call,
    *,
    gradient: Gradient | None = None,
    inference: Call | None = None,
) -> Op[P, R]:
    """Register a PyTorch custom op that computes `run`.

    Parameters
    ----------
    name : str
        Name in the namespace `sparseflash`.
    run : callable
        Takes tensors (some may be None), then a `Plan` or `Sequence[Plan]` if it reads any, then a NamedTuple
        of options if it has any; the schema follows its annotations. Keyword-only parameters have defaults.
    fake : callable
        Fake kernel: returns empty results for the same arguments (`def _(q, k, *rest)`); plans come as
        `Flat`.
    gradient : Gradient, optional
        None registers an op whose own gradient raises.
    inference : callable, optional
        Function that replaces `run` in eager code without gradients.
    """
    return Op(name, run, fake, gradient, inference)


def _precise(run: Call) -> Call:
    """Wrap a function to disable autocast: argument dtypes are already chosen, and backends manage theirs."""

    def direct(*given: Any) -> Any:
        kind = given[0].device.type
        if not casts(kind):
            return run(*given)
        with torch.autocast(kind, enabled=False):
            return run(*given)

    return direct


def _traced(name: str, form: _Form, direct: Call, fake: Call, gradient: Gradient | None) -> Call:
    """Create the PyTorch custom op; return it with the call signature of the function."""

    def body(*flat: Any) -> Any:
        tensors, rest = form.whole(flat)
        return direct(*tensors, *((form.plan(rest[0]), *rest[1:]) if form.plans else rest))

    def shapes(*flat: Any) -> Any:
        tensors, rest = form.whole(flat)
        return fake(*tensors, *rest)

    vars(body)["__signature__"] = form.signature
    op = torch.library.custom_op(f"sparseflash::{name}", body, mutates_args=())
    op.register_fake(shapes)
    op.register_vmap(functools.partial(_each, op))
    call = _differentiable(op, *(_refusing() if gradient is None else _of_flat(form, gradient)))

    def traced(*given: Any) -> Any:
        return call(*form.flat(given))

    return traced


def _refusing() -> tuple[Call, Call]:
    """A backward that raises, and its setup_context: for ops that compute gradients, or decode."""

    def refuse(ctx: Any, *slopes: Any) -> Any:
        raise DerivativeError(f"a second derivative was asked for, or one of decoding: {_REVERSE}")

    return refuse, lambda ctx, inputs, output: None


def _dtypes(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    return [None if x is None else x.dtype for x in tensors]


def _in_dtypes(found: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    return [x if x is None or x.dtype == kind else x.to(kind) for x, kind in zip(found, dtypes)]


def _of_flat(form: _Form, gradient: Gradient) -> tuple[Call, Call]:
    """Backward and setup_context of the custom op, on flat arguments."""
    run = None if gradient.by is None else gradient.by.traced

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, rest = form.whole(inputs)
        plans = rest[0] if form.plans else Flat((), ())
        kept = gradient.keep(tensors, output)
        ctx.kept, ctx.ints, ctx.options, ctx.dtypes = (
            len(kept),
            plans.ints,
            rest[form.plans :],
            _dtypes(tensors),
        )
        if gradient.constants:
            ctx.mark_non_differentiable(*output[-gradient.constants :])
        ctx.save_for_backward(*kept, *plans.tensors)

    def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
        kept, tensors = ctx.saved_tensors[: ctx.kept], ctx.saved_tensors[ctx.kept :]
        slopes = slopes[: len(slopes) - gradient.constants]
        plans = (Flat(tensors, ctx.ints),) if form.plans else ()
        found = gradient.find(run, kept, slopes, *plans, *ctx.options)
        none = ([None] * len(tensors), None) if form.plans else ()
        return (*_in_dtypes(found, ctx.dtypes), *none, *(None for options in ctx.options for _ in options))

    return backward, setup_context


def _of_whole(form: _Form, direct: Call, gradient: Gradient) -> Call:
    """The op for eager training: an autograd Function that takes plans as objects and skips the dispatcher.

    Constant results that callers do not get (`Gradient.constants` beyond `told`) are returned as None.
    """
    find, keep, by, constants, told = gradient
    count, none = form.tensors, (None,) * (constants - told)

    class Untraced(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            tensors, ctx.rest = given[:count], given[count:]
            results = direct(*given)
            ctx.dtypes = _dtypes(tensors)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*keep(tensors, results))
            if told:
                ctx.mark_non_differentiable(*results[-constants:][:told])
            return results[: len(results) - len(none)]

        @staticmethod
        def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
            way = None
            if by is not None:  # with create_graph the traced op records a graph whose backward raises
                way = by.traced if torch.is_grad_enabled() else by.direct
            found = find(way, ctx.saved_tensors, slopes[: len(slopes) - told], *ctx.rest)
            return (*_in_dtypes(found, ctx.dtypes), *(None for _ in ctx.rest))

    apply: Call = Untraced.apply
    return (lambda *given: (*apply(*given), *none)) if none else apply


def _differentiable(op: Any, backward: Call, setup_context: Call) -> Call:
    """Register the backward of an op; return a callable that also works under `torch.func` transforms.

    Nested `grad`, `vjp`, `jacrev` and `vmap` need an autograd Function with a separate `setup_context`. Its
    jvp raises, because a custom op would silently drop tangents.
    """
    op.register_autograd(backward, setup_context=setup_context)
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
        def backward(ctx: Any, *slopes: Any) -> tuple[Any, ...]:
            return tuple(None if isinstance(x, list) else x for x in backward(ctx, *slopes))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise DerivativeError(_TANGENT)

    def call(*given: Any) -> Any:
        if torch.compiler.is_compiling():  # it cannot trace such a Function, but does enter AD levels
            if forward_ad._current_level >= 0:
                raise DerivativeError(_TANGENT)
            return op(*given)
        if not transformed():
            return op(*given)
        return Transformed.apply(*given)  # type: ignore[no-untyped-call]  # torch declares no types for it

    return call


def _each(op: Any, info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
    """The vmap rule: one call per index of the mapped axis, which any tensors may have (plans, sinks too)."""
    flat, spec = _pytree.tree_flatten(given)
    dims = _pytree.tree_leaves(in_dims)

    def at(place: int) -> Any:
        own = [x if d is None else x.select(d, place) for x, d in zip(flat, dims, strict=True)]
        return op(*_pytree.tree_unflatten(own, spec))

    parts = [at(place) for place in range(info.batch_size)]
    if isinstance(parts[0], Tensor):
        return torch.stack(parts), 0
    return tuple(torch.stack(x) for x in zip(*parts, strict=True)), (0,) * len(parts[0])


def _copied(x: Tensor) -> Tensor:
    return x.clone()


def _copy(grad: Tensor, of: Tensor | None) -> Tensor:
    return grad.clone()


_own = register("own", _copied, torch.empty_like)
"""A copy that compilers do not remove: autograd saves it in place of a tensor of `torch.inference_mode()`."""
_once = register("once", _copy, lambda grad, of: torch.empty_like(grad))


def once(grad: Tensor, of: Tensor | None = None) -> Tensor:
    """Make a gradient from plain PyTorch raise on a second derivative, as the ops' gradients do.

    `of` is a differentiable output of the op; pass it if `grad` is computed from constants alone, so that the
    autograd graph reaches this node.
    """
    return _once(grad, of) if torch.is_grad_enabled() else grad
