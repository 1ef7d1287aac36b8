"""Sparsifiner on small images: learned links between tokens, fewer tokens, and what both save of a model.

`links`: a ViT is trained dense; a predictor then learns its attention, and nothing else is trained. Accuracy
with a quarter of the links: those of the attention itself ("oracle"), the predicted ones, and as many at
random. `recall` is the share of dense attention mass on them, mean over layers.

`tokens`: the same model fine-tuned with links and with tokens left out by the attention of CLS, both at once,
and with either drawn at random. `mflops` counts everything that is multiplied and added for one image, the
predictor and the choice of tokens too; `fewer` is how much less that is than in the dense model.

`plan`: what the plan of an image costs at ViT sizes, from a mask and from lists of keys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.nn.sparsifiner import SparsifinerAttention

CHOICES = ("dense", "learned", "oracle", "random")
DROPS: Mapping[int, float] = {1: 0.35, 3: 0.2}
"""Share of the patches that a layer and those above it still have."""


class Links(SparsifinerAttention):
    """The layer, with other choices of links for comparison."""

    choice = "learned"
    recall = 0.0

    def predicted(self, q: Tensor, k: Tensor) -> Tensor:
        """Predicted attention, the attention itself, or random numbers."""
        if self.choice == "learned" or self.phase == "reconstruct":
            guess = super().predicted(q, k)
        else:
            guess = self.dense(q, k) if self.choice == "oracle" else torch.rand_like(self.dense(q, k))
        if not self.training:
            kept = self._mask(guess, q.shape[2])[:, :, 1:]
            self.recall = float((self.dense(q, k) * kept).sum(-1).mean())
        return guess

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention of all queries except CLS."""
        return (q[:, :, 1:] @ k.mT * self.head_dim**-0.5).softmax(-1)


