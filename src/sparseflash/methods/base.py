"""`Method`, the base class: hyper-parameters that select the keys each query sees; and the registry."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..common.errors import PlanError, SparseFlashError
from ..ops._arguments import AnyPlan
from ..ops._register import learning, untraced
from ..ops.attention import attention
from ..plan.options import is_count, normal_offset, same_offset
from ..selection.budgets import share
from ..selection.sharded import local
from . import heads
from .heads import beside

Context = Mapping[str, Any]
Share = Literal["", "sum", "max"]
"""How the query heads of a KV head select: each for itself (""), or by the sum or maximum of their scores."""

UNREAD: Context = {
    **dict.fromkeys(
        (
            "v",
            "scale",
            "softcap",
            "rope",
            "layer",
            "step",
            "steps",
            "branch",
            "cache",
            "state",
            "grid",
            "text",
        ),
        ...,
    ),
    "q_offset": 0,
}
"""Keys that every caller may put into `ctx`, with the value that a method not reading the key assumes.

`...` means any value: it does not affect such a method. Other keys are accepted only by methods whose `reads`
name them. No key of `ctx` is silently ignored if it would change the result.
"""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The visible pairs that a method selects for one call, with optional bias, gate and state.

    Parameters
    ----------
    plan : Plan or tuple of Plan
        Keys visible to each query; a tuple is one softmax over its plans.
    key_bias : Tensor, optional
        `[B|1, H, Tk]`, added to the logits; carries gradient.
    gate : Tensor, optional
        `[B|1, Hq|1, Tq]`, multiplies the output of each query; carries gradient.
    state : object, optional
        The method gets it back in `ctx["state"]` at its next call.
    inputs : (Tensor, Tensor, Tensor), optional
        q, k and v to attend with in place of the given ones: other rotations, centroids, summaries. The plan
        is for their rows.
    skip_below : float, optional
        As in `sparseflash.attention`: the kernel may skip blocks of the plan with low scores.
    """

    plan: AnyPlan
    key_bias: Tensor | None = None
    gate: Tensor | None = None
    state: Any = None
    inputs: tuple[Tensor, Tensor, Tensor] | None = None
    skip_below: float | None = None


class Called(NamedTuple):
    """The result of a call of a method, the method's state, and the selection it was computed over."""

    result: Tensor | tuple[Tensor, Tensor]
    state: Any
    """State for `ctx["state"]` of the next call (`Method.observe`)."""
    selection: Selection


class Options(TypedDict, total=False):
    """Keyword arguments of a call of a method."""

    scale: float | None
    softcap: float | None
    key_bias: Tensor | None
    sink_logits: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    q_offset: int | Tensor | None
    backend: str | None
    ctx: Context | None
    selection: Selection | None


