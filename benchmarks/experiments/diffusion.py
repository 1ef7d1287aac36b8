"""Methods for diffusion: planted heads, a masked-diffusion language model, time.

`planted`: heads whose pattern is known, on a grid of a video. Beside what each method keeps of the attention
mass (`recall`) stand two choices of the same density: blocks drawn at random, and a window. What keeps no
more than they do has found nothing.

`orders`: the same heads in raster order and in the axis order that PAROAttention finds: the share of blocks
that are empty (less than a hundredth of the mass of a mean block), and the relative error of attention
with q, k, v and weights rounded to INT8 and INT4, groups of rows taken in that order. Values are as loud as
their kind: in a head that looks at its place in all frames, some places are.

`masked`: the model of `sparseflash train --objective masked`, trained here; text of the held-out part is
generated once with dense attention. Each case attends to its own blocks for one step along that trajectory:
`kl` is the divergence of its prediction from the dense one, mean over the bytes that are still masked. The
text itself is no measure: greedy choices part ways at the first difference.

`time`: one layer over `steps` steps, the search among them, against dense attention of ours, times `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash import methods
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, interleave
from sparseflash.methods.base import Method
from sparseflash.methods.sparse_vdit import MODES, judge
from sparseflash.train import GPT, Corpus, TrainConfig, Trainer
from sparseflash.train.masked import denoise
from sparseflash.train.model import MASK

# ---------------------------------------------------------------- planted heads


def planted(grid: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that look near, at their place in all frames, at columns, and at what is alike: [1,4,T,32]."""
    token, size = torch.arange(math.prod(grid)), grid[1] * grid[2]
    groups = torch.randperm(len(token) // 64, generator=generator) % 8
    kinds = [token // 64, token % size // 2, groups.repeat_interleave(64)]
    q, k = [], []
    for kind in kinds:
        names = F.normalize(torch.randn(int(kind.max()) + 1, 32, generator=generator), dim=-1)
        q.append(70 * names[kind] + torch.randn(len(token), 32, generator=generator))
        k.append(names[kind] + 0.1 * torch.randn(len(token), 32, generator=generator))
    mark = F.normalize(torch.randn(32, generator=generator), dim=-1)
    q.append(60 * mark + torch.randn(len(token), 32, generator=generator))
    k.append(mark * (token // 64 % 8 == 3)[:, None] + 0.1 * torch.randn(len(token), 32, generator=generator))
    order = [0, 1, 3, 2]
    stacked = (torch.stack([x[n] for n in order])[None] for x in (q, k))
    return (*stacked, torch.randn(1, 4, len(token), 32, generator=generator))


HEADS = ("near", "place", "columns", "alike")


def found_profile(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...]) -> sf.calibrate.Profile:
    """A mode for each planted head."""
    candidates = [{"method": "sparse-vdit", "mode": mode, "reach": 1, "stripes": 4} for mode in MODES]
    score = judge({0: [(q, k, v, {"grid": grid})]}, weight=0.05, bound=0.2)
    return sf.calibrate.search("planted", [0], candidates, score, progress=False)


def controls(plan: sf.Plan, q: Tensor, block: int = 64) -> dict[str, sf.Plan]:
    """Blocks drawn at random, and a window, of the density of a plan."""
    T, wanted = q.shape[2], plan.kept
    grid = sf.selection.Grid(T, T, block, block, causal=False)
    draw = torch.rand(1, q.shape[1], grid.tiles, grid.units, generator=torch.Generator().manual_seed(0))
    return {"random": grid.plan(draw < wanted), "window": window_of(T, wanted)}


def window_of(T: int, wanted: float) -> sf.Plan:
    """The window to both sides whose density over T tokens comes next to the one that is wanted."""
    width = next(w for w in range(1, T + 1) if ((2 * w - 1) * T - w * (w - 1)) / T**2 >= wanted or w == T)
    return sf.Plan.dense(T, T, window=(width - 1,) * 2)


def measure_planted(grid: tuple[int, int, int] = (8, 16, 16)) -> Iterator[Row]:
    """A row for each method and head."""
    q, k, v = planted(grid, torch.Generator().manual_seed(0))
    dense = sf.Plan.dense(q.shape[2], q.shape[2])
    tried: dict[str, Method] = {
        "sparsed": methods.SparseD(0.1, block=64),
        "adaspa": methods.AdaSpa(0.875),
        "adaspa, levels alike": methods.AdaSpa(0.875, adaptive=False),
        "paro-attention": methods.PAROAttention(0.125),
        "sliding-tile": methods.SlidingTile(tile=(2, 4, 8), window=(2, 2, 2)),
        "efficient-vdit": methods.EfficientVDiT(1),
        "sparse-vdit": methods.Profiled(found_profile(q, k, v, grid)),
    }
    for case, method in tried.items():
        plan = method.select(q, k, {"layer": 0, "grid": grid}).plan
        assert isinstance(plan, sf.Plan)
        kept = sf.recall(q, k, plan, dense=dense).mean((0, 2))
        others = {
            name: sf.recall(q, k, other, dense=dense).mean((0, 2))
            for name, other in controls(plan, q).items()
        }
        share = plan.to_dense().double().mean((0, 2, 3)).expand(len(HEADS))
        for h, head in enumerate(HEADS):
            about: Row = {
                "what": "planted",
                "case": case,
                "head": head,
                "T": q.shape[2],
                "method": repr(method),
            }
            if isinstance(method, methods.Profiled) and method.profile is not None:
                about["method"] = repr(method.profile.heads(0)[h])
            figures = {"density": float(share[h]), "recall": float(kept[h])}
            yield about | figures | {f"recall_{name}": float(x[h]) for name, x in others.items()}


def empty(q: Tensor, k: Tensor, order: Tensor, block: int = 64) -> Tensor:
    """The share of blocks that are empty in an order [H,T], per head."""
    T, at = q.shape[2], order[None, :, :, None]
    x, y = (z.take_along_dim(at, 2) for z in (q, k))
    weights = (x @ y.mT * q.shape[3] ** -0.5).softmax(-1)
    mass = weights.view(*q.shape[:2], T // block, block, T // block, block).sum((3, 5))
    return (mass < 0.01 * mass.mean((2, 3), keepdim=True)).double().mean((0, 2, 3))


def measure_orders(grid: tuple[int, int, int] = (8, 16, 16)) -> Iterator[Row]:
    """A row for each planted head."""
    g = torch.Generator().manual_seed(0)
    q, k, v = planted(grid, g)
    T, size = q.shape[2], grid[1] * grid[2]
    token = torch.arange(T)
    for h, kind in enumerate((token // 64, token % size // 2, token % grid[2], token // 64 % 8)):
        v[:, h] *= torch.randn(int(kind.max()) + 1, generator=g).exp()[kind][:, None]
    method = methods.PAROAttention()
    chosen = method.select(q, k, {"grid": grid}).plan
    assert isinstance(chosen, sf.Plan) and chosen.q_order is not None
    orders = {"raster": token.expand(len(HEADS), T), "found": chosen.q_order.long().expand(1, -1, -1)[0]}
    truth = sf.attention(q, k, v)
    figures: dict[str, Tensor] = {}
    for name, order in orders.items():
        every = torch.ones(1, len(HEADS), -(-T // 64), -(-T // 64), dtype=torch.bool)
        given = {"q_order": order[None], "k_order": order[None]}
        plan = sf.Plan.from_blocks(every, Tq=T, Tk=T, tile=64, unit=64, **given)
        figures[f"empty_{name}"] = empty(q, k, order)
        for bits in (8, 4):
            out = sf.attention_quantised(q, k, v, plan, qk_bits=bits, pv_bits=bits)
            figures[f"int{bits}_{name}"] = ((out - truth).norm(dim=(2, 3)) / truth.norm(dim=(2, 3)))[0]
    for h, head in enumerate(HEADS):
        about: Row = {
            "what": "orders",
            "case": "paro-attention",
            "head": head,
            "T": T,
            "method": repr(method),
        }
        yield about | {name: float(x[h]) for name, x in figures.items()}


# ---------------------------------------------------------------- a masked-diffusion language model


def learn(corpus: Corpus, steps: int, length: int, on_run: Callable[[str], None]) -> GPT:
    """Train the model of `sparseflash train --objective masked` with dense attention."""
    config = TrainConfig(
        "", length=length, batch=8, steps=steps, layers=4, width=128, heads=4, objective="masked"
    )
    trainer = Trainer(config, corpus)
    for step in range(steps):
        row = trainer.step()
        if step % 20 == 0:
            on_run(f"training: step {step} of {steps}, {row.loss:.2f} nats")
    return trainer.model.eval()


class Run:
    """Attention of one step: a plan for each layer, or one that is found there."""

    def __init__(self, plans: Mapping[int, sf.Plan] | None = None, method: Method | None = None) -> None:
        self.plans, self.method = dict(plans or {}), method

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, and remember the plan."""
        if layer not in self.plans and self.method is not None:
            plan = self.method.select(q, k, self.ctx).plan
            assert isinstance(plan, sf.Plan)
            self.plans[layer] = plan
        return sf.attention(q, k, v, self.plans[layer])

    ctx: dict[str, Any] = {}


def overlap(one: sf.Plan, two: sf.Plan) -> float:
    """The share of the pairs of one that two sees."""
    a, b = one.to_dense(), two.to_dense()
    return float((a & b).sum() / a.sum())


@torch.no_grad()
def measure_masked(
    corpus: Corpus,
    *,
    steps: int = 500,
    length: int = 256,
    denoising: int = 32,
    shares: Sequence[float] = (0.3, 0.5),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Rows of each share and case: reuse, its own blocks, those of step 0, blocks at random."""
    with torch.enable_grad():
        model = learn(corpus, steps, length, on_run)
    prompt, texts = length * 3 // 4, 4
    at = torch.arange(texts) * (len(corpus.val) - length) // texts
    tokens = torch.stack([corpus.val[n : n + length].long() for n in at.tolist()])
    tokens[:, prompt:] = MASK
    trajectory = []
    for step in denoise(model, tokens, steps=denoising):
        on_run(f"generating: step {len(trajectory)} of {denoising}")
        trajectory.append(step)
    for share in shares:
        method = methods.SparseD(share, block=16)
        first = method.first(denoising)

        def found(step: int, method: Method = method) -> Run:
            run = Run(method=method)
            run.ctx = {"generated": length - prompt}
            model(trajectory[step].given, attend=run)
            return run

        def drawn(like: Mapping[int, sf.Plan], step: int) -> Run:
            grid = sf.selection.Grid(length, length, 16, 16, causal=False)
            draw = torch.rand(texts, 4, grid.tiles, grid.units, generator=torch.Generator().manual_seed(step))
            count = {n: round(plan.kept * grid.units) for n, plan in like.items()}
            return Run({n: grid.plan(sf.selection.top_k(draw, count[n])) for n in like})

        reused, early = found(first), found(0)
        near = {n: window_of(length, plan.kept) for n, plan in reused.plans.items()}
        kls: dict[str, list[float]] = {}
        overlaps: dict[int, float] = {}
        for step in range(first + 1, len(trajectory)):
            on_run(f"select {share}: step {step} of {denoising}")
            given, want, _ = trajectory[step]
            own = found(step)
            runs = {"reuse": Run(reused.plans), "own": Run(own.plans), "first": Run(early.plans)}
            runs |= {"random": drawn(reused.plans, step), "window": Run(near)}
            masked = given == MASK
            overlaps[step] = sum(overlap(own.plans[n], reused.plans[n]) for n in own.plans) / len(own.plans)
            for name, run in runs.items():
                log = model(given, attend=run).log_softmax(-1)
                divergence = (want.softmax(-1) * (want.log_softmax(-1) - log)).sum(-1)
                kls.setdefault(name, []).append(float(divergence[masked].mean()))
        heads = [overlap_heads(plan) for plan in reused.plans.values()]
        shape: Row = {"what": "masked", "T": length, "steps": denoising, "share": share}
        shape |= {"density": sum(p.kept for p in reused.plans.values()) / len(reused.plans)}
        shape |= {"overlap_next": overlaps[first + 1], "overlap_last": overlaps[max(overlaps)]}
        shape |= {"overlap_heads": sum(heads) / len(heads)}
        for name, row in kls.items():
            yield shape | {"case": name, "kl": sum(row) / len(row), "method": repr(method)}


def overlap_heads(plan: sf.Plan) -> float:
    """The share of the pairs of head 0 that head 1 sees."""
    mask = plan.to_dense()
    return float((mask[:, 0] & mask[:, 1]).sum() / mask[:, 0].sum())


# ---------------------------------------------------------------- time


def measure_time(
    lengths: Sequence[int],
    *,
    steps: int = 32,
    heads: int = 4,
    rounds: int = 3,
    minutes: float = 5.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Dense attention, the search, a sparse step, and what a generation gains; frames of efficient-vdit."""
    box = Box(minutes * 60)
    for T in lengths:
        q, k, v = torch.randn(3, 1, heads, T, 64, generator=torch.Generator().manual_seed(0))
        method = methods.SparseD(0.28, block=128)
        whole = sf.Plan.dense(T, T)
        _, lse = sf.attention(q, k, v, whole, return_lse=True)
        pattern = method.pattern(q, k, lse, {})
        on_run(f"{T} tokens")
        runs = {
            "dense": lambda q=q, k=k, v=v, whole=whole: sf.attention(q, k, v, whole),
            "search": lambda q=q, k=k, lse=lse, method=method: method.pattern(q, k, lse, {}),
            "step": lambda q=q, k=k, v=v, plan=pattern.plan: sf.attention(q, k, v, plan),
        }
        ms = {name: timing.median * 1e3 for name, timing in interleave(runs, rounds=rounds, box=box).items()}
        first = method.first(steps) + 1
        spent = first * ms["dense"] + ms["search"] + (steps - first) * ms["step"]
        yield {
            "what": "time", "case": "sparsed", "T": T, "steps": steps, "density": pattern.plan.kept,
            "ms_dense": ms["dense"], "ms_search": ms["search"], "ms_step": ms["step"],
            "gain_step": ms["dense"] / ms["step"], "gain": steps * ms["dense"] / spent,
            "method": repr(method),
        }  # fmt: skip
    points = []
    for frames in (4, 8, 16, 32):
        T = frames * 256
        q, k, v = torch.randn(3, 1, heads, T, 64, generator=torch.Generator().manual_seed(0))
        tiled = methods.EfficientVDiT(2, grid=(frames, 16, 16))
        plan = tiled.select(q, k).plan
        on_run(f"{frames} frames")
        run = {"run": lambda q=q, k=k, v=v, plan=plan: sf.attention(q, k, v, plan)}
        points.append((frames, interleave(run, rounds=rounds + 2, box=box)["run"].median * 1e3))
    x, y = torch.tensor(points, dtype=torch.float64).unbind(-1)
    design = torch.stack([x, torch.ones_like(x)], -1)
    left = y - design @ torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    fit = 1 - float(left.square().sum() / (y - y.mean()).square().sum())
    for frames, ms_ in points:
        shape: Row = {"what": "time", "case": "efficient-vdit", "T": frames * 256, "frames": frames}
        yield shape | {"ms_step": ms_, "r2_linear": fit, "method": "EfficientVDiT(references=2)"}


def measure(
    corpus: Corpus,
    *,
    parts: Sequence[str] = ("planted", "orders", "masked", "time"),
    lengths: Sequence[int] = (4096, 8192, 16384),
    steps: int = 500,
    minutes: float = 5.0,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """All parts that are asked for."""
    if "planted" in parts:
        on_run("planted heads")
        yield from measure_planted()
    if "orders" in parts:
        on_run("orders of planted heads")
        yield from measure_orders()
    if "masked" in parts:
        yield from measure_masked(corpus, steps=steps, on_run=on_run)
    if "time" in parts:
        yield from measure_time(lengths, minutes=minutes, on_run=on_run)
