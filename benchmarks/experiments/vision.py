"""Tables and images: neighbours that a window finds, patches of any image, time over features and pixels.

`orion`: rows of 32 binary features; are there two ones side by side? A small model with the mask of
Orion-MSP, with the mask that its released code computes (no window), and dense, at equal steps.

`links`, `tokens` and `plan` (Sparsifiner) are in `links.py`.

`hrsam`: the output at a patch of images of 512 to 4096 pixels (patches of 16, no scan), and time
per image against dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.common.errors import SparseFlashError
from sparseflash.methods import OrionMSP

from . import links

FEATURES = 32


def rows_of(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features [count, 32], and whether two neighbours are 1; about as many with as without."""
    x = (torch.rand(count, FEATURES, generator=generator) < 0.13).long()
    return x, (x[:, 1:] & x[:, :-1]).any(1).long()


class Reader(nn.Module):
    """Special tokens and features through two layers; features know no position but by whom they see."""

    def __init__(self, plan: sf.Plan, width: int = 64, heads: int = 4, special: int = 4) -> None:
        super().__init__()
        self.plan = plan
        self.value, self.names = nn.Embedding(2, width), nn.Parameter(torch.randn(special, width))
        self.layers = nn.ModuleList(sf.nn.SelfAttention(width, heads, positions="none") for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 2]."""
        y = torch.cat([self.names.expand(len(x), -1, -1), self.value(x)], 1)
        for layer, mlp in zip(self.layers, self.mlps):
            y = y + layer(F.layer_norm(y, y.shape[-1:]), plan=self.plan)
            y = y + mlp(F.layer_norm(y, y.shape[-1:]))
        found: Tensor = self.head(y[:, 0])
        return found


def measure_orion(steps: int, on_run: Callable[[str], None]) -> Iterator[Row]:
    """Accuracy after equal steps."""
    T = FEATURES + 4
    x = torch.zeros(1, 4, T, 16)
    cases = {
        "window": OrionMSP(4, 1, 0),
        "windowless": OrionMSP(4, 1, 0, windowless=True),
        "links at random, as many": OrionMSP(4, 0, 2),
        "dense": OrionMSP(4, T, 0),
    }
    held = rows_of(2000, torch.Generator().manual_seed(1))
    for case, method in cases.items():
        torch.manual_seed(0)
        plan = method.select(x, x).plan
        assert isinstance(plan, sf.Plan)
        model = Reader(plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            features, label = rows_of(128, generator)
            loss = F.cross_entropy(model(features), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                on_run(f"{case}: step {step} of {steps}, {loss.item():.2f} nats")
        with torch.no_grad():
            right = float((model(held[0]).argmax(-1) == held[1]).float().mean())
        base = float(held[1].float().mean())
        yield {
            "what": "orion", "case": case, "T": T, "steps": steps, "density": plan.kept, "accuracy": right,
            "base_rate": max(base, 1 - base), "method": repr(method),
        }  # fmt: skip


def measure_wide(features: Sequence[int], box: Box, on_run: Callable[[str], None]) -> Iterator[Row]:
    """Time over the number of features, 4 heads, one row."""
    for T in features:
        on_run(f"{T} features")
        q, k, v = torch.randn(3, 1, 4, T, 32, generator=torch.Generator().manual_seed(0))
        method = OrionMSP()
        chosen = method.select(q, k)
        whole = sf.Plan.dense(T, T)
        runs = {
            "sparse": lambda q=q, k=k, v=v, m=method, s=chosen: m(q, k, v, selection=s),
            "dense": lambda q=q, k=k, v=v, whole=whole: sf.attention(q, k, v, whole),
        }
        ms = {name: timing.median * 1e3 for name, timing in interleave(runs, rounds=7, box=box).items()}
        yield {
            "what": "features", "case": "orion", "T": T, "ms": ms["sparse"], "ms_dense": ms["dense"],
            "gain": ms["dense"] / ms["sparse"], "method": repr(method),
        }  # fmt: skip


def sam_layer(side: int, width: int, heads: int) -> nn.Module:
    """A layer of SAM's image encoder that attends to the whole image (Transformers), random weights."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionLayer

    config = SamVisionConfig(
        hidden_size=width, num_attention_heads=heads, mlp_dim=4 * width, image_size=16 * side,
        attn_implementation="sdpa",
    )  # fmt: skip
    layer: nn.Module = SamVisionLayer(config, window_size=0).eval()
    return layer


@torch.no_grad()
def measure_hrsam(pixels: Sequence[int], box: Box, on_run: Callable[[str], None]) -> Iterator[Row]:
    """Equal outputs at the same patch, and time against dense attention over the whole image."""
    width, heads = 192, 3
    torch.manual_seed(0)
    blocks = sf.nn.HRSAMBlocks(width, heads, 1, scans=()).eval()
    side = max(pixels) // 16
    image = torch.randn(1, side, side, width, generator=torch.Generator().manual_seed(0))
    known: Tensor | None = None
    for n in sorted(p // 16 for p in pixels):
        on_run(f"{16 * n} pixels")
        x = image[:, :n, :n].reshape(1, n * n, width)
        patch = blocks(x, grid=(n, n)).view(1, n, n, width)[:, :16, :16]
        known = patch if known is None else known
        q = torch.randn(1, heads, n * n, width // heads)
        whole = sf.Plan.dense(n * n, n * n)
        layer = blocks.blocks[0]
        runs = {"window": lambda layer=layer, x=x: layer(x)}
        if n * n <= 4096:
            runs["dense"] = lambda q=q, whole=whole: sf.attention(q, q, q, whole)
            stock = sam_layer(n, width, heads)
            runs["sam"] = lambda layer=stock, x=x, n=n: layer(x.view(1, n, n, width))
        ms = {name: timing.median * 1e3 for name, timing in interleave(runs, rounds=3, box=box).items()}
        row: Row = {"what": "hrsam", "case": f"{16 * n} pixels", "T": n * n, "ms": ms["window"]}
        row |= {
            "ms_dense": ms.get("dense"),
            "ms_sam": ms.get("sam"),
            "us_per_token": ms["window"] * 1e3 / n**2,
        }
        yield row | {"difference": float((patch - known).abs().max()), "largest": float(known.abs().max())}


def measure(
    *,
    parts: Sequence[str] = ("orion", "features", "hrsam", "plan"),
    images: tuple[Tensor, Tensor] | None = None,
    steps: int = 600,
    features: Sequence[int] = (128, 256, 512, 1024, 2048, 4096),
    pixels: Sequence[int] = (512, 1024, 2048, 4096),
    minutes: float = 3.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """All parts that are asked for."""
    box = Box(minutes * 60)
    if "orion" in parts:
        yield from measure_orion(steps, on_run)
    if "features" in parts:
        yield from measure_wide(features, box, on_run)
    if "hrsam" in parts:
        yield from measure_hrsam(pixels, box, on_run)
    if "plan" in parts:
        yield from links.measure_plan(box, on_run)
    trained = {"links": links.measure_links, "tokens": links.measure_tokens}
    for part, measured in trained.items():
        if part in parts:
            if images is None:
                raise SparseFlashError(
                    f"the part {part} trains on images: give --images and --labels, as of MNIST"
                )
            yield from measured(*images, steps=steps, on_run=on_run)