class Method:
    """Base of all methods: subclass as a frozen dataclass whose fields are the hyper-parameters.

    `select` chooses the visible keys; calling the method selects and attends. The `repr` is the record of an
    experiment: evaluated with the class in scope, it gives an equal method. Classes below
    `sparseflash.methods` are registered under the name of their module (`hash_sparse.py`: "hash-sparse").

    Class attributes describe the method:

    - `reads`: the keys of `ctx` that `select` reads. Others are refused with the names that exist, except
      those that any caller may pass (`UNREAD`), at a value that leaves the result unchanged.
    - `paper`: source of the method.
    - `phases`: its uses, among "training", "prefill", "decode", "diffusion".
    - `causal_selection`: the keys that a token sees depend neither on later tokens nor on their number
      (except in plans that show it later tokens).
    - `decodes`: appending tokens one by one gives the same result as one call over all of them.
    - `trainable`: the selection is learned (through `gate` or `key_bias`).
    - `approximate`: the plan may miss pairs that the method's own rule includes.
    - `by_shape`: the selection depends only on the lengths, the heads, and the `reads`, which are numbers
      (`q_offset`, `grid`, `text`). On the host, where making it may take longer than attending, it is cached.
    - `behind_padding`: over a `cache.Growing`, selects from each sequence's first key (`cache.first`) on.
    - `across_layers`: all layers share one `ctx["state"]`: later layers know what an earlier one decided.
    - `forward_only`: its attention has no gradient (`Selection.skip_below`) and refuses one.
    - `per_head`: fields that `select` itself takes as a tuple, one value per query head.

    Any other hyper-parameter may be such a tuple too: heads with equal settings then select together, and all
    heads attend in one call.

    Examples
    --------
    >>> import dataclasses, torch, sparseflash as sf
    >>> from sparseflash.methods.base import Method, Selection
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

    reads: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    phases: ClassVar[tuple[str, ...]] = ()
    causal_selection: ClassVar[bool] = True
    decodes: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    approximate: ClassVar[bool] = False
    by_shape: ClassVar[bool] = False
    across_layers: ClassVar[bool] = False
    behind_padding: ClassVar[bool] = False
    forward_only: ClassVar[bool] = False
    per_head: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, wrap in (
            ("__post_init__", _each),
            ("select", _checked),
            ("observe", _by_head),
            ("notes", _noted),
        ):
            if name in vars(cls):
                setattr(cls, name, wrap(vars(cls)[name]))
        if cls.__module__.startswith(__name__.removesuffix("base")) and cls.paper:
            _REGISTRY[slug(cls)] = cls

    def __post_init__(self) -> None:
        """Check the hyper-parameters; if heads differ, the settings of each head are checked separately."""

    def _set(self, **facts: Any) -> None:
        """Override attributes that follow from the hyper-parameters; call it only in `__post_init__`."""
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def select(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        """Select which keys of `k [B,Hkv,Tk,D]` each query of `q [B,Hq,Tq,D]` sees; `ctx` has extras."""
        raise NotImplementedError(f"{type(self).__name__}.select")

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[Options]
    ) -> Tensor: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Options]
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Unpack[Options]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Select, then attend exactly over the selected pairs.

        Parameters
        ----------
        q, k, v : Tensor
            `[B,Hq,Tq,D]`, `[B,Hkv,Tk,D]`, `[B,Hkv,Tk,Dv]`.
        scale, softcap, key_bias, sink_logits, dropout_p, dropout_seed, return_lse, backend
            As in `sparseflash.attention`; the method's own key_bias is added.
        q_offset : int or Tensor, optional
            Position of the first query: `ctx["q_offset"]`.
        ctx : mapping, optional
            Inputs beside q and k: the keys of the method's `reads`, which its docstring explains, and
            those that any caller may pass (`v`, `scale`, `softcap`, `rope`, `layer`, `step`, `steps`,
            `branch`, `cache`, `state`, `grid`, `text`; `q_offset=0`).
        selection : Selection, optional
            An earlier result of `select`, reused instead of selecting again (layers, recomputation,
            compiled code).

        Returns
        -------
        Tensor or (Tensor, Tensor)
            out `[B,Hq,Tq,Dv]`, and lse `[B,Hq,Tq]` if asked for.

        Raises
        ------
        SparseFlashError
            If `ctx` has a key that the method does not read (the message suggests the closest one), or if
            `attention` refuses an argument.
        """
        return self.call(q, k, v, return_lse=return_lse, **options).result

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        key_bias: Tensor | None = None,
        sink_logits: Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        q_offset: int | Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        ctx: Context | None = None,
        selection: Selection | None = None,
    ) -> Called:
        """Select and attend; return the result with the state for the next call, as `Session` needs it."""
        check_qk(q, k)
        own = {"v": v, "scale": k.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
        own |= {} if q_offset is None else {"q_offset": q_offset}
        given = own | dict(ctx or {})
        if selection is None:
            selection = self.select(q, k, given)
        out, lse = self.attend(
            q,
            k,
            v,
            selection,
            scale=scale,
            softcap=softcap,
            key_bias=key_bias,
            sink_logits=sink_logits,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            backend=backend,
        )
        state = self.observe(q, k, out, lse, selection, given)
        return Called((out, lse) if return_lse else out, state, selection)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: Selection,
        op: Callable[..., Any] = attention,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention over a selection: (out, lse).

        Parameters
        ----------
        q, k, v : Tensor
            As in a call of the method.
        selection : Selection
            What `select` returned, or a part of it.
        op : callable
            `sparseflash.attention`, or `sparseflash.decode` for few queries (the former is used in any case
            if blocks may be skipped).
        **options
            Options of the op.
        """
        if selection.key_bias is not None:
            bias = options.get("key_bias")
            options["key_bias"] = selection.key_bias if bias is None else bias + selection.key_bias
        if selection.skip_below is not None:
            if learning(q, k, v):
                raise SparseFlashError(
                    f"{type(self).__name__} is for inference, and an input requires a gradient: call it "
                    "under torch.no_grad(), or take another method"
                )
            op, options["skip_below"] = attention, selection.skip_below
        q, k, v = selection.inputs or (q, k, v)
        out, lse = op(q, k, v, selection.plan, return_lse=True, **options)
        methods = heads.apart(self)
        if methods is None or type(self).finish is Method.finish:
            out, lse = self.finish(out, lse, v, selection)
        else:
            H, ends = q.shape[1], []
            for method, own in heads.groups(methods):
                parts = (heads.of_heads(x, own, H) for x in (out, lse, v))
                ends += [(own, *method.finish(*parts, selection))]
            at = torch.tensor([h for own, *_ in ends for h in own], device=q.device).argsort()
            out, lse = (torch.cat([end[n] for end in ends], 1)[:, at] for n in (1, 2))
        return out if selection.gate is None else out * selection.gate[..., None].to(out.dtype), lse

    def finish(self, out: Tensor, lse: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Post-process out and lse; the identity unless a method overrides it."""
        return out, lse

    def shown(self, q: Tensor, k: Tensor, selection: Selection, ctx: Context | None = None) -> AnyPlan:
        """Plan of the pairs that are really attended, for figures: less than `selection.plan` if skipping."""
        return selection.plan

    def notes(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> dict[str, Tensor]:
        """What a method says of its choice for each query head, [Hq] by name, for reports; {} by default."""
        return {}

    def observe(
        self, q: Tensor, k: Tensor, out: Tensor, lse: Tensor, selection: Selection, ctx: Context
    ) -> Any:
        """Return the state for `ctx["state"]` of the next call; by default that of the selection.

        It is called after a dense call too (`selection.plan` is then the dense plan), so that a method can
        learn from the attention.
        """
        return selection.state


def _checked(select: Callable[..., Selection]) -> Callable[..., Selection]:
    """Wrap `select`: check the keys of `ctx`, handle per-head settings, cache selections by shape."""

    @functools.wraps(select)
    def checked(self: Method, q: Tensor, k: Tensor, ctx: Context | None = None) -> Selection:
        check_context(self, ctx or {})
        methods = heads.apart(self)
        if methods is not None:
            return Selection(**heads.select(methods, q, k, ctx))
        if not (type(self).by_shape and q.device.type == "cpu" and untraced(*map(local, (q, k)))):
            return select(self, q, k, ctx)
        given = ((name, (ctx or {}).get(name)) for name in type(self).reads)
        told = tuple((name, x) for name, x in given if x is not None)
        if not all(_is_plain(x) for _, x in told):
            return select(self, q, k, ctx)
        return _again(select, self, q.shape, k.shape, told, torch.is_inference_mode_enabled())

    return checked


@functools.lru_cache(256)  # not a closure of `checked`, which a compiler cannot trace
def _again(select: Any, method: Method, of_q: Any, of_k: Any, told: Any, inference: bool) -> Selection:
    """Cache the selection of a `by_shape` method."""
    q, k = (torch.empty(0, device="cpu").expand(*shape[:-1], 0) for shape in (of_q, of_k))
    found: Selection = select(method, q, k, dict(told))
    return found


def _is_plain(x: object) -> bool:
    """Whether x is an int or a tuple of ints, and so a cache key for a plan."""
    return isinstance(x, int) or (isinstance(x, tuple) and all(isinstance(n, int) for n in x))


def _by_head(observe: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `observe` to run for each group of heads with equal settings, if settings differ."""

    @functools.wraps(observe)
    def asked(self: Method, q: Tensor, k: Tensor, out: Tensor, lse: Tensor, *given: Any) -> Any:
        methods = heads.apart(self)
        if methods is None:
            return observe(self, q, k, out, lse, *given)
        return heads.observe(methods, q, k, out, lse, *given)

    return asked


def _noted(notes: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Wrap `notes` to ask each group of heads with equal settings, if settings differ."""

    @functools.wraps(notes)
    def asked(self: Method, q: Tensor, k: Tensor, ctx: Context | None = None) -> dict[str, Tensor]:
        methods = heads.apart(self)
        return notes(self, q, k, ctx) if methods is None else heads.notes(methods, q, k, ctx)

    return asked


def _each(check: Callable[..., None]) -> Callable[..., None]:
    """Wrap `__post_init__` to check the settings of every head, if they differ."""

    @functools.wraps(check)
    def checked(self: Method, *given: Any) -> None:
        if heads.apart(self) is None:  # else `apart` made, and so checked, a method per head
            check(self, *given)

    return checked


def check_context(method: Method, ctx: Context) -> None:
    """Refuse keys of `ctx` that the method would ignore although they could change the result."""
    name, reads = type(method).__name__, method.reads
    for key, value in ctx.items():
        taken = UNREAD.get(key)
        if key in reads or taken is ... or (key in UNREAD and same_offset(value, taken)):
            continue
        able = [cls.__name__ for cls in _REGISTRY.values() if key in cls.reads]
        others = f"; {', '.join(able)} {'read' if len(able) > 1 else 'reads'} it" if able else ""
        if key in UNREAD:
            given = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise SparseFlashError(
                f"ctx[{key!r}]: {given}, but {name} does not read it and takes it to be {taken}{others}"
            )
        raise SparseFlashError(
            f"ctx has {key!r}, which {name} does not read{others}: {_nearest(key, [*reads, *UNREAD])}"
            f"{name}.reads: {', '.join(reads) or 'nothing'}; any method may be given: {', '.join(UNREAD)}"
        )


def check_qk(q: Tensor, k: Tensor) -> None:
    """Check the shapes that selection relies on; `attention` checks the rest."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            given = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise SparseFlashError(f"{name}: {given}; expected a 4-d tensor [B,H,T,D]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise SparseFlashError(f"q has {q.shape[1]} heads, k {k.shape[1]}: expected a multiple (GQA)")


def check_tokens(name: str, x: object, T: int, q: Tensor) -> None:
    """Check the shape of a tensor with a number per token of q or k: [B|1, H|1, T], H any divisor of Hq."""
    B, H = q.shape[:2]
    fits = (
        isinstance(x, Tensor)
        and x.dim() == 3
        and x.shape[0] in (1, B)
        and x.shape[2] == T
        and x.shape[1] > 0
        and H % x.shape[1] == 0
    )
    if not fits:
        given = f"{name}: {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        want = f"expected [{B}|1, H|1, {T}] with H a divisor of the {H} query heads"
        raise PlanError(f"{given}; {want}")


def check_counts(method: Method, least: int, *names: str) -> None:
    """Check that the named hyper-parameters are counts: ints of at least `least`."""
    for name in names:
        x = getattr(method, name)
        fits = is_count(x, least) and x < 2**62  # so that sums fit int64
        if not fits:
            raise SparseFlashError(f"{name}={x!r}: expected an int >= {least}, below 2^62")


def check_shares(method: Method, *names: str) -> None:
    """Check that the named hyper-parameters are shares: numbers in (0, 1]."""
    for name in names:
        x = getattr(method, name)
        if not (isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x <= 1):
            raise SparseFlashError(f"{name}={x!r}: expected a share in (0, 1]")


class Sharing(Protocol):
    """A method with the hyper-parameter `share`."""

    share: Any


def check_share(method: Sharing) -> None:
    """Check the hyper-parameter `share`, the reduction over the query heads of a KV head."""
    how = method.share
    if how not in ("", "sum", "max"):
        raise SparseFlashError(f"share={how!r}: expected 'sum', 'max', or '' for none")


def shared(score: Tensor, k: Tensor, how: Share) -> Tensor:
    """Reduce scores `[B,Hq,...]` of query heads to KV heads, by sum or maximum; "" leaves them unchanged."""
    return share(score, k.shape[1], how) if how else score


def begin(ctx: Context | None, q: Tensor, default: int = 0) -> Tensor:
    """Position of the first query from `ctx["q_offset"]`, int64 [B|1, 1, 1] on the device of q."""
    offset = normal_offset((ctx or {}).get("q_offset", default))
    if isinstance(offset, Tensor):
        return offset.to(q.device).long().view(-1, 1, 1)
    return torch.full((1, 1, 1), offset, device=q.device)


def check_square(method: Method, q: Tensor, k: Tensor) -> int:
    """Number of tokens of a self-attention method; raises if Tq and Tk differ."""
    Tq, Tk = q.shape[2], k.shape[2]
    if Tq != Tk:
        raise SparseFlashError(f"{type(method).__name__}: {Tq} queries and {Tk} keys; expected as many")
    return Tq


# ---------------------------------------------------------------- registry

_REGISTRY: dict[str, type[Method]] = {}


def slug(cls: type[Method]) -> str:
    """Name of a method's class in the registry and on the command line: its module's name in kebab-case."""
    return cls.__module__.rpartition(".")[2].replace("_", "-")


def _nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}? " if close else ""


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
        If no method has the name; the message suggests the closest one and lists all.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    wanted = re.sub(r"[\s_]+", "-", str(name).strip()).lower()
    hint = _nearest(wanted, names(), cutoff=0.5)
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
        If the name or a hyper-parameter is unknown (the message lists those that exist), or the method
        refuses a value.

    Examples
    --------
    >>> import sparseflash as sf
    >>> sf.methods.get("window", window=256)
    Window(window=256, causal=True, ahead=None)
    """
    cls = find(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for given in hyperparameters:
        if given not in inspect.signature(cls).parameters:
            known = ", ".join(f"{n}={f.default!r}" for n, f in fields.items())
            raise SparseFlashError(
                f"{name} has no hyper-parameter {given!r}: {_nearest(given, fields)}it has: {known}"
            )
    return cls(**hyperparameters)


__all__ = [
    "UNREAD",
    "Called",
    "Context",
    "Method",
    "Options",
    "Selection",
    "Share",
    "begin",
    "beside",
    "check_context",
    "check_counts",
    "check_qk",
    "check_share",
    "check_shares",
    "check_square",
    "check_tokens",
    "find",
    "get",
    "names",
    "shared",
    "slug",
]
