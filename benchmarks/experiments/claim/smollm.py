"""A model that has far recall: SmolLM2 with the attention of every head exchanged.

Dense attention gains something from what is further back than a window; the figure is the share of this gain
that a selection keeps, (window - method) / (window - dense), of the loss of all tokens and of the far slice
(`texts.far`). It means something only where the gain is large enough and chance does not keep much of it
(`verdict`).

Every contender sees the window and the first four tokens. On these a pretrained model rests its attention: a
window without them loses several times what all else far away is worth, and whatever shows them to some
queries by chance would seem to recall. Without training, and after the same steps of fine-tuning for all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.quality import density
from sparseflash.bench.results import Row
from sparseflash.integrations.transformers.attention import SETTING
from sparseflash.integrations.transformers.control import attached
from sparseflash.methods import HashSparse, SinkWindow
from sparseflash.methods.base import Method

from . import texts
from .controls import ByMass, Centred, Chance, Early, Oracle
from .rows import Job, mean, numbers

WINDOW, SINKS, BUCKETS = 128, 4, 16
BOTH: dict[str, Any] = {"window": WINDOW, "sink_tokens": SINKS}
SEEDED = ("random buckets", "LSH", "LSH, centred")
"""Those that a seed changes."""
Watch = Callable[..., None]
GAIN, GAIN_FAR, GOAL, PAIRS = 0.03, 0.10, 0.8, 1 / 8
"""What dense has to gain over the window (all tokens; far slice), what to keep of it, with how many pairs."""
CHUNK = 512
"""Tokens whose logits are held at a time."""


def contenders(T: int, seed: int = 0) -> dict[str, Method | None]:
    """What stands in the place of dense attention, each with about window + T / 32 keys a query."""
    return {
        "dense": None,
        "window": SinkWindow(window=WINDOW, sink_tokens=SINKS),
        "window of the same pairs": SinkWindow(window=WINDOW + T // (2 * BUCKETS), sink_tokens=SINKS),
        "random buckets": Chance(nb=BUCKETS, seed=seed, **BOTH),
        "LSH": HashSparse(nb=BUCKETS, seed=seed, **BOTH),
        "LSH, centred": Centred(nb=BUCKETS, seed=seed, **BOTH),
        "k-means": HashSparse(nb=BUCKETS, buckets="kmeans", **BOTH),
        "k-means, 4 of 64": HashSparse(nb=4 * BUCKETS, buckets="kmeans", top=4, **BOTH),
        "k-means, 4 of 64 by mass": ByMass(nb=4 * BUCKETS, buckets="kmeans", top=4, **BOTH),
        "k-means, 4 of 64 of the first quarter": Early(nb=4 * BUCKETS, buckets="kmeans", top=4, **BOTH),
        "largest scores": Oracle(keys=T // (2 * BUCKETS), window=WINDOW, sink_tokens=SINKS),
        "window without the first tokens": SinkWindow(window=WINDOW, sink_tokens=0),
        "k-means without the first tokens": HashSparse(nb=BUCKETS, buckets="kmeans", window=WINDOW),
    }


CASES = tuple(contenders(4096))
TUNED = ("dense", "window", "random buckets", "LSH, centred", "k-means, 4 of 64")
"""Those that are fine-tuned, by default."""
METHODS = (
    "LSH",
    "LSH, centred",
    "k-means",
    "k-means, 4 of 64",
    "k-means, 4 of 64 by mass",
    "k-means, 4 of 64 of the first quarter",
)
"""Those that have to keep the gain."""


@dataclasses.dataclass
class Subject:
    """A causal language model, with what has been read of texts so far."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str = "smollm2", dtype: torch.dtype = torch.bfloat16) -> Subject:
        """SmolLM2, from the packages of `make models`."""
        return cls(*sf.transformers.load(name, dtype=dtype))

    def tokens(self, text: str, begin: float, length: int) -> Tensor:
        """So many tokens of a text, from a share of it on: int64 [1, length]."""
        characters = text[int(begin * len(text)) :][: 8 * length]
        found = self.tokenizer(characters, return_tensors="pt").input_ids[:, :length]
        if found.shape[1] < length:
            raise sf.SparseFlashError(f"length={length}: the text has {found.shape[1]} tokens from there on")
        return found

    def hidden(self, tokens: Tensor, method: Method | None, watch: Watch | None = None) -> Tensor:
        """What the language head reads of each token, `[T, width]`."""
        with torch.no_grad(), exchanged(self.model, method, watch):
            return self.model.model(tokens, use_cache=False).last_hidden_state[0]


