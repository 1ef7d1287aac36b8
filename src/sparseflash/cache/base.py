"""Interface of a layer's key-value cache: `append`, `plan`, `bytes`, `tokens`, and Transformers' names."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..common.errors import SparseFlashError, require
from ..plan import Plan
from ..plan.options import shape_of

CACHED = "_sparseflash_cache"
"""Attribute of the keys that an `Attended` layer returns to a host: a weak reference to that layer."""


class Layer:
    """The keys and values of one attention layer: `append`, `plan`, `bytes`, `tokens`.

    A cache is a list of layers. Transformers takes them as `Cache(layers=[...])` once `sf.transformers` is
    imported; the methods further below are the ones it calls. Positions are those of the tokens: a layer that
    has evicted tokens continues counting from the last token.
    """

    is_sliding: ClassVar[bool] = False
    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = True
    supports_early_init: ClassVar[bool] = True

    # ------------------------------------------------------------ the four verbs

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]` of n new tokens."""
        raise NotImplementedError

    def plan(self, Tq: int = 1) -> Plan | tuple[Plan, ...]:
        """Plan of the last Tq queries over `keys` and `values`, or one plan for each part of them."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Bytes of memory that the layer holds."""
        return sum(x.untyped_storage().nbytes() for x in self.tensors().values())

    @property
    def tokens(self) -> int:
        """Number of tokens appended and not cropped, whether or not they are still held."""
        raise NotImplementedError

    # ------------------------------------------------------------ what a subclass implements besides

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the layer, by name."""
        raise NotImplementedError

    def select_rows(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order; an index may repeat."""
        raise NotImplementedError

    def crop(self, n: int) -> None:
        """Drop tokens at the end: keep the first n, or, if n < 0, drop the last -n."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The contents for a file: tensors, and options that JSON can hold."""
        raise NotImplementedError

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """Rebuild a layer from the contents of a file."""
        raise NotImplementedError

    def _left(self, n: int) -> int:
        """Number of tokens that `crop(n)` leaves."""
        require(
            (
                isinstance(n, int) and not isinstance(n, bool) and -self.tokens <= n,
                lambda: (
                    f"crop({n!r}): expected a number of tokens to keep, or one below 0 to remove, of the "
                    f"{self.tokens} there are"
                ),
            )
        )
        return min(n, self.tokens) if n > 0 else self.tokens + n

    # ------------------------------------------------------------ as Transformers calls them

    @property
    def is_initialized(self) -> bool:
        """Whether anything was appended."""
        return bool(self.tensors())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first `append` sets the shapes."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return the keys and values to attend to."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Same as `tokens`."""
        return self.tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Number of keys that the next call attends to, and the position of the first of them."""
        return self.tokens + queries(query_length), 0

    def get_max_length(self) -> int:
        """Return -1: the length is unlimited."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Call `select_rows` to reorder beams."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Call `select_rows` to keep some sequences."""
        self.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Call `select_rows` to draw several samples from one prompt."""
        if self.is_initialized:
            batch = next(iter(self.tensors().values())).shape[0]
            self.select_rows(torch.arange(batch).repeat_interleave(repeats))

    def offload(self) -> None:
        """Do nothing: keys stay on the device they were made on."""

    prefetch = offload

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.tokens}, bytes={self.bytes})"


def queries(given: int | Tensor) -> int:
    """Number of queries of a call: Transformers 5.0 gives their positions, later ones the number itself."""
    return len(given) if isinstance(given, Tensor) else given


class Call(NamedTuple):
    """Arguments of `Attended.attend` besides q, k and v."""

    among: Plan | None
    real: Tensor | None
    new: Callable[..., Any] | None
    options: dict[str, Any]
    """Arguments of attention: scale, softcap, sink_logits."""

    def among_new(self, q: Tensor) -> Plan:
        """Plan of the new tokens among themselves."""
        n = q.shape[2]
        return Plan.dense(n, n, causal=True, device=q.device) if self.among is None else self.among


class Attended(Layer):
    """A layer that computes attention itself, for lack of one tensor of all keys: `attend(q, k, v)`.

    `update` gives a host that expects all keys only the new ones, marked with `CACHED`; the attention
    implementation "sparse" passes these back to `attend`.
    """

    _new: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        among: Plan | None = None,
        real: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        new: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Attend from new tokens to the held keys and to themselves, then append them.

        Parameters
        ----------
        q, k, v : Tensor
            `[B,Hq,n,D]`, `[B,Hkv,n,D]`, `[B,Hkv,n,Dv]` of the new tokens.
        among : Plan, optional
            Plan of the new tokens among themselves. None: causal attention.
        real : Tensor, optional
            bool `[B,n]`, False for padding, which is not stored.
        scale, softcap, sink_logits
            As in `sparseflash.attention`.
        new : callable, optional
            Replaces `attention(q, k, v, among)` among the tokens of the first call.

        Returns
        -------
        Tensor
            `[B,Hq,n,Dv]`.
        """
        if real is not None and bool(real.all()):
            real = None
        options = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        return self._attend(q, k, v, Call(among, real, new, options))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Implement `attend`; `call` holds its other arguments."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The host's mask covers only the new tokens; this layer plans the held keys itself."""
        return queries(query_length), self.tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys, marked, and values; the attention "sparse" passes them to `attend`."""
        if self._new is not None:
            self._new = None
            raise SparseFlashError(
                "a cache that does not hand out its keys is attended by attn_implementation='sparse' "
                "(set_attn_implementation), and the last keys that it handed out were not: the model, or a "
                "layer of it, attends in a way of its own"
            )
        keys = key_states.view_as(key_states)
        vars(keys)[CACHED] = weakref.ref(self)
        self._new = keys, value_states
        return keys, value_states

    def taken(self) -> None:
        """Clear the marker of `update`; called by the attention that passes the keys back."""
        self._new = None


def layer_behind(keys: Tensor) -> Attended | None:
    """The layer whose `update` returned these keys, or None."""
    found = vars(keys).get(CACHED)
    return None if found is None else found()


def check_new(k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    """Check that new tokens fit behind the cached ones."""
    fits = isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == v.dim() == 4
    if not fits or k.shape[:3] != v.shape[:3]:
        raise SparseFlashError(f"k: {shape_of(k)}, v: {shape_of(v)}; expected [B,Hkv,n,D] and [B,Hkv,n,Dv]")
    for name, new, old in (("k", k, keys), ("v", v, values)):
        if old is None:
            continue
        if (new.shape[0], new.shape[1], new.shape[3]) != (old.shape[0], old.shape[1], old.shape[3]):
            raise SparseFlashError(
                f"{name}: shape {list(new.shape)} behind {list(old.shape)}: batch, heads and width of a "
                "cache stay. A cache of another model, or of another batch? reset() makes it an empty one"
            )
        if (new.dtype, new.device) != (old.dtype, old.device):
            raise SparseFlashError(
                f"{name}: {new.dtype} on {new.device} behind {old.dtype} on {old.device}: a cache stays what "
                "it is; convert the tensor, or reset() the cache"
            )
