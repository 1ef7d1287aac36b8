"""`SpecPrefill`: a model reads the tokens of a prompt that matter, found by a draft or by early layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...cache.growing import Growing
from ...cache.thinned import Thinned
from ...common.errors import SparseFlashError, require
from ...plan.options import is_count
from ...selection.probes import probe
from .._host import exact
from .control import attached, on_sparse
from .layers import Layer, attention_layers, bare
from .mask import SparseMask

Judge = Literal["attention", "random", "ends"]


@dataclasses.dataclass(frozen=True, eq=False)
class SpecPrefill:
    """Read a part of a prompt's tokens: `sparse(model, tokens=SpecPrefill(keep=0.3))`.

    For short prompts most of a model's time is not attention, so sparse attention saves little; with fewer
    tokens all layers have less to do. Chunks of tokens are judged by the attention that the last tokens pay
    them: in all layers of a smaller `draft` model, which also looks ahead by a few tokens of its own, or, if
    there is none, in an early layer of the model itself. The model then reads the best chunks, at their
    original positions, into a cache (`cache.Thinned`) with which generation goes on as usual.

    Papers: Liu et al., "Speculative Prefill", arXiv 2502.02789 (a draft; algorithm 1). Shi et al.,
    "Discovering the Gems in Early Layers", arXiv 2409.17422 (an early layer; it renumbers what is left).

    Parameters
    ----------
    keep : float
        Share of the chunks that is read, in (0, 1]; 1 reads everything, and nothing is judged.
    draft : PreTrainedModel, optional
        A smaller model with the same vocabulary. None: layers of the model itself.
    layers : int or sequence of int, optional
        Layers whose attention judges. None: all of the draft, or the one a sixth up the model itself; layers
        above the last of them do not run.
    ahead : int
        Tokens that the draft generates greedily, to judge by their attention too.
    last : int
        Last tokens of the prompt, whose attention judges.
    chunk : int
        Tokens of a chunk. The first and the last chunk are always read.
    smooth : int
        Scores of so many neighbours are averaged before the maximum over heads and layers; odd.
    by : "attention", "random" or "ends"
        "random" and "ends" (first and last chunks) are controls that judge nothing.
    seed : int
        Of "random".

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model, prompt = LlamaForCausalLM(config).eval(), torch.randint(3, 100, (1, 640))
    >>> with sf.transformers.sparse(model, tokens=sf.transformers.SpecPrefill(keep=0.25)):
    ...     out = model(prompt, logits_to_keep=1)
    >>> out.logits.shape, out.past_key_values.get_seq_length(), out.past_key_values.layers[0].tokens
    (torch.Size([1, 1, 32000]), 640, 160)
    """

    keep: float = 0.3
    draft: nn.Module | None = dataclasses.field(default=None, repr=False)
    layers: int | Sequence[int] | None = None
    ahead: int = 8
    last: int = 64
    chunk: int = 32
    smooth: int = 13
    by: Judge = "attention"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"last": 1, "chunk": 1, "smooth": 1, "ahead": 0}
        is_share = (
            isinstance(self.keep, (int, float)) and not isinstance(self.keep, bool) and 0 < self.keep <= 1
        )
        require(
            (is_share, lambda: f"keep={self.keep!r}: expected a share in (0, 1]"),
            (
                self.by in ("attention", "random", "ends"),
                f"by={self.by!r}: expected attention, random or ends",
            ),
            (
                self.draft is None or isinstance(self.draft, nn.Module),
                lambda: f"draft={self.draft!r}: expected a model of Transformers (sf.transformers.load)",
            ),
            *(
                (
                    is_count(getattr(self, name), least),
                    lambda name=name, least=least: (
                        f"{name}={getattr(self, name)!r}: expected an int >= {least}"
                    ),
                )
                for name, least in counts.items()
            ),
        )
        require((self.smooth % 2 == 1, f"smooth={self.smooth}: expected an odd number of tokens"))

    def chunks(self, tokens: int) -> int:
        """Number of chunks of a prompt that are read."""
        return max(1, math.ceil(self.keep * -(-tokens // self.chunk)))

    def reading(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which a model reads these tokens of the prompts that begin a cache."""
        return _thinned(model, self)

    @torch.no_grad()
    def choose(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Places of the tokens of `ids [B,T]` that a model should read: int64 `[B,K]`, ascending."""
        (B, T), size = ids.shape, self.chunk
        count, wanted = -(-T // size), self.chunks(T)
        if wanted >= count:
            return torch.arange(T, device=ids.device).expand(B, T)
        worth = self._worth(model, ids, count)
        worth[:, 0], worth[:, -1] = (torch.finfo(worth.dtype).max, torch.inf)
        best = worth.topk(wanted, -1).indices.sort(-1).values
        places = (best[..., None] * size + torch.arange(size, device=ids.device)).flatten(1)
        return places[:, : (wanted - 1) * size + (T - (count - 1) * size)]  # the last chunk may be short

    def _worth(self, model: nn.Module, ids: Tensor, count: int) -> Tensor:
        """A number for each chunk, fp32 `[B,count]`."""
        if self.by == "ends":
            place = torch.arange(count, device=ids.device)
            return (place - (count - 1) / 2).abs().float().expand(len(ids), -1).clone()
        if self.by == "random":
            drawn = torch.rand(len(ids), count, generator=torch.Generator().manual_seed(self.seed))
            return drawn.to(ids.device)
        score = self._early(model, ids) if self.draft is None else self._drafted(self.draft, model, ids)
        short = count * self.chunk - score.shape[-1]
        per = torch.full((count,), float(self.chunk), device=score.device)
        per[-1] -= short
        return nn.functional.pad(score, (0, short)).view(len(score), count, self.chunk).sum(-1) / per

    def _early(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Score tokens by the model's own early layers, and stop behind them."""
        every = attention_layers(model)
        wanted = [round(len(every) / 6)] if self.layers is None else self.layers
        heard = _Heard(self, _named(every, wanted), stop=True)
        with heard.listening(model):
            try:
                base: Any = model.base_model
                base(ids, use_cache=False)
            except _Enough:
                return heard.scores(ids.shape[1])
        raise SparseFlashError(f"{type(model).__name__} never ran its layers {wanted}")

    def _drafted(self, draft: nn.Module, model: nn.Module, ids: Tensor) -> Tensor:
        """Score tokens by all layers of a draft, whose own next tokens judge too."""
        draft = bare(draft)
        models: tuple[Any, Any] = draft, model
        sizes = [int(x.get_input_embeddings().num_embeddings) for x in models]
        if sizes[0] != sizes[1]:
            raise SparseFlashError(
                f"draft={type(draft).__name__} has {sizes[0]} words, {type(model).__name__} {sizes[1]}: "
                "expected a model with the same tokenizer"
            )
        every = attention_layers(draft)
        heard = _Heard(self, _named(every, range(len(every)) if self.layers is None else self.layers))
        with heard.listening(draft):
            cache, new = None, ids.to(next(draft.parameters()).device)
            for _ in range(self.ahead + 1):
                out = draft(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
                heard.next()
                cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return heard.scores(ids.shape[1]).to(ids.device)


class _Enough(Exception):
    """Ends a forward behind its last layer that judges."""


class _Heard:
    """Attention that last tokens pay each token, collected from layers: maximum over heads and layers."""

    def __init__(self, how: SpecPrefill, layers: list[Layer], stop: bool = False) -> None:
        self.how, self.layers, self.stop = how, layers, stop
        self.steps: list[Tensor] = []
        self.now: Tensor | None = None

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        with on_sparse(model), attached(self.layers, [self._listener(n) for n in range(len(self.layers))]):
            yield

    def _listener(self, n: int) -> Callable[..., Tensor]:
        def attend(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: SparseMask, options: dict[str, Any]
        ) -> Tensor:
            told = {name: options[name] for name in ("scale", "softcap")}
            rows = min(self.how.last, q.shape[2])
            mass = probe(q, k, rows, q_offset=mask.offset, **told).keys() / rows
            mass = nn.functional.avg_pool1d(
                mass, self.how.smooth, 1, self.how.smooth // 2, count_include_pad=False
            ).amax(1)
            self.now = mass if self.now is None else torch.maximum(self.now, mass)
            if self.stop and n == len(self.layers) - 1:
                raise _Enough
            return exact(q, k, v, mask.plan, options)

        return attend

    def next(self) -> None:
        """Begin the next token's attention."""
        assert self.now is not None
        self.steps.append(self.now)
        self.now = None

    def scores(self, T: int) -> Tensor:
        """Scores of the first T tokens, mean over the steps, fp32 `[B,T]`."""
        if self.now is not None:
            self.next()
        return torch.stack([x[:, :T] for x in self.steps]).mean(0)


def _named(every: list[Layer], wanted: int | Sequence[int]) -> list[Layer]:
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    known = {layer.index: layer for layer in every}
    if not numbers or (strange := [n for n in numbers if n not in known]):
        raise SparseFlashError(
            f"layers={numbers}: expected some of the attention layers {sorted(known)}"
            + (f"; {strange} are not among them" if numbers else "")
        )
    return [known[n] for n in sorted(set(numbers))]


@contextmanager
def _thinned(model: nn.Module, how: SpecPrefill) -> Iterator[None]:
    """Let a model read a part of the prompts that begin a cache, inside the block."""
    if windowed := [layer.name for layer in attention_layers(model) if layer.windowed]:
        raise SparseFlashError(
            f"tokens=: {windowed[0]} and {len(windowed) - 1} more layers have windows, which count places in "
            "the cache: expected a model whose layers see everything"
        )
    if blind := [x.name for x in attention_layers(model) if not getattr(x.module, "is_causal", True)]:
        raise SparseFlashError(
            f"tokens=: {blind[0]} is bidirectional, or attends to another sequence: expected a causal model, "
            "whose last tokens are what is asked for"
        )
    inner = model.base_model
    if not isinstance(inner, nn.Module):
        raise SparseFlashError(f"tokens=: {type(model).__name__} has no base_model that reads input_ids")
    busy = False

    def outer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise SparseFlashError("tokens= with labels: a loss wants all tokens; leave tokens= out to train")

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal busy
        if busy:
            return None
        given = dict(zip(("input_ids", "attention_mask", "position_ids", "past_key_values"), args)) | kwargs
        busy = True
        try:
            return (), _part(model, how, given)
        finally:
            busy = False

    handles = [x.register_forward_pre_hook(f, with_kwargs=True) for x, f in ((inner, hook), (model, outer))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part(model: Any, how: SpecPrefill, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, of fewer tokens if it begins a prompt that is long enough."""
    ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    begun = cache is not None and cache.get_seq_length() > 0
    if begun or (ids is not None and how.chunks(ids.shape[1]) >= -(-ids.shape[1] // how.chunk)):
        return given
    if not isinstance(ids, Tensor):
        raise SparseFlashError(
            "tokens=: the model is given no input_ids, which are judged: expected ids, not inputs_embeds"
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
        raise SparseFlashError(
            "tokens= with padding, or a mask of another kind: expected prompts of one length, or one a call"
        )
    T = ids.shape[1]
    read = how.choose(model, ids)
    at = given.get("position_ids")
    at = read if at is None else at.expand(len(ids), -1).gather(1, read)
    keeps = given.get("use_cache")
    if cache is None and (model.config.use_cache if keeps is None else keeps):
        cache = DynamicCache(config=model.config)
    if cache is not None:
        _thin(cache, model, read, T)
    whole = torch.ones_like(read)  # without it, places that jump would be taken for packed documents
    made = given | {"input_ids": ids.gather(1, read), "position_ids": at, "attention_mask": whole}
    made.pop("cache_position", None)
    return made | {"past_key_values": cache}


def _thin(cache: Any, model: Any, read: Tensor, T: int) -> None:
    """Replace the layers of an empty `DynamicCache` by such as know what was left out."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = getattr(cache, "layers", [])
    if type(cache) is not DynamicCache or not all(type(x) in (DynamicLayer, Growing) for x in layers):
        kinds = ", ".join(sorted({type(x).__name__ for x in layers}))
        raise SparseFlashError(
            f"tokens= and a {type(cache).__name__} of {kinds or 'no'} layers: expected an empty DynamicCache "
            "(and no cache= of sparse)"
        )
    cache.layers[:] = [Thinned(read, T) for _ in range(count)]