class ViT(nn.Module):
    """A small vision transformer: patches, a class token, learned positions, pre-norm blocks."""

    def __init__(
        self,
        pixels: int,
        patch: int,
        *,
        classes: int,
        width: int,
        heads: int,
        layers: int,
        keep: float,
        mixtures: int | None = None,
    ) -> None:
        super().__init__()
        self.patch, self.side = patch, math.isqrt(pixels)
        tokens = (self.side // patch) ** 2 + 1
        self.embed = nn.Linear(patch * patch, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.attend = nn.ModuleList(
            Links(width, heads, tokens=tokens, keep=keep, weight=0.0, mixtures=mixtures)
            for _ in range(layers)
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, classes)
        self.drops: Mapping[int, float] = {}
        self.at_random = False

    def set(self, choice: str, *, drops: Mapping[int, float] | None = None, at_random: bool = False) -> ViT:
        """Choose links and tokens of the next forwards."""
        for layer in self.links():
            layer.choice, layer.phase = choice, "reconstruct" if choice == "dense" else "sparse"
        self.drops, self.at_random = drops or {}, at_random
        return self

    def links(self) -> list[Links]:
        """The attention layers."""
        return [layer for layer in self.attend if isinstance(layer, Links)]

    def predictor(self) -> list[nn.Parameter]:
        """Weights that predict links, of all layers."""
        parts = ("low_query", "low_key", "mixer", "basis")
        return [weight for name, weight in self.attend.named_parameters() if name.split(".")[1] in parts]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, float [B, pixels]."""
        n = self.side // self.patch
        x = images.view(-1, n, self.patch, n, self.patch).transpose(2, 3).flatten(1, 2).flatten(2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), self.embed(x)], 1) + self.place
        patches, place = n * n, None
        for i, (layer, mlp) in enumerate(zip(self.links(), self.mlp)):
            y = self.norms[2 * i](x)
            if i in self.drops:
                kept = self._best(layer, y, round(self.drops[i] * patches))
                place = kept if place is None else place.gather(1, kept)
                at = F.pad(kept + 1, (1, 0))[..., None].expand(-1, -1, x.shape[-1])
                x, y = x.gather(1, at), y.gather(1, at)
            layer.places = None if place is None else F.pad(place + 1, (1, 0))
            x = x + layer(y)
            x = x + mlp(self.norms[2 * i + 1](x))
        found: Tensor = self.head(self.norms[-1](x[:, 0]))
        return found

    def _best(self, layer: Links, y: Tensor, count: int) -> Tensor:
        """The patches that CLS attends to most, mean over heads, in order: int64 [B, count]."""
        q, k = layer.split(layer.query(y[:, :1])), layer.split(layer.key(y))
        score = (q @ k.mT * layer.head_dim**-0.5).softmax(-1)[:, :, 0, 1:].mean(1).detach()
        score = torch.rand_like(score) if self.at_random else score
        return score.topk(count, -1).indices.sort(-1).values

    def flops(self) -> float:
        """Additions and multiplications for one image, as the links and tokens of now are set."""
        patches, total = len(self.place) - 1, 2 * (len(self.place) - 1) * self.embed.weight.numel()
        width, n = len(self.cls), patches + 1
        for i, layer in enumerate(self.links()):
            if i in self.drops:
                total += 0 if self.at_random else 2 * width * (width + n * width + n)
                n = round(self.drops[i] * patches) + 1
            pairs = n * n if layer.phase == "reconstruct" else n + (n - 1) * layer.budget(n)
            total += 8 * n * width * width + 4 * pairs * width + 16 * n * width * width
            if layer.phase == "sparse" and layer.choice == "learned":
                c, m = layer.low_query.weight.shape[0], layer.basis.shape[1]
                total += 2 * layer.heads * ((2 * n - 1) * c * (layer.head_dim + m) + (n - 1) * n * m)
        return float(total + 2 * self.head.weight.numel())


def fit(
    model: ViT,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    rate: float,
    weights: Sequence[nn.Parameter] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    on_run: Callable[[str], None] = lambda text: None,
) -> ViT:
    """Train some weights of a model (all by default) on batches of 64 images."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters() if weights is None else weights, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2))
    order = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for step in range(steps):
        batch = torch.randint(len(images), (64,), generator=order)
        cost = loss(model(images[batch]), labels[batch])
        model.zero_grad()
        cost.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            on_run(f"step {step} of {steps}, loss {cost.item():.3f}")
    return model.eval()


@torch.no_grad()
def score(model: ViT, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, mean recall of attention mass, and what one image costs."""
    torch.manual_seed(1)
    right, recall, dense = 0, 0.0, model.links()[0].phase == "reconstruct"
    for some, wanted in zip(images.split(250), labels.split(250)):
        right += int((model(some).argmax(-1) == wanted).sum())
        recall += sum(layer.recall for layer in model.links()) / len(model.links()) * len(some)
    found = {"accuracy": right / len(images), "mflops": model.flops() / 1e6}
    return found if dense else found | {"recall": recall / len(images)}


def split(images: Tensor, labels: Tensor, held: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images to train on, and the last `held` ones."""
    x = images.float() / 255 - 0.13
    return (x[:-held], labels[:-held]), (x[-held:], labels[-held:])


def trained(
    train: tuple[Tensor, Tensor],
    *,
    steps: int,
    width: int,
    layers: int,
    seed: int = 0,
    on_run: Callable[[str], None],
) -> ViT:
    """A model trained with dense attention."""
    torch.manual_seed(seed)
    model = ViT(train[0].shape[1], 4, classes=10, width=width, heads=4, layers=layers, keep=0.25)
    return fit(model.set("dense"), *train, steps=steps, rate=2e-3, on_run=lambda s: on_run(f"dense: {s}"))


def predicting(
    dense: ViT,
    train: tuple[Tensor, Tensor],
    *,
    steps: int,
    mixtures: int | None = None,
    on_run: Callable[[str], None],
) -> ViT:
    """The model with a predictor that has learned its attention; no other weight has changed."""
    torch.manual_seed(0)
    first = dense.links()[0]
    model = ViT(
        train[0].shape[1], dense.patch, classes=10, width=len(dense.cls), heads=first.heads,
        layers=len(dense.attend), keep=first.keep, mixtures=mixtures,
    )  # fmt: skip
    own = {id(weight) for weight in dense.predictor()}
    weights = {name: weight for name, weight in dense.named_parameters() if id(weight) not in own}
    model.load_state_dict(weights, strict=False)
    for layer in model.links():
        layer.weight = 1.0
    fit(
        model.set("dense"), *train, steps=steps, rate=1e-2, weights=model.predictor(),
        loss=lambda logits, labels: sum((layer.aux_loss for layer in model.links()), torch.zeros(())),
        on_run=lambda s: on_run(f"predictor: {s}"),
    )  # fmt: skip
    for layer in model.links():
        layer.weight = 0.0
    return model


MIXTURES = (8, 16)
"""Mixtures of tokens that links are predicted from; 8 is the paper's share of the tokens, a sixth."""


def measure_links(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 600,
    width: int = 64,
    layers: int = 3,
    held: int = 2000,
    seeds: Sequence[int] = (0, 1, 2),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Links alone: accuracy of a dense model that attends to some, not trained on it. Held images judge."""
    train, test = split(images, labels, held)
    for seed in seeds:

        def say(text: str, seed: int = seed) -> None:
            on_run(f"seed {seed}, {text}")

        dense = trained(train, steps=steps, width=width, layers=layers, seed=seed, on_run=say)
        told: Row = {"T": len(dense.place), "layers": layers, "width": width, "steps": steps, "seed": seed}
        cases = {"dense": "dense", "oracle": "oracle", "random": "random", "untrained predictor": "learned"}
        for case, choice in cases.items():
            yield told | {"what": "links", "case": case, **score(dense.set(choice), *test)}
        for mixtures in MIXTURES:
            model = predicting(dense, train, steps=steps, mixtures=mixtures, on_run=say)
            found = score(model.set("learned"), *test)
            yield told | {"what": "links", "case": f"learned, {mixtures} mixtures", **found}


def measure_tokens(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 600,
    width: int = 64,
    layers: int = 6,
    held: int = 2000,
    drops: Mapping[int, float] = DROPS,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Links and fewer tokens, after fine-tuning with them, beside either drawn at random."""
    train, test = split(images, labels, held)
    model = trained(train, steps=steps, width=width, layers=layers, on_run=on_run)
    model = predicting(model, train, steps=steps, on_run=on_run)
    told: Row = {"T": len(model.place), "layers": layers, "width": width, "steps": steps, "seed": 0}
    dense: dict[str, float] = {}
    tuned: dict[str, dict[str, Any]] = {
        "dense": {"choice": "dense"},
        "links": {"choice": "learned"},
        "tokens": {"choice": "dense", "drops": drops},
        "links and tokens": {"choice": "learned", "drops": drops},
        "random links, tokens": {"choice": "random", "drops": drops},
        "links, random tokens": {"choice": "learned", "drops": drops, "at_random": True},
        "random links, random tokens": {"choice": "random", "drops": drops, "at_random": True},
    }
    for case, how in tuned.items():
        own = copy.deepcopy(model).set(**how)
        fit(own, *train, steps=steps, rate=1e-3, on_run=lambda s, case=case: on_run(f"{case}: {s}"))
        found = score(own, *test)
        dense = dense or found
        yield told | {
            "what": "tokens", "case": case, **found, "fewer": 1 - found["mflops"] / dense["mflops"],
            "points": 100 * (found["accuracy"] - dense["accuracy"]),
        }  # fmt: skip


def measure_plan(box: Box, on_run: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """Milliseconds of plans for 197 tokens and 6 heads, with a quarter of the links, and of attending."""
    for images in (4, 32):
        on_run(f"{images} images of 197 tokens")
        layer = SparsifinerAttention(384, 6, tokens=197)
        guess = torch.rand(images, 6, 196, 197, generator=torch.Generator().manual_seed(0))
        mask = layer._mask(guess, 197)
        index = sf.selection.budgets.top_indices(guess, layer.budget(197))
        q, k, v = torch.randn(3, images, 6, 197, 64, generator=torch.Generator().manual_seed(0))
        plan = sf.Plan.from_mask(mask)
        runs = {
            "choose": lambda layer=layer, guess=guess: layer._mask(guess, 197),
            "mask": lambda mask=mask: sf.Plan.from_mask(mask),
            "lists": lambda index=index: sf.Plan.from_choice(index, Tk=197, causal=False, unique=True),
            "attend": lambda q=q, k=k, v=v, plan=plan: sf.attention(q, k, v, plan),
            "dense": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        }
        ms = {name: timing.median * 1e3 for name, timing in interleave(runs, rounds=15, box=box).items()}
        yield {
            "what": "plan", "case": f"{images} images", "T": 197, "density": plan.kept,
            "ms_choose": ms["choose"], "ms_mask": ms["mask"], "ms_lists": ms["lists"],
            "ms": ms["attend"], "ms_dense": ms["dense"],
        }  # fmt: skip
