"""Prefill a real model densely and with methods: time, visible pairs, and loss of quality.

Every case reads the same tokens. Measured are: seconds to the first token, with cases interleaved; the share
of visible pairs, and the attention mass on them; the loss on the prompt; and the divergence of the next
tokens (Kullback-Leibler, dense to sparse, at the text's own next tokens, which all cases decode densely from
the cache of their prefill).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparseflash.bench.results import Row
from sparseflash.bench.timing import Timing, seconds
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods.base import Method

if TYPE_CHECKING:
    from sparseflash.integrations.transformers import SpecPrefill

CHUNK = 512
"""Tokens whose logits are in memory at a time."""


QUERIES = 512
"""Number of queries that density and recall are measured on, one drawn from each part of the prompt."""


WHOLE = "the prompt is no longer than the budget: nothing was left out, attention was dense"
"""The note of a row whose method showed every pair."""


class Judgement(NamedTuple):
    """Quality of a prompt under a method."""

    loss: float
    """Loss on the prompt, nats per token; NaN if not all of it was read."""
    following: Tensor
    """Log-probabilities of the next tokens, `[new, words]`."""
    seen: tuple[Any, ...]
    """A `transformers.report.Row` per layer."""
    read: float
    """Share of the prompt's tokens that the model read."""


