"""Context parallelism for Transformers models: each rank runs the model on its tokens, and attends all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import distributed
from ...common.errors import SparseFlashError
from ...distributed import ContextParallel, Layout
from ...methods.base import Method
from .attention import ACROSS, dense_mask
from .control import on_sparse
from .documents import by_positions, mixing
from .layers import Layer, attention_layers, bare, chosen

IGNORED = -100
"""Label of a token without a loss, as in Transformers."""


@contextmanager
def context_parallel(
    model: nn.Module,
    group: Any = None,
    method: Method | None = None,
    *,
    layers: Iterable[int | str] | int | str | None = None,
    layout: str | Layout = "auto",
    transport: str = "auto",
    timeout: float = 300.0,
) -> Iterator[Across]:
    """Share the tokens of each sequence over ranks, for training a causal language model.

    Inside the block every rank of the group calls the model with the same whole batch, as on one process:
    `input_ids` (or `inputs_embeds`), `labels`, `position_ids`. A hook keeps the tokens of the rank, and all
    attention layers attend the keys of all ranks (`sf.distributed`). `logits` and hidden states are those of
    the rank's tokens: `Across.cp.unshard(logits, 1)` are all.

    The loss is `world` times the rank's part of the mean over the sequence's labels: its mean over ranks, and
    that of gradients, are those of one process. `DistributedDataParallel`, FSDP and `Trainer` take these
    means, over data-parallel and context-parallel ranks at once. Backward belongs inside the block.

    Parameters
    ----------
    model : PreTrainedModel
        Or a wrapper of one, such as `DistributedDataParallel`.
    group : DeviceMesh, ProcessGroup, tuple of two of these, or None
        As in `sf.distributed.context_parallel`, such as `mesh["cp"]`.
    method : Method, optional
        Method of the attention layers without a window of their own, or of `layers`; by default dense.
    layers : int, str or iterable, optional
        Layers by index or by name (`*` matches anything).
    layout, transport, timeout
        As in `sf.distributed.context_parallel`.

    Raises
    ------
    SparseFlashError
        For a model outside the attention registry; and, in a call, for what has no share of a rank: a cache,
        padding other than behind, masks of the caller's own, labels that are not one a token.

    Examples
    --------
    On one process it changes nothing; `examples/context_parallel.py` runs on many.

    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model, ids = LlamaForCausalLM(config), torch.arange(3, 40)[None]
    >>> with sf.transformers.context_parallel(model):
    ...     loss = model(ids, labels=ids).loss
    >>> torch.allclose(loss, model(ids, labels=ids).loss, atol=1e-5)
    True
    """
    inner = bare(model)
    every = attention_layers(inner)
    methodical = {x.name for x in chosen(inner, layers)} if method is not None else set()
    if method is not None and method.phases and not {"prefill", "training"} & set(method.phases):
        raise SparseFlashError(f"method={method!r}: it is for {', '.join(method.phases)}, not for training")
    if kinds := mixing(getattr(inner, "config", None)):
        raise SparseFlashError(
            f"{type(inner).__name__} has layers of kind {kinds}, which carry one token into the next: over "
            "ranks go models whose layers mix tokens by attention alone"
        )
    how = {"layout": layout, "transport": transport, "timeout": timeout}
    make = functools.partial(distributed.context_parallel, group, **how)
    made = Across(make, method)
    hook = inner.register_forward_pre_hook(functools.partial(made.shard, inner), with_kwargs=True)
    try:
        for layer in every:
            own = method if layer.name in methodical else None
            setattr(layer.module, ACROSS, functools.partial(made.attend, layer, own))
        with on_sparse(inner):
            yield made
    finally:
        hook.remove()
        for layer in every:
            delattr(layer.module, ACROSS)


class Across:
    """A model whose tokens are shared over ranks.

    Attributes
    ----------
    cp : ContextParallel
        The ranks and the layout of the last forward: `cp.shard`, `cp.unshard`, `cp.positions`.
    """

    def __init__(self, make: Any, method: Method | None) -> None:
        self._make, self._method = make, method
        self._known: dict[int, ContextParallel] = {}
        self._plans: dict[Any, Any] = {}
        self._positions: Tensor | None = None
        self._cp: ContextParallel | None = None

    @property
    def cp(self) -> ContextParallel:
        """The ranks of the last forward."""
        if self._cp is None:
            raise SparseFlashError("no forward yet: call the model itself, which shards its tokens")
        return self._cp

    def shard(self, model: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replace the arguments of the model by those of this rank's tokens."""
        given = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        tokens = next((given[n] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None), None)
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise SparseFlashError("over ranks a model takes input_ids [B,T] or inputs_embeds [B,T,width]")
        B, T = tokens.shape[:2]
        _refuse(given, B, T)
        self._begin(model, given.get("position_ids"), tokens.device, B, T)
        cp = self.cp
        for name in ("input_ids", "inputs_embeds", "token_type_ids"):
            if given.get(name) is not None:
                given[name] = cp.shard(given[name], 1)
        positions = given.get("position_ids")
        own = cp.positions.to(tokens.device)
        given["position_ids"] = own[None] if positions is None else positions.index_select(-1, own)
        labels, told = given.get("labels"), given.get("shift_labels")
        if labels is not None or told is not None:
            behind = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if told is None else told
            count = given.get("num_items_in_batch")
            count = (behind != IGNORED).sum() if count is None else torch.as_tensor(count)
            given["shift_labels"] = cp.shard(behind, 1).contiguous()
            given["labels"] = given["shift_labels"] if labels is None else cp.shard(labels, 1)
            given["num_items_in_batch"] = count / cp.world
        given["attention_mask"] = tokens.new_ones(1, 1, 1, 1, dtype=torch.bool)  # four axes: no mask is made
        given["use_cache"] = False
        return (), given

    def _begin(self, model: nn.Module, positions: Any, device: torch.device, B: int, T: int) -> None:
        """The ranks for sequences of so many tokens, or for these documents."""
        whole = by_positions(dense_mask(model, device, B, T, T, True, None), positions)
        documents = whole.edges is not None or whole.documents
        if documents and self._method is not None:
            raise SparseFlashError(
                f"position_ids begin anew within a row, and method={self._method!r}: over ranks packed "
                "documents are attended densely; leave the method out, or give one document a row"
            )
        self._positions, self._plans = (positions, {}) if documents else (None, self._plans)
        if documents:
            self._cp = self._make(whole.plan)
        else:
            if T not in self._known:
                self._known[T] = self._make(self._method or whole.plan, length=T)
            self._cp = self._known[T]

    def attend(
        self,
        layer: Layer,
        method: Method | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        window: int | None,
        options: dict[str, Any],
        beside: dict[str, Any],
    ) -> Tensor:
        """Attention of one layer over the keys of all ranks, out `[B,Hq,n,Dv]`."""
        if unknown := [name for name, x in beside.items() if x is not None]:
            raise SparseFlashError(f"{layer.name} gives {', '.join(unknown)}: this does not go over ranks")
        if layer.windowed and window is None:
            raise SparseFlashError(
                f"{layer.name} attends in chunks that it does not name: over ranks layers are dense, or have "
                "a sliding window"
            )
        cp, plan = self.cp, None
        if method is None:
            T, B = cp.layout.T, q.shape[0]
            at = T, B if self._positions is not None else 1, causal, window, q.device
            if at not in self._plans:
                mask = dense_mask(layer.module, q.device, B, T, T, causal, window)
                self._plans[at] = by_positions(mask, self._positions).plan
            plan = self._plans[at]
        ctx = {"layer": layer.index} if method is not None and "layer" in method.reads else None
        with cp:
            found: Tensor = distributed.attention(
                q, k, v, method if plan is None else plan, ctx=ctx, **options
            )
        return found


def _refuse(given: dict[str, Any], B: int, T: int) -> None:
    """Refuse arguments that have no share of a rank."""
    mask, labels = given.get("attention_mask"), given.get("labels")
    behind = None
    if mask is not None:
        behind = isinstance(mask, Tensor) and mask.shape == (B, T)
        behind = behind and bool((mask[:, 1:].bool() <= mask[:, :-1].bool()).all())
    keep = given.get("logits_to_keep")
    for wrong, said in (
        (given.get("past_key_values") is not None, "past_key_values: over ranks there is no cache"),
        (behind is False, "attention_mask: expected none, or [B,T] with padding behind the tokens alone"),
        (labels is not None and labels.shape != (B, T), f"labels: expected one a token, {[B, T]}"),
        (isinstance(keep, Tensor) or bool(keep), "logits_to_keep: a rank has those of its own tokens"),
        (bool(given.get("output_attentions")), "output_attentions: no rank has the weights of all keys"),
    ):
        if wrong:
            raise SparseFlashError(
                f"{said}; sf.transformers.context_parallel shares whole sequences, for training"
            )
