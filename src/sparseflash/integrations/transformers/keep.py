"""The mask as a tensor for models that compute with theirs: used as what it means, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import SparseFlashError

# What leaves a mask a mask: its numbers in another place.
_SHAPES = frozenset(
    "__getitem__ as_strided broadcast_to chunk clone contiguous cpu cuda detach expand expand_as flatten "
    "flip gather index_select mT T mH H narrow permute repeat repeat_interleave reshape reshape_as roll "
    "select split squeeze squeeze_ swapaxes swapdims tensor_split tile transpose t unbind unflatten unfold "
    "unsqueeze unsqueeze_ view view_as movedim moveaxis data pin_memory requires_grad_ triu tril "
    "__and__ __or__ __rand__ __ror__ __iand__ __ior__ bitwise_and bitwise_or logical_and logical_or "
    "__deepcopy__".split()
)
# What keeps it a mask, and names a dtype, which changes nothing: a model's dtype is no word about a mask.
_CASTS = frozenset("to float half bfloat16 double type type_as".split())
# What only somebody who knows that True attends can mean: a float mask knows no "not".
_INVERTED = frozenset("__invert__ bitwise_not".split())
# What looks at everything but the numbers.
_LOOKS = frozenset(
    "shape ndim dtype device layout requires_grad is_leaf grad grad_fn is_sparse is_quantized is_nested "
    "is_meta is_cpu is_cuda is_mps is_xpu names _version dim size numel nelement stride storage_offset "
    "is_floating_point is_complex is_contiguous element_size get_device data_ptr untyped_storage __len__ "
    "__repr__ __format__ __hash__ __reduce_ex__ is_inference _is_view _base output_nr".split()
)
# What takes a bool mask as a choice between two values. The mask is none of the values.
_CHOICES = {
    "masked_fill": 1,
    "masked_fill_": 1,
    "where": 0,
    "masked_scatter": 1,
    "scaled_dot_product_attention": 3,
}
_SUMS = frozenset("add add_ __add__ __radd__ __iadd__".split())
_JOINS = frozenset("cat concat concatenate stack".split())


class KeepMask(Tensor):
    """A bool mask, True attends, that a model may use as what it is, and not as numbers.

    Models were written for masks of another kind: 0 where a token is seen and a very low number where it is
    not, to be added to scores. So this one, added to floating point numbers (or joined to such a mask), is
    that one. It may be reshaped, indexed and moved, decide between values (`where`, `masked_fill`), and be
    inverted or combined with other bool tensors. Whatever else reads its numbers could mean either kind, and
    raises: `mask.bool()`, products, comparisons.
    """

    owner: str

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, given: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        if name == "__get__":
            name = function.__self__.__name__  # type: ignore[attr-defined]
        options = options or {}
        masks = [x for x in _flat((given, options)) if isinstance(x, KeepMask)]
        owner = getattr(masks[0], "owner", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _LOOKS:
                return function(*given, **options)
            if name in _INVERTED:
                return function(*_plain(given), **options)
            if name == "__getitem__" and not isinstance(given[0], KeepMask):
                return function(*_plain(given), **options)
            if name == "__setitem__":
                value = given[2]
                if not isinstance(given[0], KeepMask) or _is_bool(value):
                    return function(*_plain(given), **options)
            elif name in ("__eq__", "__ne__", "eq", "ne", "equal"):
                if all(_is_bool(x) for x in given):
                    return function(*_plain(given), **options)
            elif name in _CASTS:
                device, dtype = (
                    torch._C._nn._parse_to(*given[1:], **options)[:2] if name == "to" else (None, None)
                )
                if dtype != torch.bool and torch.bool not in given:
                    return keep_mask(_plain(given[0]).to(device or given[0].device), owner)
            elif name in _SUMS:
                if len(given) == 2 and not options and all(isinstance(x, Tensor) for x in given):
                    other = next((x for x in given if not isinstance(x, KeepMask)), None)
                    if len(masks) == 1 and other is not None and other.is_floating_point():
                        return function(*(_added(x, other.dtype) for x in given))
            elif name in _JOINS:
                kinds = {x.dtype for x in given[0]}
                if kinds == {torch.bool}:
                    return keep_mask(function(_plain(given[0]), *given[1:], **options), owner)
                floats = [x for x in kinds if x.is_floating_point]
                if len(floats) == 1 and len(kinds) == 2:
                    return function([_added(x, floats[0]) for x in given[0]], *given[1:], **options)
            elif name in _CHOICES:
                place = _CHOICES[name]
                values = [x for i, x in enumerate(given) if i != place]
                values += [x for n, x in options.items() if n not in ("mask", "condition", "attn_mask")]
                hides = values[:1] if name == "where" else values[1:] if "fill" in name else []
                hides = [
                    x for x in hides if isinstance(x, Tensor) and x.numel() == 1 or not isinstance(x, Tensor)
                ]
                if any(float(x) <= -1e4 for x in hides):
                    pass  # what is seen would be hidden: the model takes the mask the other way round
                elif not any(isinstance(x, KeepMask) for x in values):
                    return function(*_plain(given), **_plain(options))
                if all(_is_bool(x) for x in values):
                    return keep_mask(function(*_plain(given), **_plain(options)), owner)
            elif name in _SHAPES and all(
                x.dtype == torch.bool or not x.is_floating_point()
                for x in _flat(given)
                if isinstance(x, Tensor)
            ):
                made = function(*_plain(given), **_plain(options))
                return _again(made, owner)
        raise SparseFlashError(
            f"{owner or 'this model'} computes with its attention mask ({name}): that of "
            "attn_implementation='sparse' is bool, True = seen, and the model may mean numbers to add to "
            "scores. Use set_attn_implementation('eager') for it"
        )


def keep_mask(x: Tensor, owner: str = "") -> KeepMask:
    """A bool tensor as a mask of a model of that type."""
    made = x.as_subclass(KeepMask)
    made.owner = owner
    return made


def plain_mask(x: Tensor) -> Tensor:
    """The tensor without our word on its use."""
    if not isinstance(x, KeepMask):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _is_bool(x: Any) -> bool:
    return x.dtype == torch.bool if isinstance(x, Tensor) else isinstance(x, bool)


def _added(x: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask attends, the lowest number elsewhere; other tensors as they are."""
    if not isinstance(x, KeepMask):
        return x
    seen = torch.zeros((), dtype=dtype, device=x.device)
    return torch.where(plain_mask(x), seen, torch.finfo(dtype).min)


def _flat(x: Any) -> list[Any]:
    if isinstance(x, (list, tuple)):
        return [y for one in x for y in _flat(one)]
    return [y for one in x.values() for y in _flat(one)] if isinstance(x, dict) else [x]


def _plain(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)([_plain(one) for one in x])
    if isinstance(x, dict):
        return {name: _plain(one) for name, one in x.items()}
    return plain_mask(x) if isinstance(x, Tensor) else x


def _again(x: Any, owner: str) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)([_again(one, owner) for one in x])
    return keep_mask(x, owner) if isinstance(x, Tensor) and x.dtype == torch.bool else x