@contextmanager
def exchanged(model: Any, method: Method | None, watch: Watch | None = None) -> Iterator[None]:
    """The model with a method in every layer, each with a seed of its own; `watch` hears of the plans."""
    choice: Any = method
    seeded: Any = method
    if any(field.name == "seed" for field in dataclasses.fields(method or SinkWindow)):
        seed = 1009 * getattr(method, "seed", 0)
        layers = range(model.config.num_hidden_layers)
        choice = {n: dataclasses.replace(seeded, seed=seed + n) for n in layers}
    with ExitStack() as inside:
        inside.enter_context(sf.transformers.sparse(model, prefill=choice))
        if watch is not None and method is not None:
            layers_ = sf.transformers.attention_layers(model)
            own = [dataclasses.replace(getattr(x.module, SETTING), watch=watch) for x in layers_]
            inside.enter_context(attached(layers_, own))
        yield


def logits(model: Any, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Log-probabilities of a few tokens at a time, fp32, and where these begin."""
    for at in range(0, len(hidden), CHUNK):
        yield at, model.lm_head(hidden[at : at + CHUNK]).float().log_softmax(-1)


@torch.no_grad()
def losses(model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Nats of each next token, `[T - 1]`."""
    found = []
    for at, said in logits(model, hidden):
        wanted = tokens[0, at + 1 : at + 1 + len(said)]
        found.append(F.nll_loss(said[: len(wanted)], wanted, reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def divergence(model: Any, dense: Tensor, other: Tensor) -> Tensor:
    """KL of the next token after dense attention from that after another, nats, `[T]`."""
    pairs = zip(logits(model, dense), logits(model, other), strict=True)
    return torch.cat([F.kl_div(q, p, reduction="none", log_target=True).sum(-1) for (_, p), (_, q) in pairs])


# ---------------------------------------------------------------- without training


def untrained(
    subject: Callable[[], Subject],
    documents: Mapping[str, Mapping[str, str]],
    *,
    lengths: Sequence[int],
    cases: Sequence[str] = CASES,
    seeds: Sequence[int] = (0,),
    begin: float = 0.3,
) -> list[Job]:
    """A row for every text, length, contender and seed (where that matters)."""

    @functools.lru_cache(maxsize=1)
    def dense(kind: str, name: str, T: int) -> tuple[Tensor, Tensor, Tensor]:
        model = subject()
        tokens = model.tokens(documents[kind][name], begin, T)
        return tokens, texts.far(tokens[0]), model.hidden(tokens, None)

    def run(kind: str, name: str, T: int, case: str, seed: int) -> Row:
        tokens, slice_, known = dense(kind, name, T)
        model, method, densities = subject(), contenders(T, seed)[case], list[float]()

        def watch(method: Any, heads: Any, q: Any, k: Any, plans: Any, full: Any) -> None:
            densities.append(density(plans))

        hidden = known if method is None else model.hidden(tokens, method, watch)
        loss, apart = losses(model.model, hidden, tokens), divergence(model.model, known, hidden)[:-1]
        return {
            "density": mean(densities) if method else 1.0,
            "tokens": len(loss), "far_tokens": int(slice_.sum()),
            "loss": float(loss.mean()), "loss_far": float(loss[slice_].mean()),
            "kl": float(apart.mean()), "kl_far": float(apart[slice_].mean()),
        }  # fmt: skip

    jobs = []
    for T, seed, (kind, name) in itertools.product(lengths, seeds, in_turn(documents)):
        for case in cases:
            if seed == seeds[0] or case in SEEDED:
                key: Row = {"bench": "claim-smollm", "text": kind, "name": name, "T": T, "steps": 0}
                at = (kind, name, T, case, seed)
                jobs.append(Job(key | {"case": case, "seed": seed}, functools.partial(run, *at)))
    return jobs


def in_turn(documents: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """Kinds and names, the first of each kind first."""
    named = [[(kind, name) for name in names] for kind, names in documents.items()]
    return [one for some in itertools.zip_longest(*named) for one in some if one is not None]


# ---------------------------------------------------------------- the figures


def kept(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Means over the texts of a kind, and the share of dense attention's far gain that each contender keeps.

    Only texts that a contender shares with dense and the window count, for all three.
    """
    found = []
    for kind, T, steps in dict.fromkeys((x["text"], str(x["T"]), str(x["steps"])) for x in rows):
        group = [x for x in rows if (x["text"], str(x["T"]), str(x["steps"])) == (kind, T, steps)]
        of = {case: _by_name(group, case) for case in dict.fromkeys(x["case"] for x in group)}
        base = of.get("dense", {}).keys() & of.get("window", {}).keys()
        for case, own in of.items():
            shared = sorted(base & own.keys())
            row: Row = {"text": kind, "T": T, "steps": steps, "case": case, "texts": len(shared)}
            for name in ("density", "loss", "loss_far", "kl", "kl_far"):
                row[name] = mean([x for text in shared for x in numbers(own[text], name)])
            for name in ("loss", "loss_far"):
                dense, window, mine = (
                    mean([mean(numbers(x[text], name)) for text in shared])
                    for x in (of.get("dense", {}), of.get("window", {}), own)
                )
                gain = window - dense
                row[name.replace("loss", "gain")] = gain / window if gain == gain else gain
                row[name.replace("loss", "kept")] = (window - mine) / gain if gain else float("nan")
            found.append(row)
    return found


def _by_name(rows: Sequence[Mapping[str, Any]], case: str) -> dict[str, list[Mapping[str, Any]]]:
    own: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["case"] == case:
            own.setdefault(row["name"], []).append(row)
    return own


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the figures say: a sentence for each kind of text, length, number of steps and slice."""
    table, said = kept(rows), []
    for kind, T, steps in dict.fromkeys((x["text"], x["T"], x["steps"]) for x in table):
        group = {x["case"]: x for x in table if (x["text"], x["T"], x["steps"]) == (kind, T, steps)}
        at = f"{kind}, {T} tokens, " + (f"{steps} steps" if steps != "0" else "without training")
        for name, least, what in (("", GAIN, "all tokens"), ("_far", GAIN_FAR, "the far slice")):
            said.append(f"{at}, {what}: {judged(group, name, least)}")
    return said


def judged(group: Mapping[str, Mapping[str, Any]], name: str, least: float) -> str:
    """One test by its own rules; `name` is that of the slice."""
    named = [x for x in METHODS if x in group and float(group[x]["density"]) <= PAIRS]
    methods = {x: float(group[x][f"kept{name}"]) for x in named}
    if not methods or not {"dense", "window", "random buckets"} <= group.keys():
        return "dense, window, random buckets and a method are not all there"
    gain, chance = (
        float(group[x][f"{y}{name}"]) for x, y in (("window", "gain"), ("random buckets", "kept"))
    )
    best = max(methods, key=lambda x: methods[x])
    found = f"{best} keeps {methods[best]:.1%} of the far gain, random buckets {chance:.1%}"
    if not gain > least:
        return f"no test, dense gains {gain:.1%} over the window and it takes {least:.0%}"
    if not methods[best] > max(0.0, 3 * chance):
        return f"{found}: no credit to the choice"
    return f"{found}: " + (
        "holds" if methods[best] >= GOAL else f"above chance, below the goal of {GOAL:.0%}"
    )
