"""Which KV heads of a model may stream: a gate for each learns how far the model needs it to see all keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.errors import SparseFlashError

Gates = dict[int, Tensor]
"""By layer: `[Hkv]`, 1 where the head sees everything, 0 where it streams."""
FAR = "The pass phrase of box {n} is: {words}."
ASKED = "What is the pass phrase of box {n}? It is: {words}."


class Piece(NamedTuple):
    """A text with phrases in it that are asked for at its end."""

    ids: Tensor
    """Integers `[1,T]`."""
    asked: Tensor
    """bool `[T]`: the tokens of the answers, for which far keys are needed."""


def planted(
    tokenizer: Any, text: str, tokens: int, generator: torch.Generator, *, phrases: int = 4, words: int = 8
) -> Piece:
    """The beginning of a text with phrases of its own words at random places, and questions at the end."""
    known = sorted({word for word in text.split() if word.isalpha() and len(word) > 3})
    if len(known) < 2 * words:
        raise SparseFlashError(f"a text with {len(known)} long words: expected {2 * words} or more")

    def ids(said: str) -> list[int]:
        return list(tokenizer(said, add_special_tokens=False).input_ids)

    told, ends, answers = [], [], []
    for n in range(phrases):
        at = torch.randint(len(known), (words,), generator=generator)
        phrase = " ".join(known[i] for i in at.tolist())
        told.append(ids(" " + FAR.format(n=n, words=phrase)))
        end, whole = (
            ids(" " + ASKED.format(n=n, words="").rstrip(". ")),
            ids(" " + ASKED.format(n=n, words=phrase)),
        )
        ends += whole
        answers += [False] * len(end) + [True] * (len(whole) - len(end))
    left = tokens - len(ends) - sum(map(len, told))
    if left < phrases:
        raise SparseFlashError(
            f"{tokens} tokens hold no {phrases} phrases and questions: ask for more tokens"
        )
    book = ids(text[: 8 * left])[:left]
    if len(book) < left:
        raise SparseFlashError(f"the text has {len(book)} tokens, {left} are wanted: give a longer one")
    places = sorted(torch.randint(left // 2, (phrases,), generator=generator).tolist(), reverse=True)
    for place, phrase in zip(places, told):
        book[place:place] = phrase
    asked = torch.tensor([False] * len(book) + answers)
    return Piece(torch.tensor([book + ends]), asked)


def hidden(
    model: Any,
    ids: Tensor,
    gates: Mapping[int, Tensor] | None,
    *,
    sinks: int,
    local: int,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The last hidden states `[T,width]` where each KV head sees `gate * all + (1 - gate) * streaming`."""
    from sparseflash.integrations.transformers import attention_layers
    from sparseflash.integrations.transformers.control import attached, on_sparse

    chosen = [layer for layer in attention_layers(model) if not layer.windowed]

    def listener(number: int) -> Callable[..., Tensor]:
        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
            T = q.shape[2]
            whole, lse = sf.attention(q, k, v, mask.plan, return_lse=True, **options)
            if gates is None and watch is None:
                return whole
            plan = sf.Plan.dense(T, T, causal=True, window=(local - 1, 0), sink_tokens=sinks)
            near, part = sf.attention(q, k, v, plan, return_lse=True, **options)
            if watch is not None:
                watch(number, (part - lse).exp().unflatten(1, (k.shape[1], -1)).mean((0, 2, 3)))
            if gates is None:
                return whole
            gate = gates[number].repeat_interleave(q.shape[1] // k.shape[1])[:, None, None].to(q.dtype)
            return gate * whole + (1 - gate) * near

        return attend

    with on_sparse(model), attached(chosen, [listener(layer.index) for layer in chosen]):
        found: Tensor = model.base_model(ids, use_cache=False).last_hidden_state[0]
    return found


def train(
    model: Any,
    pieces: Sequence[Piece],
    *,
    sinks: int = 64,
    local: int = 256,
    steps: int = 100,
    lr: float = 0.02,
    price: float = 0.05,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Gates:
    """Gates of all KV heads, such that the answers' hidden states stay what they are, at a price for each.

    The model stays as it is. Loss: the mean square of what the last hidden states of the answers change by,
    over that of the states, and `price` times the mean gate.

    Source: DuoAttention (Xiao et al., arXiv 2410.10819, section 2.2), whose gates LServe takes; there the
    square is not divided by the states' own.
    """
    layers: dict[int, int] = {}
    with torch.no_grad():
        hidden(
            model, pieces[0].ids[:, :8], None, sinks=sinks, local=local,
            watch=lambda number, share: layers.update({number: len(share)}),
        )  # fmt: skip
    flat = torch.ones(sum(layers.values()), requires_grad=True)
    optimiser = torch.optim.Adam([flat], lr)
    learns = [x for x in model.parameters() if x.requires_grad]
    for x in learns:
        x.requires_grad_(False)
    try:
        for step in range(steps):
            piece = pieces[step % len(pieces)]
            gates = dict(zip(layers, flat.split(list(layers.values())), strict=True))
            loss = moved(model, piece, gates, sinks=sinks, local=local) + price * flat.mean()
            optimiser.zero_grad()
            (flat.grad,) = torch.autograd.grad(loss, (flat,))
            optimiser.step()
            with torch.no_grad():
                flat.clamp_(0, 1)
            on_step(float(loss.detach()))
    finally:
        for x in learns:
            x.requires_grad_(True)
    return dict(zip(layers, flat.detach().split(list(layers.values())), strict=True))


def moved(model: Any, piece: Piece, gates: Mapping[int, Tensor], *, sinks: int, local: int) -> Tensor:
    """How far the answers' hidden states go from where they are without gates: a share of their square."""
    with torch.no_grad():
        want = hidden(model, piece.ids, None, sinks=sinks, local=local)[piece.asked].float()
    found = hidden(model, piece.ids, gates, sinks=sinks, local=local)[piece.asked].float()
    return (found - want).square().mean() / want.square().mean()


@torch.no_grad()
def near_mass(model: Any, piece: Piece, *, sinks: int, local: int) -> Gates:
    """The share of each KV head's attention that lies beyond the first keys and the near ones."""
    found: Gates = {}
    hidden(
        model, piece.ids, None, sinks=sinks, local=local,
        watch=lambda number, share: found.update({number: 1 - share}),
    )  # fmt: skip
    return found


def halved(gates: Gates, share: float = 0.5) -> Gates:
    """1 for the heads of the largest gates, 0 for the given share of them: those that stream."""
    flat = torch.cat([gates[number] for number in sorted(gates)])
    order = flat.argsort(stable=True)
    cut = torch.ones_like(flat)
    cut[order[: int(share * len(flat))]] = 0
    parts = cut.split([len(gates[number]) for number in sorted(gates)])
    return dict(zip(sorted(gates), parts, strict=True))
