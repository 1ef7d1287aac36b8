"""Find the KV heads of a model that can stream: a trained gate per head shows if it needs far keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.common.errors import SparseFlashError

Gates = dict[int, Tensor]
"""By layer: `[Hkv]`, 1 if the head attends to everything, 0 if it streams."""
FAR = "The pass phrase of box {n} is: {words}."
ASKED = "What is the pass phrase of box {n}? It is: {words}."


class Piece(NamedTuple):
    """A text with planted phrases, which questions at its end ask for."""

    ids: Tensor
    """Integers `[1,T]`."""
    asked: Tensor
    """bool `[T]`: the answers' tokens, whose prediction needs far keys."""


def planted(
    tokenizer: Any, text: str, tokens: int, generator: torch.Generator, *, phrases: int = 4, words: int = 8
) -> Piece:
    """Plant phrases of a text's own words at random positions in its beginning, and append questions."""
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
    """Last hidden states `[T,width]` when each KV head outputs `gate * full + (1 - gate) * streaming`."""
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
    """Train gates of all KV heads to keep the answers' hidden states at a price per open gate.

    The model is frozen. The loss is the mean squared change of the answers' last hidden states, relative to
    their mean square, plus `price` times the mean gate.

    Source: DuoAttention (Xiao et al., arXiv 2410.10819, section 2.2), whose gates LServe uses; DuoAttention
    does not normalise the squared change.
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
    """Mean squared change of the answers' hidden states caused by the gates, relative to their square."""
    with torch.no_grad():
        want = hidden(model, piece.ids, None, sinks=sinks, local=local)[piece.asked].float()
    found = hidden(model, piece.ids, gates, sinks=sinks, local=local)[piece.asked].float()
    return (found - want).square().mean() / want.square().mean()


@torch.no_grad()
def near_mass(model: Any, piece: Piece, *, sinks: int, local: int) -> Gates:
    """Share of each KV head's attention mass outside the first and the near keys."""
    found: Gates = {}
    hidden(
        model, piece.ids, None, sinks=sinks, local=local,
        watch=lambda number, share: found.update({number: 1 - share}),
    )  # fmt: skip
    return found


def halved(gates: Gates, share: float = 0.5) -> Gates:
    """Binary gates: 0 for the given share of heads with the smallest gates, which stream; 1 for the rest."""
    flat = torch.cat([gates[number] for number in sorted(gates)])
    order = flat.argsort(stable=True)
    cut = torch.ones_like(flat)
    cut[order[: int(share * len(flat))]] = 0
    parts = cut.split([len(gates[number]) for number in sorted(gates)])
    return dict(zip(sorted(gates), parts, strict=True))
