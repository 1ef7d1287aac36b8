"""`sparse(model, ...)`: methods for chosen layers and phases of a model, inside a `with` block."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...cache import Growing
from ...cache.base import Attended
from ...common.errors import SparseFlashError
from ...methods.base import UNREAD, Method, Selection, find, names
from ...methods.reading import kept_of
from ...methods.session import Session
from ...plan.options import same_offset
from .._host import exact, over
from .._sessions import Rotations, Sessions
from . import tables
from .attention import SETTING
from .caches import Kept, keeping, layer_of
from .layers import Layer, bare, chosen
from .mask import Plain, SparseMask
from .packed import behind, gather, scatter
from .samples import read_once
from .tokens import Ear, heard

Heads = Sequence[Method | None]
Choice = Method | Heads | Mapping[int, Any] | None

OVERHEARD = "_sparseflash_told"
"""Attribute of an attention module that holds its call's cache, rotation and tokens."""

PHASES = {"prefill": ("prefill", "training", "diffusion"), "decode": ("decode",)}
"""The method phases that can serve each phase of a model."""


class Reading(Protocol):
    """Which tokens of a prompt a model reads: `SpecPrefill`."""

    def reading(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which the model reads these alone."""


@contextmanager
def sparse(
    model: nn.Module,
    prefill: Choice = None,
    decode: Choice = None,
    layers: Iterable[int | str] | int | str | None = None,
    cache: Kept | Mapping[int, Kept] | None = None,
    tokens: Reading | None = None,
) -> Iterator[nn.Module]:
    """Let methods choose the keys of chosen layers of a Transformers model, inside a `with` block.

    Inside the block the model runs on `attn_implementation="sparse"`, exact in layers without a method;
    afterwards all is as before. Blocks nest: the inner one overrides its layers. With activation
    checkpointing, run the backward inside the block too, since it recomputes layers.

    Parameters
    ----------
    model : PreTrainedModel
        Any model whose layers use Transformers' attention registry, or what wraps one (`DataParallel`).
    prefill : Method, sequence or mapping, optional
        For calls of several queries: prompts, chunks of prompts, training. A method; a sequence with a method
        (or None: dense) per query head; or a mapping from layer index to either, with other layers dense.
    decode : likewise, optional
        As `prefill`, for calls of one query over a cache. None: dense.
    layers : int, str or iterable, optional
        Layers by index or by name (`*` matches anything). None: all layers without a sliding window or
        chunks.
    cache : Policy, Compression, Offload, Share or mapping, optional
        What caches that begin inside the block keep, or how: one of these of `sf.cache` for all layers
        without a window of their own, or a mapping from layer index to one. None: everything.
    tokens : SpecPrefill, optional
        Which tokens of a prompt are read at all. None: all of them.

    Yields
    ------
    PreTrainedModel
        The model.

    Raises
    ------
    SparseFlashError
        For a model without the registry, a layer that does not exist, a method of another phase; and at run
        time for a method that is not defined for the model's attention.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> window = sf.methods.SinkWindow(window=16)
    >>> with sf.transformers.sparse(model, prefill=sf.methods.HashSparse(nb=4), decode=window):
    ...     logits = model(torch.arange(3, 40)[None]).logits
    >>> logits.shape
    torch.Size([1, 37, 32000])
    """
    if tokens is not None and not hasattr(tokens, "reading"):
        raise SparseFlashError(f"tokens={tokens!r}: expected sf.transformers.SpecPrefill(keep=0.3), or None")
    given, model = model, bare(model)
    named = [x for x in (prefill, decode) if isinstance(x, Mapping)]
    if layers is None and named and all(x is None or isinstance(x, Mapping) for x in (prefill, decode)):
        layers = sorted(set().union(*named))
    picked = chosen(model, layers)
    if layers is None and not (prefill is None and decode is None):
        _all_follow(model, picked)
    numbers = [layer.index for layer in picked]
    for choice in named:
        if strange := set(choice) - set(numbers):
            raise SparseFlashError(f"methods for the layers {sorted(strange)}, which are not among {numbers}")
    sessions = Sessions()  # shared: a layer may read another's choice
    settings = [_setting(layer, prefill, decode, sessions) for layer in picked]
    total = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", len(picked))
    kept, once = keeping(model, cache, total), read_once(model, cache)
    with on_sparse(model), kept, once, heard(model) as ear, attached(picked, settings, ear):
        with nullcontext() if tokens is None else tokens.reading(model):
            yield given


def _all_follow(model: Any, picked: Sequence[Layer]) -> None:
    """Refuse a method for all layers where some have classes of their own, which would stay dense unseen."""
    if own := tables.own(model):
        raise SparseFlashError(
            f"{type(model).__name__}: {own[0][0]!r} and {len(own) - 1} more are {own[0][1]}, which computes "
            "attention itself and takes no method; name the layers that are meant, such as "
            f"layers={picked[0].name!r}"
        )


@contextmanager
def attached(layers: Sequence[Layer], settings: Sequence[Any], ear: Ear | None = None) -> Iterator[None]:
    """Set attributes and hooks on the layers' modules inside the block; restore the old ones afterwards."""
    before = [getattr(layer.module, SETTING, None) for layer in layers]
    overhear = functools.partial(_overhear, ear)
    hooks = [layer.module.register_forward_pre_hook(overhear, with_kwargs=True) for layer in layers]
    try:
        for layer, setting in zip(layers, settings):
            setattr(layer.module, SETTING, setting)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, old in zip(layers, before):
            setattr(layer.module, SETTING, old)
            vars(layer.module).pop(OVERHEARD, None)


def _overhear(ear: Ear | None, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Store what a module or its model receives and does not pass to attention: cache, rotation, tokens."""
    if not torch.compiler.is_compiling():
        cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))
        told = {"cache": cache, "rope": kwargs.get("position_embeddings")}
        tokens = None if ear is None else ear.tokens
        told |= {} if tokens is None else tokens._asdict()
        vars(module)[OVERHEARD] = told if ear is None else told | ear.denoising


@contextmanager
def on_sparse(model: Any) -> Iterator[None]:
    """Switch the model to `attn_implementation="sparse"` inside the block."""
    config = model.config
    parts = {key: part for key in config.sub_configs if (part := getattr(config, key, None)) is not None}
    before = {"": config._attn_implementation} | {key: x._attn_implementation for key, x in parts.items()}
    named = {key: x for key, x in before.items() if x is not None}
    try:
        if set(before.values()) != {"sparse"}:
            model.set_attn_implementation("sparse")
        if config._attn_implementation != "sparse":
            raise SparseFlashError(
                f"{type(model).__name__} keeps attn_implementation={config._attn_implementation!r}: its "
                "class does not follow Transformers' attention registry. Use one that calls "
                "ALL_ATTENTION_FUNCTIONS"
            )
        yield
    finally:
        if set(before.values()) != {"sparse"}:
            model.set_attn_implementation(named if parts else before[""])
            for key in before.keys() - named.keys():  # a part without attention (SAM's prompt encoder)
                parts[key]._attn_implementation = None


def _setting(layer: Layer, prefill: Choice, decode: Choice, sessions: Sessions) -> Setting:
    own = [x.get(layer.index) if isinstance(x, Mapping) else x for x in (prefill, decode)]
    for (phase, able), choice in zip(PHASES.items(), own):
        several = isinstance(choice, Sequence) and not isinstance(choice, str)
        for method in choice if several else [choice]:
            if method is None:
                continue
            if not isinstance(method, Method):
                raise SparseFlashError(
                    f"{phase}={method!r}: expected a method, such as sf.methods.SinkWindow(window=512), a "
                    "sequence with one for each head, or a mapping from layer numbers to them"
                )
            if method.phases and not set(able) & set(method.phases):
                raise SparseFlashError(
                    f"{phase}={method!r}: this method is for {', '.join(method.phases)}, not for {phase}"
                )
    return Setting(layer, *own, sessions=sessions)


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """The methods of one layer, by phase; the attention function calls it."""

    layer: Layer
    prefill: Method | Heads | None = None
    decode: Method | Heads | None = None
    watch: Callable[..., None] | None = None
    sessions: Sessions = dataclasses.field(default_factory=Sessions)
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the running call: cache, rope, modality and grid, as far as known."""
    kept: Growing | None = None
    """The cache layer of the call, if it is a `Growing` one and holds exactly the call's keys."""

    def __call__(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: SparseMask,
        options: dict[str, Any],
    ) -> Tensor:
        """Attend for this layer; returns out `[B,Hq,S,Dv]`."""
        told = vars(module).pop(OVERHEARD, None)
        if told is not None:
            known = _of_all_keys(module, told, q.shape[2], k.shape[2])
            self = dataclasses.replace(self, told=known, kept=layer_of(told.get("cache"), module))
        choice = self.decode if q.shape[2] == 1 and k.shape[2] > 1 else self.prefill
        mask = mask if choice is None else mask.for_methods()
        if isinstance(choice, Sequence):
            return self._by_head(choice, q, k, v, mask, options)
        return self._attend(choice, q, k, v, mask, options, range(q.shape[1]))

    def of_cache(self, layer: Attended, q: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Attend where the cache does it itself, over what it holds: `run`."""
        return run()

    def _by_head(
        self,
        choice: Heads,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: SparseMask,
        options: dict[str, Any],
    ) -> Tensor:
        """Attend with one call for all heads that share a method."""
        H, group = q.shape[1], q.shape[1] // k.shape[1]
        if len(choice) != H:
            raise SparseFlashError(f"{self.layer.name}: {len(choice)} methods for {H} query heads")
        parts, order = [], []
        for method in dict.fromkeys(choice):
            heads = [h for h in range(H) if choice[h] == method]
            at = torch.tensor(heads, device=q.device)
            sinks = options["sink_logits"]
            own = {**options, "sink_logits": None if sinks is None else sinks[at]}
            kv = at // group
            parts.append(self._attend(method, q[:, at], k[:, kv], v[:, kv], mask, own, heads))
            order += heads
        return torch.cat(parts, 1)[:, torch.tensor(order, device=q.device).argsort()]

    def _attend(
        self,
        method: Method | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: SparseMask,
        options: dict[str, Any],
        heads: Sequence[int],
    ) -> Tensor:
        if method is None:
            if self.watch is not None:
                self.watch(None, heads, q, k, mask.plan, mask.plan)
            return exact(q, k, v, mask.plan, options)
        if mask.documents:
            return self._apart(method, q, k, v, mask, options, heads)
        if mask.padded is not None and not self._begins(method, q, mask):
            if not mask.causal and (mask.cross or q.shape[2] != k.shape[2]):
                raise SparseFlashError(
                    f"{self.layer.name}: {_named(method)} on a layer that attends to another sequence, with "
                    "padding there: which of the queries are padding is not known. Give it rows of one length"
                )
            return self._unpadded(method, q, k, v, mask, options, heads)
        session, ctx = self._session(method, q, k, v, options, mask.offset)
        selection = self._select(session, q, k, ctx)
        self._at_their_place(method, selection.plan, mask)
        plans = tuple(self._within(method, one, mask) for one in selection.plan)
        selection = dataclasses.replace(selection, plan=plans)
        if (cache := kept_of({"cache": self.kept}, k)) is not None:
            cache.expect(*plans)
        if self.watch is not None:
            self.watch(method, heads, q, k, method.shown(q, k, selection, ctx), mask.plan)
        return over(session, q, k, v, selection, options, ctx)

    def _session(
        self,
        method: Method,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        offset: int | Tensor,
    ) -> tuple[Session, dict[str, Any]]:
        """The method's session for this cache, and its `ctx` for this call."""
        session = self.sessions.of(self.told.get("cache"), method)
        scale = k.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        own = {"v": v, "q_offset": offset, "scale": scale, "softcap": options["softcap"]}
        own |= {} if self.kept is None else {"cache": self.kept}
        told = {x: self.told[x] for x in self.told if x == "slot" or x in UNREAD or x in method.reads}
        return session, session.context({**told, **own, "layer": self.layer.index})

    def _begins(self, method: Method, q: Tensor, mask: SparseMask) -> bool:
        """Whether the method accepts left padding and the cache can hold the index of the first real keys."""
        fits = method.behind_padding and self.kept is not None and q.shape[2] == 1 and mask.by_rule
        if not fits or mask.first is None:
            return False
        assert self.kept is not None
        self.kept.first = mask.first
        return True

    def _select(self, session: Session, q: Tensor, k: Tensor, ctx: dict[str, Any]) -> Selection:
        """Run the method's selection, with its plans as a tuple."""
        method = session.method
        try:
            selection = method.select(q, k, {name: x for name, x in ctx.items() if name != "slot"})
        except SparseFlashError as fault:
            raise SparseFlashError(f"{self.layer.name}, {_named(method)}: {fault}") from fault
        several = isinstance(selection.plan, (tuple, list))
        return dataclasses.replace(selection, plan=tuple(selection.plan) if several else (selection.plan,))

    def _alone(self, rows: Tensor | None, keys: Tensor | None) -> Setting:
        """The setting for some rows of the batch (None: all), restricted to some keys."""
        told = dict(self.told)
        if rows is not None:
            told["slot"] = tuple(rows.tolist())
        if keys is not None:
            batch = len(keys) if rows is None else 1 + int(rows.max())

            def moved(x: Tensor) -> Tensor:
                return gather((x if x.shape[0] > 1 else x.expand(batch, -1, -1))[:, None], rows, keys)[:, 0]

            if "rope" in told:
                told["rope"] = tuple(map(moved, told["rope"]))
            if "modality" in told:
                told["modality"] = moved(told["modality"][..., None])[..., 0]
        return dataclasses.replace(self, told=told, kept=None)

    def _unpadded(
        self,
        method: Method,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: SparseMask,
        options: dict[str, Any],
        heads: Sequence[int],
    ) -> Tensor:
        """Attend for every sequence of a padded batch as if it were alone.

        If the mask is only causality and padding, all sequences are one call with tokens moved to the front
        and padding behind: if the method is known to choose for a token regardless of later tokens, and its
        plan hides later tokens by position, padding makes no difference. For any other method, sequences are
        grouped by length and run without their padding.
        """
        assert mask.padded is not None
        traced = torch.compiler.is_compiling()
        if method.by_shape and q.shape[2] == 1 and mask.by_rule and not traced and self.watch is None:
            if (out := self._shifted(method, q, k, v, mask, options)) is not None:
                return out
        if mask.by_rule and mask.causal and _whatever_follows(method) and self.watch is None:
            queries, keys = mask.padded.moved()
            offset: int | Tensor = mask.padded.begin.int()
            if not traced and not bool(mask.padded.begin.any()):
                offset = 0
            q2 = q if queries is None else gather(q, None, queries)
            k2, v2 = (x if keys is None else gather(x, None, keys) for x in (k, v))
            alone = self._alone(None, keys)
            session, ctx = alone._session(method, q2, k2, v2, options, offset)
            selection = alone._select(session, q2, k2, ctx)
            if all(_by_place(one, offset) for one in selection.plan):
                out = over(session, q2, k2, v2, selection, options, ctx)
                return out if queries is None else gather(out, None, queries.argsort(-1))
        if traced:
            raise SparseFlashError(
                f"{self.layer.name}: {_named(method)} in a compiled model with an attention_mask: padding "
                "may change what it chooses or shows, and a trace cannot look. Give the model no "
                "attention_mask, run it without torch.compile, or leave this layer dense"
            )
        parts = []
        for group, own in mask.groups:
            one = gather(q, group.rows, group.queries), *(gather(x, group.rows, group.keys) for x in (k, v))
            alone = self._alone(group.rows, group.keys)
            parts.append((group, alone._attend(method, *one, own, options, heads)))
        if not parts:
            return v.new_zeros(*q.shape[:3], v.shape[3])
        return scatter(parts, (q.shape[0], q.shape[2]))

    def _shifted(
        self, method: Method, q: Tensor, k: Tensor, v: Tensor, mask: SparseMask, options: dict[str, Any]
    ) -> Tensor | None:
        """Attend with one query behind left padding, by a method that depends on lengths only: no key moves.

        Returns None if the plan has more than ranges, or padding is elsewhere too.
        """
        assert mask.padded is not None
        begin = mask.padded.begin
        if mask.first is None or not mask.causal:
            return None
        session, ctx = self._alone(None, None)._session(method, q, k, v, options, begin.int())
        selection = self._select(session, q, k, ctx)
        if selection.inputs is not None or not all(_by_place(one, begin.int()) for one in selection.plan):
            return None
        plans = [behind(one, begin, mask.first) for one in selection.plan]
        if any(plan is None for plan in plans):
            return None
        return over(session, q, k, v, dataclasses.replace(selection, plan=tuple(plans)), options, ctx)

    def _apart(
        self,
        method: Method,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: SparseMask,
        options: dict[str, Any],
        heads: Sequence[int],
    ) -> Tensor:
        """Attend for every document of packed rows as its own sequence."""
        if mask.apart is None or self.watch is not None:
            what = "report()" if mask.apart else "with a window, chunks or padding, or compiled"
            raise SparseFlashError(
                f"{self.layer.name}: {_named(method)} on packed documents, {what}: not supported. Give it "
                "one document a row (padded on either side), or leave this layer dense"
            )
        parts = []
        for tokens, *part in zip(mask.apart.tokens, *map(mask.apart.split, (q, k, v))):
            n, _, length, _ = part[0].shape
            own = type(mask.plan).dense(length, length, causal=True, device=q.device)
            padding = None if bool(tokens.all()) else tokens
            alone = SparseMask(own, n, Plain(), causal=True, tokens=padding)
            # documents are not a generation: no session
            parts.append(
                dataclasses.replace(self, told={}, kept=None)._attend(method, *part, alone, options, heads)
            )
        return mask.apart.join(parts)

    def _at_their_place(self, method: Method, plans: Sequence[Any], mask: SparseMask) -> None:
        """Refuse queries that no plan has where they are; one of several may take them for earlier ones."""
        placed = [x for x in plans if x.causal and x.q_pos is None]
        if placed and not any(same_offset(plan.q_offset, mask.offset) for plan in placed):
            raise SparseFlashError(
                f"{self.layer.name}: {_named(method)} does not take queries that begin behind a cache "
                "(ctx['q_offset']), or counts positions in a way of its own: give it whole prompts; where "
                "these are refused too, it is not for this layer"
            )

    def _within(self, method: Method, plan: Any, mask: SparseMask) -> Any:
        """Intersect the plan with the model's mask."""
        if plan.causal and not mask.causal:
            raise SparseFlashError(
                f"{self.layer.name} is bidirectional (or attends to another sequence), {_named(method)} is "
                "causal: choose other layers, or a method with causal=False"
            )
        if mask.by_rule and plan.causal == mask.causal:
            return plan
        return plan & mask.plan


_rotations = Rotations()


def _of_all_keys(module: nn.Module, told: Mapping[str, Any], new: int, keys: int) -> dict[str, Any]:
    """Extend what a module receives for its new tokens to all keys of its cache: modality and rotation."""
    given = {name: x for name, x in told.items() if x is not None}
    modality = given.pop("modality", None)
    if modality is not None and modality.shape[1] == new:  # an image tower's length differs
        whole = _rotations.of(given.get("cache"), "modality", (modality, modality), keys)
        given |= {} if whole is None else {"modality": whole[0][..., 0]}
    if "modality" not in given:
        given.pop("grid", None)
    patches = given.pop("patches", None)
    if patches is not None and new == keys >= math.prod(patches):
        given |= {"grid": patches, "text": (keys - math.prod(patches), 0)}
    rope = given.pop("rope", None)
    if isinstance(rope, (tuple, list)) and len(rope) == 2 and all(isinstance(x, Tensor) for x in rope):
        kind = str(getattr(module, "layer_type", getattr(module, "is_sliding", "")))
        whole = _rotations.of(given.get("cache"), kind, tuple(rope), keys)
        given |= {} if whole is None else {"rope": whole}
    return given


def _whatever_follows(method: Method) -> bool:
    """Whether a token's selection is known not to depend on later tokens, nor on their number.

    A method that decodes declares it, and tests check registered methods; others may scale budgets by length.
    """
    return method.causal_selection and (method.decodes or type(method) in map(find, names()))


def _by_place(plan: Any, offset: int | Tensor) -> bool:
    """Whether the plan hides keys behind each query by position alone, whatever its lists contain."""
    own = plan.q_pos is None and plan.k_pos is None
    return plan.causal and own and same_offset(plan.q_offset, offset)


def _named(method: Method) -> str:
    """The method's repr; its class name while compiling, where fields cannot be read."""
    return type(method).__name__ if torch.compiler.is_compiling() else repr(method)
