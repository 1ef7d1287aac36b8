"""What the key cache of one attention layer is: four verbs, and the names that hosts call them by."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import SparseFlashError, require
from ..plan import Plan
from ..plan.options import shape_of

CACHED = "_sparseflash_cache"
"""Name of the attribute of keys that a layer has handed to a host: the layer that attends to them."""


class Layer:
    """The keys and values of one attention layer: `append`, `plan`, `bytes`, `tokens`.

    A list of layers is a cache. Transformers takes them as `Cache(layers=[...])` once `sf.transformers` is
    imported; the lower half of the methods is what it calls. Positions are those of the tokens: a layer that
    has forgotten some counts on where the last one was.
    """

    is_sliding: ClassVar[bool] = False
    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = True
    supports_early_init: ClassVar[bool] = True

    # ------------------------------------------------------------ the four verbs

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put `k [B,Hkv,n,D]` and `v [B,Hkv,n,Dv]` of n further tokens behind the others."""
        raise NotImplementedError

    def plan(self, Tq: int = 1) -> Plan | tuple[Plan, ...]:
        """What the last Tq tokens see, as a plan over `keys` and `values`, or one for each part of them."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Memory that the layer holds."""
        return sum(x.untyped_storage().nbytes() for x in self.tensors().values())

    @property
    def tokens(self) -> int:
        """Tokens that were appended and not cropped, whether or not they are still held."""
        raise NotImplementedError

    # ------------------------------------------------------------ what they stand on

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the layer holds, by name."""
        raise NotImplementedError

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these sequences of the batch, in this order; one may stand there several times."""
        raise NotImplementedError

    def crop(self, n: int) -> None:
        """Forget tokens at the end: all but the first n, or, below 0, so many."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file is to hold: tensors, and options that JSON can hold."""
        raise NotImplementedError

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """A layer of what a file held."""
        raise NotImplementedError

    def _left(self, n: int) -> int:
        """The tokens that are left by `crop(n)`."""
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
        """Whether something was appended."""
        return bool(self.tensors())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first `append` says how large things are."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """`append`, and the keys and values to attend to."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """`tokens`."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next call attends to, and the position of the first."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no end."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`select_rows`, for beams."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """`select_rows`, for sequences that go on."""
        self.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`select_rows`, for samples of one prompt."""
        if self.is_initialized:
            batch = next(iter(self.tensors().values())).shape[0]
            self.select_rows(torch.arange(batch).repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: a layer stays where its keys were made."""

    prefetch = offload

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.tokens}, bytes={self.bytes})"


class Call(NamedTuple):
    """What `Attended.attend` is told beside q, k and v."""

    among: Plan | None
    real: Tensor | None
    new: Callable[..., Any] | None
    options: dict[str, Any]
    """scale, softcap, sink_logits."""

    def among_new(self, q: Tensor) -> Plan:
        """What new tokens see of each other."""
        n = q.shape[2]
        return Plan.dense(n, n, causal=True, device=q.device) if self.among is None else self.among


class Attended(Layer):
    """A layer that attends itself, since no tensor of all keys exists: `attend(q, k, v)`.

    To a host that asks for all keys it hands out the new ones, marked; the attention "sparse" brings them
    back.
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
        """Attention of new tokens over what is held and over themselves, which are appended.

        Parameters
        ----------
        q, k, v : Tensor
            `[B,Hq,n,D]`, `[B,Hkv,n,D]`, `[B,Hkv,n,Dv]` of the new tokens.
        among : Plan, optional
            What they see of each other. None: causal attention.
        real : Tensor, optional
            bool `[B,n]`, False = padding, which is not kept.
        scale, softcap, sink_logits
            As in `sparseflash.attention`.
        new : callable, optional
            What attends among the tokens of a first call instead of `attention(q, k, v, among)`.

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
        """`attend`, of what it was told."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is of the new tokens among themselves; of the others this layer knows what is held."""
        return query_length, self.tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, for the attention "sparse" to bring back to `attend`."""
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
        """Called by the attention that brings back what `update` handed out."""
        self._new = None


def layer_behind(keys: Tensor) -> Attended | None:
    """The layer that handed out these keys."""
    found = vars(keys).get(CACHED)
    return None if found is None else found()


def check_new(k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    """Check tokens that go behind others."""
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
