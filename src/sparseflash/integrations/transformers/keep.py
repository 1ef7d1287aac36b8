"""Bool masks as tensors, for models that compute with their mask: reinterpreted if clear, else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...common.errors import SparseFlashError

# Functions that keep a mask a mask: they move its entries, or combine it with other bool tensors.
_SHAPES = frozenset(
    "__getitem__ as_strided broadcast_to chunk clone contiguous cpu cuda detach expand expand_as flatten "
    "flip gather index_select mT T mH H narrow permute repeat repeat_interleave reshape reshape_as roll "
    "select split squeeze squeeze_ swapaxes swapdims tensor_split tile transpose t unbind unflatten unfold "
    "unsqueeze unsqueeze_ view view_as movedim moveaxis data pin_memory requires_grad_ triu tril "
    "__and__ __or__ __rand__ __ror__ __iand__ __ior__ bitwise_and bitwise_or logical_and logical_or "
    "__deepcopy__".split()
)
# Functions that read only metadata, besides properties and is_... functions.
_LOOKS = frozenset(
    "dim size numel nelement stride storage_offset element_size get_device data_ptr untyped_storage __len__ "
    "__repr__ __format__ __hash__ __reduce_ex__".split()
)
# Casts, ignored for masks: a model's dtype does not tell what its mask means. Except a cast to bool.
_CASTS = frozenset("to float half bfloat16 double type type_as".split())
_INVERSIONS = frozenset("__invert__ bitwise_not logical_not".split())
_COMPARISONS = frozenset("__eq__ __ne__ eq ne equal".split())
_SUMS = frozenset("add add_ __add__ __radd__ __iadd__".split())
_JOINS = frozenset("cat concat concatenate stack".split())
# Functions that select by a bool mask, and the index of that argument.
_CHOICES = {
    "masked_fill": 1,
    "masked_fill_": 1,
    "where": 0,
    "masked_scatter": 1,
    "scaled_dot_product_attention": 3,
}


LOW = -1e4
"""Values below this, added to a score, hide the key."""


class KeepMask(Tensor):
    """A bool mask, True attends, that a model may use as a mask but not as numbers.

    Models expect additive masks: 0 for a visible token and a very low number for a hidden one. So when this
    mask is added to floating point numbers (or concatenated with such a mask), it converts to an additive
    mask. It may be reshaped, indexed and moved, select values (`where`, `masked_fill`), and be inverted or
    combined with other bool tensors. Any other use of its values could mean either kind, and raises:
    `mask.bool()`, products, comparisons.
    """

    owner: str = ""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, given: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _use(function, given, options or {})


def _use(function: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run a torch function that has masks among its arguments, by what they mean in it (`_meaning`)."""
    name, owner = getattr(function, "__name__", str(function)), ""
    looks = name in _LOOKS or (name.lstrip("_").startswith("is_") and name != "is_nonzero")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
        looks = name not in _SHAPES
    for x in _flat((given, options)):
        owner = owner or (x.owner if isinstance(x, KeepMask) else "")
    kind = _meaning(name, given, options)
    if looks or kind == "plain":
        return function(*_plain(given), **_plain(options))
    if kind == "mask":
        return _again(function(*_plain(given), **_plain(options)), owner)
    if kind == "cast":
        other = given[1] if len(given) > 1 else options.get("device", options.get("other"))
        device = other.device if isinstance(other, Tensor) else other
        same = device is None or isinstance(device, torch.dtype) or name != "to"
        return _again(_plain(given[0]) if same else _plain(given[0]).to(device), owner)
    if isinstance(kind, torch.dtype):
        return function(*_numbers(given, kind), **options)
    raise SparseFlashError(
        f"{owner or 'this model'} computes with its attention mask ({name}): that of "
        "attn_implementation='sparse' is bool, True = seen, and the model may mean numbers to add to "
        "scores. Use set_attn_implementation('eager') for it"
    )


def _meaning(name: str, given: tuple[Any, ...], options: dict[str, Any]) -> str | torch.dtype | None:
    """How a call means its masks: "plain" bool, a "mask" still, a "cast", additive dtype; None: unclear."""
    first: Any = given[0] if given else next(iter(options.values()), None)
    if name in _INVERSIONS:  # additive masks are never inverted, so it means bool
        return "plain"
    if name in _COMPARISONS:
        return "plain" if all(_is_bool(x) for x in given) else None
    if name == "__setitem__":
        return "plain" if not isinstance(first, KeepMask) or _is_bool(given[2]) else None
    if name == "__getitem__" and not isinstance(first, KeepMask):
        return "plain"
    if name in _CASTS:
        return None if torch.bool in (*given[1:], *options.values()) else "cast"
    if name in _SUMS:
        others = [x for x in given if not isinstance(x, KeepMask)]
        fits = len(given) == 2 and not options and len(others) == 1 and isinstance(others[0], Tensor)
        return others[0].dtype if fits and others[0].is_floating_point() else None
    if name in _JOINS:
        kinds = {x.dtype for x in first if not isinstance(x, KeepMask)} - {torch.bool}
        if not kinds:
            return "mask"
        kind = kinds.pop()
        return kind if not kinds and kind.is_floating_point else None
    if name in _CHOICES:
        values = [x for i, x in enumerate(given) if i != _CHOICES[name]]
        values += [x for n, x in options.items() if n not in ("mask", "condition", "attn_mask")]
        if all(_is_bool(x) for x in values):
            return "mask"
        put = values[:1] if name == "where" else values[1:] if "fill" in name else []
        if any(float(x) <= LOW for x in put if not isinstance(x, Tensor) or x.numel() == 1):
            return None  # the low number is put at visible tokens: the model inverts the mask
        return None if any(isinstance(x, KeepMask) for x in values) else "plain"
    if name in _SHAPES:
        numbers = [x for x in _flat((given, options)) if isinstance(x, Tensor) and x.is_floating_point()]
        return None if numbers else "mask"
    return None


def keep_mask(x: Tensor, owner: str = "") -> KeepMask:
    """Wrap a bool tensor as the mask of a model of type `owner`."""
    made = x.as_subclass(KeepMask)
    made.owner = owner
    return made


def plain_mask(x: Tensor) -> Tensor:
    """Unwrap a `KeepMask` to a plain tensor."""
    if not isinstance(x, KeepMask):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _is_bool(x: Any) -> bool:
    return x.dtype == torch.bool if isinstance(x, Tensor) else isinstance(x, bool)


def _numbers(x: Any, dtype: torch.dtype) -> Any:
    """Convert masks to additive ones: 0 where they attend, the dtype's lowest number elsewhere."""
    if isinstance(x, (list, tuple)):
        return type(x)([_numbers(one, dtype) for one in x])
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