@dataclass(frozen=True)
class Prompt:
    """A model and its input: `ids [1, tokens + new]`, a prompt and `new` following tokens."""

    model: Any
    ids: Tensor
    new: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, text: str, tokens: int, new: int = 48) -> Prompt:
        """Tokenise the beginning of a text.

        Raises
        ------
        SparseFlashError
            If the text is too short, or the model has fewer positions.
        """
        wanted = tokens + new
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=wanted).input_ids
        if ids.shape[1] < wanted:
            raise SparseFlashError(
                f"the text has {ids.shape[1]} tokens; {tokens} of a prompt and {new} behind it are wanted: "
                "give a longer text, or ask for fewer --tokens"
            )
        known = getattr(model.config, "max_position_embeddings", None)
        if known is not None and wanted > known:
            raise SparseFlashError(
                f"{tokens} tokens and {new} behind them: the model knows {known} positions; ask for at most "
                f"{known - new} --tokens"
            )
        return cls(model, ids.to(model.device), new)

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.ids.shape[1] - self.new

    def under(
        self, method: Method | SpecPrefill | None, layers: Sequence[int] | None
    ) -> AbstractContextManager[Any]:
        """Context in which the model's prefill uses a method (None: dense)."""
        from sparseflash.integrations.transformers import SpecPrefill, sparse

        if isinstance(method, SpecPrefill):
            return sparse(self.model, tokens=method)
        return sparse(self.model, prefill=method, layers=layers)

    @torch.no_grad()
    def first(self) -> Tensor:
        """Compute the logits of the first new token: the latency that a user notices."""
        prompt = self.ids[:, : self.tokens]
        return self.model(prompt, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def judge(self, method: Method | SpecPrefill | None, layers: Sequence[int] | None) -> Judgement:
        """Measure loss and visible pairs of a prompt under a method, in one prefill."""
        from sparseflash.integrations.transformers.reporting import measuring

        prompt, behind = self.ids[:, : self.tokens], self.ids[:, self.tokens : -1]
        with self.under(method, layers), measuring(self.model, QUERIES, dense=False) as seen:
            out = self.model.base_model(prompt, use_cache=True)
        read = out.last_hidden_state[0]
        whole = len(read) == self.tokens
        loss = 0.0 if whole else float("nan")
        for rows, words in zip(read[:-1].split(CHUNK), prompt[0, 1:].split(CHUNK), strict=whole):
            if whole:
                loss += float(torch.nn.functional.cross_entropy(self._logits(rows), words, reduction="sum"))
        with self.under(None, layers):
            last = self.model.base_model(behind, past_key_values=out.past_key_values, use_cache=True)
        following = self._logits(torch.cat([read[-1:], last.last_hidden_state[0]]))
        share = len(read) / self.tokens
        return Judgement(loss / max(self.tokens - 1, 1), following.log_softmax(-1), tuple(seen), share)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of some tokens; those of a long prompt would be larger than the model."""
        logits = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def measure(
    prompt: Prompt,
    cases: Mapping[str, Method | SpecPrefill],
    *,
    layers: Sequence[int] | None = None,
    rounds: int = 3,
    stock: bool = True,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Yield one row per case: stock attention, our dense attention, and each method.

    Parameters
    ----------
    prompt : Prompt
    cases : mapping
        Methods by row name, or which tokens are read.
    layers : sequence of int, optional
        Layers that use the method; None: all layers without a window of their own.
    rounds : int
        Timed rounds, all cases in turn; 0 skips timing.
    stock : bool
        Whether to include the model's own attention.

    Yields
    ------
    dict
        ``case``, ``tokens``; ``ms`` to the first token (median) and ``gain`` over our dense attention;
        ``kept`` and ``recall``, means over the layers and heads that use a method; ``recall_worst``;
        ``attention_gain`` of these layers' attention only, selection included; ``loss``, and ``kl``;
        ``read``, the share of tokens that the model read. What a method says of its heads (`Method.notes`) is
        there by name, mean over those it says it of. A row of `SpecPrefill` has ``read`` and ``kl`` alone.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from sparseflash.bench.prompts import Prompt, measure
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> prompt = Prompt(LlamaForCausalLM(config).eval(), torch.arange(100)[None], new=10)
    >>> window = sf.methods.SinkWindow(window=16)
    >>> [row["case"] for row in measure(prompt, {"window": window}, rounds=1)]
    ['sdpa', 'dense', 'window']
    """
    spent = times(prompt, cases, layers=layers, rounds=rounds, stock=stock, on_run=on_run) if rounds else {}
    lost = {row["case"]: row for row in losses(prompt, cases, layers=layers, on_run=on_run)}
    for name in dict.fromkeys((*spent, *lost)):
        row: Row = lost.get(name) or {"bench": "prompts", "case": name, "tokens": prompt.tokens}
        if name in spent:
            row |= {"rounds": rounds, "ms": spent[name].median * 1e3}
            row |= {"gain": spent["dense"].over(spent[name])}
        yield row


def losses(
    prompt: Prompt,
    cases: Mapping[str, Method | SpecPrefill],
    *,
    layers: Sequence[int] | None = None,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Visible pairs and losses of dense attention and each method: the rows of `measure` without times."""
    on_run("dense: what it loses")
    dense = prompt.judge(None, layers)
    same: Row = {"bench": "prompts", "tokens": prompt.tokens, "new": prompt.new}
    everything = {"kept": 1.0, "recall": 1.0, "recall_worst": 1.0}
    yield {"case": "dense", **same, **everything, "loss": dense.loss, "kl": 0.0, "read": 1.0}
    for name, method in cases.items():
        on_run(f"{name}: what it sees and loses")
        found = prompt.judge(method, layers)
        kl = {"kl": divergence(dense.following, found.following), "read": found.read}
        if isinstance(method, Method):
            kl |= {"loss": found.loss} | _seen(method, dense, found)
            kl |= {"note": WHOLE} if kl["kept"] == 1 else {}
        yield {"case": name, **same, **kl, "method": repr(method)}


def times(
    prompt: Prompt,
    cases: Mapping[str, Method | SpecPrefill],
    *,
    layers: Sequence[int] | None = None,
    rounds: int = 3,
    stock: bool = False,
    warm: bool = True,
    on_run: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Time to the first token, interleaved: dense, each method, and the model's own attention.

    One warm-up round comes first unless `warm` is False, for cases that have run before.
    """
    runs: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
    if stock:
        runs[prompt.model.config._attn_implementation] = nullcontext
    for name, method in {"dense": None, **cases}.items():
        runs[name] = functools.partial(prompt.under, method, layers)
    found: dict[str, Timing] = {}
    for n in range(0 if warm else 1, rounds + 1):
        for name, under in runs.items():
            on_run(f"{name}, " + (f"round {n} of {rounds}" if n else "warming up"))
            with under():
                spent = seconds(prompt.first)
            timing = found.setdefault(name, Timing(spent))
            if n:
                timing.times.append(spent)
    return found


def divergence(dense: Tensor, sparse: Tensor) -> float:
    """Kullback-Leibler divergence from dense to sparse log-probabilities `[n, words]`, mean over the n."""
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def _seen(method: Method, dense: Judgement, found: Judgement) -> Row:
    """Statistics of the layers with a method, and the speed-up of their attention."""
    pairs = [pair for pair in zip(dense.seen, found.seen, strict=True) if set(pair[1].methods) != {"dense"}]
    if not pairs:
        raise SparseFlashError(
            f"{method!r} serves none of the layers: they have windows of their own; name layers"
        )
    kept, recall = ([x for _, row in pairs for x in getattr(row, name)] for name in ("density", "recall"))
    before, after = (sum(pair[n].seconds for pair in pairs) for n in (0, 1))
    notes: dict[str, list[float]] = {}
    for _, row in pairs:
        for name, said in row.notes.items():
            notes.setdefault(name, []).extend(x for x in said if not math.isnan(x))
    return {name: sum(each) / len(each) for name, each in notes.items() if each} | {
        "kept": sum(kept) / len(kept),
        "recall": sum(recall) / len(recall),
        "recall_worst": min(recall),
        "attention_gain": before / after,
    }
