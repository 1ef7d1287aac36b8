"""What a method is: hyper-parameters that select the keys each query sees. And the registry of methods."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

from torch import Tensor

from .errors import PlanError, SparseFlashError, require
from .inputs import Plans
from .ops import attention
from .plan.build import is_count

Context = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a method selects for one call.

    Parameters
    ----------
    plan : Plan or tuple of Plan
        What each query sees; a tuple is one softmax over its plans.
    key_bias : Tensor, optional
        `[B|1, H, Tk]`, added to the logits; carries gradient.
    gate : Tensor, optional
        `[B|1, Hq|1, Tq]`, multiplies the output of each query; carries gradient.
    state : object, optional
        Whatever the method wants back in `ctx["state"]` at its next call.
    """

    plan: Plans
    key_bias: Tensor | None = None
    gate: Tensor | None = None
    state: Any = None


class Method:
    """Base of all methods: subclass as a frozen dataclass whose fields are the hyper-parameters.

    `select` says what is seen; calling the method selects and attends. The `repr` is the record of an
    experiment: evaluated with the class in scope, it gives an equal method. Classes below
    `sparseflash.methods` are registered under the name of their module (`hash_sparse.py`: "hash-sparse").

    Facts, as class attributes:

    - `paper`: where the method comes from.
    - `phases`: what it is for, of "training", "prefill", "decode", "diffusion".
    - `causal_selection`: what a token sees does not depend on later tokens.
    - `decodes`: appending tokens one by one gives what one call over all of them gives.
    - `trainable`: the selection learns (through `gate` or `key_bias`).
    - `approximate`: pairs that the method's own rule asks for may be missed.

    Examples
    --------
    >>> import dataclasses, torch, sparseflash as sf
    >>> from sparseflash.method import Method, Selection
    >>> @dataclasses.dataclass(frozen=True)
    ... class EveryOther(Method):
    ...     first: int = 0
    ...     def select(self, q, k, ctx=None):
    ...         keep = torch.arange(k.shape[2])[None, None] % 2 == self.first
    ...         return Selection(sf.Plan.from_keep(torch.ones_like(keep), keep))
    >>> q, k, v = torch.randn(3, 1, 2, 64, 32)
    >>> EveryOther(first=1)(q, k, v).shape
    torch.Size([1, 2, 64, 32])
    """

    paper: ClassVar[str] = ""
    phases: ClassVar[tuple[str, ...]] = ()
    causal_selection: ClassVar[bool] = True
    decodes: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    approximate: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        package = __name__.rpartition(".")[0]
        if cls.__module__.startswith(f"{package}.methods."):
            _REGISTRY[slug(cls)] = cls

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select what each query of `q [B,Hq,Tq,D]` sees of `k [B,Hkv,Tk,D]`; `ctx` may hold more."""
        raise NotImplementedError(f"{type(self).__name__}.select")

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = ...,
        return_lse: Literal[False] = ...,
        backend: str | None = ...,
        ctx: Context | None = ...,
        selection: Selection | None = ...,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = ...,
        return_lse: Literal[True],
        backend: str | None = ...,
        ctx: Context | None = ...,
        selection: Selection | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = ...,
        return_lse: bool,
        backend: str | None = ...,
        ctx: Context | None = ...,
        selection: Selection | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        ctx: Context | None = None,
        selection: Selection | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Select, then attend exactly over what was selected.

        Parameters
        ----------
        q, k, v : Tensor
            `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`.
        scale, return_lse, backend
            As in `sparseflash.attention`.
        ctx : mapping, optional
            What the method may use beside q and k; each method's docstring lists its keys.
        selection : Selection, optional
            An earlier result of `select`, used again instead of selecting (layers, recomputation,
            compiled code).

        Returns
        -------
        Tensor or (Tensor, Tensor)
            out `[B,Hq,Tq,Dv]`, and lse `[B,Hq,Tq]` if asked for.
        """
        if selection is None:
            check_qk(q, k)
            selection = self.select(q, k, {"v": v, **(ctx or {})})
        out, lse = attention(
            q,
            k,
            v,
            selection.plan,
            scale=scale,
            key_bias=selection.key_bias,
            return_lse=True,
            backend=backend,
        )
        out, lse = self.finish(out, lse, v)
        if selection.gate is not None:
            out = out * selection.gate[..., None].to(out.dtype)
        return (out, lse) if return_lse else out

    def finish(self, out: Tensor, lse: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Last touch on the result; the identity unless a method says otherwise."""
        return out, lse


def check_qk(q: Tensor, k: Tensor) -> None:
    """What selecting relies on; `attention` checks the rest."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            given = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise SparseFlashError(f"{name}: {given}; expected a 4-d tensor [B,H,T,D]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise SparseFlashError(f"q has {q.shape[1]} heads, k {k.shape[1]}: expected a multiple (GQA)")


def check_tokens(name: str, x: object, T: int, q: Tensor) -> None:
    """Check the shape of a tensor with a number per token of q or k: [B|1, H|1, T], H any divisor of Hq."""
    B, H = q.shape[:2]
    given = f"{name}: {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
    want = f"expected [{B}|1, H|1, {T}] with H a divisor of the {H} query heads"
    fits = (
        isinstance(x, Tensor)
        and x.dim() == 3
        and x.shape[0] in (1, B)
        and x.shape[2] == T
        and x.shape[1] > 0
        and H % x.shape[1] == 0
    )
    require((fits, f"{given}; {want}"), error=PlanError)


def check_counts(method: Method, least: int, *names: str) -> None:
    """Check hyper-parameters that count something: ints of at least that much."""
    for name in names:
        x = getattr(method, name)
        require((is_count(x, least), f"{name}={x!r}: expected an int >= {least}"))


def check_square(method: Method, q: Tensor, k: Tensor) -> int:
    """The number of tokens, for methods whose queries are the keys' own."""
    Tq, Tk = q.shape[2], k.shape[2]
    require((Tq == Tk, f"{type(method).__name__}: {Tq} queries and {Tk} keys; expected as many"))
    return Tq


# ---------------------------------------------------------------- registry

_REGISTRY: dict[str, type[Method]] = {}


def slug(cls: type[Method]) -> str:
    """Name of a method's class in the registry and on the command line: its module's name in kebab-case."""
    return cls.__module__.rpartition(".")[2].replace("_", "-")


def names() -> list[str]:
    """Slugs of all methods.

    Examples
    --------
    >>> import sparseflash as sf
    >>> "hash-sparse" in sf.methods.names()
    True
    """
    return sorted(_REGISTRY)


def find(name: str) -> type[Method]:
    """Class of a slug.

    Raises
    ------
    SparseFlashError
        For a name that is none, with the closest and with all that exist.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    wanted = re.sub(r"[\s_]+", "-", str(name).strip()).lower()
    close = difflib.get_close_matches(wanted, names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise SparseFlashError(f"there is no method {name!r}: {hint}methods: {', '.join(names())}")


def get(name: str, /, **hyperparameters: Any) -> Method:
    """Make a method from its slug.

    Parameters
    ----------
    name : str
        One of `names()`.
    **hyperparameters
        Fields of the method's class; those not given keep their defaults.

    Raises
    ------
    SparseFlashError
        For an unknown name or hyper-parameter (the message lists those that exist), or a value the method
        refuses.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sf.methods.get("window", window=256)
    Window(window=256, causal=True, ahead=None)
    """
    cls = find(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for given in hyperparameters:
        if given not in fields:
            close = difflib.get_close_matches(given, list(fields), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = ", ".join(f"{n}={f.default!r}" for n, f in fields.items())
            raise SparseFlashError(f"{name} has no hyper-parameter {given!r}: {hint}it has: {known}")
    return cls(**hyperparameters)


__all__ = [
    "Context",
    "Method",
    "Selection",
    "check_counts",
    "check_qk",
    "check_square",
    "check_tokens",
    "find",
    "get",
    "names",
    "slug",
]
