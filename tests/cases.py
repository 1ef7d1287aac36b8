"""The table of cases: one row a method, with its full-budget twin; `test_methods.py` runs all of them."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash.bench.needles import KINDS


@dataclass(frozen=True)
class Case:
    """A method at the settings that its tests run.

    Parameters
    ----------
    slug, hyper
        The method, and hyper-parameters at which it is sparse over some hundred tokens.
    full
        Hyper-parameters of the same method that make it dense over up to 256 tokens.
    full_mask
        What dense means there: "causal", "strict" (causal without the self pair) or "all".
    budgets
        Settings in ascending density.
    budget
        Density of `hyper` over 512 tokens of `directions` lies within these two figures.
    needles
        Who may ask for planted needles so that the method finds them: some of `KINDS` ("question", "mid",
        "lone"). Where none is named, the method is blind to content, or its scores to single keys.
    recall
        Least share of these needles' mass that it shows, on average.
    seeking
        Changes of `hyper` for these needles: budgets for 512 tokens of which four are needles.
    among
        The tokens that needles lie among: "real" (of SmolLM2) or "normal".
    slow
        Whether its tests are left to the slow ones: a variant of a method that has another case.
    golden
        CRC-32 of the mask that `hyper` selects on `directions(1, 4, 96)`.
    chunk
        Where a prompt may be cut so that the rest selects what it would have: the edge of a tile.
    """

    slug: str
    hyper: dict[str, Any]
    full: dict[str, Any]
    budgets: list[dict[str, Any]]
    budget: tuple[float, float]
    golden: int
    full_mask: str = "causal"
    needles: tuple[str, ...] = ()
    recall: float = 0.99
    seeking: dict[str, Any] = field(default_factory=dict)
    among: str = "real"
    seeded: bool = False
    slow: bool = False
    chunk: int = 20
    note: str = field(default="", compare=False)

    def method(self, **change: Any):
        """The sparse method."""
        return sf.methods.get(self.slug, **{**self.hyper, **change})

    def __str__(self) -> str:
        return f"{self.slug}{'-' + self.note if self.note else ''}"


WINDOW = {"method": "window", "window": 40}
PROFILE = sf.calibrate.Profile.of(
    "any", {-1: [WINDOW, {"method": "dense"}, {"method": "sink-window", "window": 9}, WINDOW]}
)

CASES = [
    Case(
        "hash-sparse",
        {"nb": 4},
        {"nb": 1},
        [{"nb": 64}, {"nb": 8}, {"nb": 2}, {"nb": 1}],
        (0.15, 0.45),
        424013608,
        needles=KINDS,
        seeded=True,
    ),
    Case(
        "hash-sparse",
        {"nb": 4, "planes": "shared", "include_self": False},
        {"nb": 1, "include_self": False},
        [{"nb": 8}, {"nb": 1}],
        (0.15, 0.45),
        3548177244,
        full_mask="strict",
        needles=KINDS,
        seeded=True,
        note="strict",
    ),
    Case(
        "hash-sparse",
        {"nb": 4, "window_heads": 2, "head_window": 40},
        {"nb": 1, "window_heads": 2, "head_window": 256},
        [{"nb": 8, "head_window": 10}, {"nb": 8, "head_window": 100}, {"nb": 1, "head_window": 512}],
        (0.3, 0.45),
        3156198373,
        seeded=True,
        note="mixed",
    ),
    Case(
        "hash-sparse",
        {"nb": 8, "window": 12},
        {"nb": 1, "window": 12},
        [{"nb": 32, "window": 4}, {"nb": 8}, {"nb": 8, "window": 200}, {"nb": 1, "window": 512}],
        (0.1, 0.4),
        2369375215,
        needles=KINDS,
        seeded=True,
        note="window",
    ),
    Case(
        "hash-sparse",
        {"nb": 8, "buckets": "kmeans", "top": 2},
        {"nb": 2, "buckets": "kmeans", "top": 2},
        [{"top": 1}, {"top": 2}, {"top": 4}],
        (0.1, 0.5),
        31135854,
        needles=KINDS,
        recall=0.7,  # a centroid is the mean of many keys
        slow=True,
        note="kmeans",
    ),
    Case(
        "qk-sparse",
        {"q_drop": 0.3, "k_drop": 0.5},
        {"q_drop": 0.0, "k_drop": 0.0},
        [{"q_drop": 0.9, "k_drop": 0.9}, {"q_drop": 0.5, "k_drop": 0.5}, {"q_drop": 0.5, "k_drop": 0.1}],
        (0.3, 0.4),
        1996611995,
        seeded=True,
    ),
    Case(
        "window",
        {"window": 40},
        {"window": 256},
        [{"window": 1}, {"window": 100}, {"window": 511}],
        (1.0, 1.0),
        1764362868,
    ),
    Case(
        "window",
        {"window": 40, "causal": False},
        {"window": 256, "causal": False},
        [{"window": 1}, {"window": 100}, {"window": 511}],
        (1.0, 1.0),
        129459899,
        full_mask="all",
        note="two-sided",
    ),
    Case(
        "sink-window",
        {"window": 40, "sink_tokens": 3},
        {"window": 256, "sink_tokens": 3},
        [{"window": 1}, {"window": 100}, {"window": 511}],
        (1.0, 1.0),
        3413991746,
    ),
    Case(
        "window",
        {"window": 40, "causal": False, "ahead": 3},
        {"window": 256, "causal": False, "ahead": 256},
        [{"ahead": 0}, {"ahead": 100}, {"window": 200, "ahead": 300}],
        (1.0, 1.0),
        3107830470,
        full_mask="all",
        slow=True,
        note="ahead",
    ),
    Case(
        "dilated",
        {"window": 20, "dilation": 3},
        {"window": 256, "dilation": 1},
        [{"dilation": 100}, {"window": 9}, {"window": 20}, {"window": 50}],
        (0.33, 0.35),
        2834898726,
    ),
    Case(
        "dilated",
        {"window": 10, "dilation": 5, "causal": False},
        {"window": 256, "dilation": 1, "causal": False},
        [{"window": 1}, {"window": 3}, {"window": 90}],
        (0.2, 0.21),
        2719316829,
        full_mask="all",
        slow=True,
        note="two-sided",
    ),
    Case(
        "strided",
        {"block": 16, "local": 2, "stride": 4},
        {"block": 16, "local": 1, "stride": 1},
        [{"stride": 100}, {"stride": 8}, {"stride": 4}, {"stride": 4, "dense_heads": 1}, {"local": 99}],
        (0.3, 0.4),
        2952396430,
    ),
    Case(
        "bigbird",
        {"block": 16, "global_blocks": 1, "random_blocks": 2},
        {"block": 16, "global_blocks": 16},
        [{"random_blocks": 0}, {"random_blocks": 2}, {"random_blocks": 9}, {"global_blocks": 32}],
        (0.2, 0.25),
        4004845234,
        full_mask="all",
        seeded=True,
    ),
    Case(
        "bigbird",
        {"block": 8, "global_blocks": 2, "window_blocks": 2, "random_blocks": 3, "causal": True},
        {"block": 8, "global_blocks": 32, "causal": True},
        [{"random_blocks": 0}, {"random_blocks": 2}, {"random_blocks": 9}, {"global_blocks": 64}],
        (0.2, 0.3),
        132231971,
        seeded=True,
        slow=True,
        note="causal",
    ),
    Case(
        "prefix-lm",
        {"prefix": 40},
        {"prefix": 256},
        [{"prefix": 0}, {"prefix": 40}, {"prefix": 512}],
        (1.0, 1.0),
        2607371042,
        full_mask="all",
    ),
    Case(
        "block-causal",
        {"block": 20},
        {"block": 256},
        [{"block": 1}, {"block": 20}, {"block": 512}],
        (1.0, 1.0),
        4161908862,
        full_mask="all",
    ),
    Case(
        "documents",
        {"length": 60},
        {"length": 256},
        [{"length": 1}, {"length": 60, "window": 30}, {"length": 60}, {"length": 512}],
        (0.1, 0.13),
        1508620368,
    ),
    Case(
        "tree",
        {"branching": 2},
        {"branching": 1},
        [{"branching": 9}, {"branching": 3}, {"branching": 2}, {"branching": 1}],
        (0.03, 0.05),
        1623112131,
    ),
    Case(
        "grid-window",
        {"window": (4, 6), "grid": (-1, 16)},
        {"window": (256, 256), "grid": (-1, 16)},
        [{"window": (1, 2)}, {"window": (3, 4)}, {"window": (20, 9)}, {"window": (99, 99)}],
        (0.03, 0.06),
        2130225077,
        full_mask="all",
    ),
    Case(
        "grid-window",
        {"window": (2, 3, 4), "grid": (-1, 6, 8), "shift": (1, 1, 2), "causal": True},
        {"window": (256, 6, 8), "grid": (-1, 6, 8), "causal": True},
        [{"window": (1, 1, 2)}, {"window": (2, 2, 4)}, {"window": (9, 6, 8), "shift": None}],
        (0.02, 0.04),
        4263135996,
        slow=True,
        note="video",
    ),
    Case(
        "cycle-scan",
        {"window": 40},
        {"window": 256},
        [{"window": 1}, {"window": 100}, {"window": 512}],
        (1.0, 1.0),
        1147172401,
        full_mask="all",
    ),
    Case(
        "reformer",
        {"bucket": 32},
        {"bucket": 256},
        [{"bucket": 16}, {"bucket": 64}, {"bucket": 512}],
        (0.1, 0.3),
        2941150316,
        full_mask="strict",
        needles=KINDS,
        recall=0.5,
        among="normal",  # buckets of real tokens are uneven, and a chunk holds a small part of a large one
        seeded=True,
    ),
    Case(
        "minference",
        {"vertical": 6, "slash": 2, "sinks": 1, "near": 1, "last": 16},
        {"vertical": 256, "slash": 256},
        [{"vertical": 1, "slash": 1}, {"vertical": 6, "slash": 3}, {"vertical": 60, "slash": 10}],
        (0.2, 0.6),
        148553529,
        needles=("question",),
        chunk=64,
    ),
    Case(
        "minference",
        {"pattern": "block-sparse", "blocks": 2},
        {"pattern": "block-sparse", "blocks": 4},
        [{"blocks": 1}, {"blocks": 3}, {"blocks": 8}],
        (0.3, 0.5),
        577544799,
        slow=True,
        chunk=64,
        note="blocks",
    ),
    Case(
        "xattention",
        {"threshold": 0.5, "block": 16},
        {"threshold": 1.0, "block": 16},
        [{"threshold": 0.1}, {"threshold": 0.5}, {"threshold": 1.0}],
        (0.4, 0.7),
        687489843,
        needles=("question",),
        seeking={"dense_tiles": 2},  # its scores find none of these
        chunk=32,
    ),
    Case(
        "flashprefill",
        {"alpha": 0.95, "block": 16, "near": 1, "sinks": 1, "dense_tiles": 1},
        {"near": 16},
        [{"alpha": 1.0}, {"alpha": 0.95}, {"alpha": 1e-9}],
        (0.2, 0.9),
        141649365,
        needles=("question",),
        seeking={"dense_tiles": 2},  # its scores find none of these
        chunk=32,
    ),
    Case(
        "block-topk",
        {"blocks": 2, "block": 16},
        {"blocks": 256, "block": 16},
        [{"blocks": 1}, {"blocks": 4}, {"blocks": 20}],
        (0.15, 0.3),
        3785025735,
        needles=("question",),
        seeking={"dense_tiles": 2},  # its scores find none of these
        chunk=32,
    ),
    Case(
        "tri-shape",
        {"sinks": 16, "window": 32, "last": 16, "block": 16},
        {"window": 256},
        [{"window": 1}, {"window": 64}, {"window": 200}],
        (0.15, 0.3),
        1156311607,
        needles=("question",),
        seeking={"last": 32},
        chunk=32,
    ),
    Case(
        "star-attention",
        {"block": 32, "anchor": 16, "last": 16},
        {"block": 256},
        [{"block": 8, "anchor": 8}, {"block": 32}, {"block": 100}, {"block": 512}],
        (0.1, 0.3),
        2605834654,
        needles=("question",),
        seeking={"last": 32},
        chunk=32,
    ),
    Case(
        "mtraining",
        {"vertical": 6, "slash": 3, "granularity": 16, "last": 16, "sinks": 2, "near": 2},
        {"near": 256, "granularity": 16},
        [{"vertical": 1, "slash": 1}, {"vertical": 6, "slash": 3}, {"vertical": 60, "slash": 10}],
        (0.1, 0.6),
        415383167,
        needles=("question",),
        seeking={"vertical": 40, "slash": 8, "near": 8, "last": 32},
        chunk=64,
    ),
    Case(
        "profiled",
        {"profile": PROFILE},
        {"profile": sf.calibrate.Profile.of("any", {-1: [{"method": "dense"}] * 4})},
        [
            {"profile": sf.calibrate.Profile.of("any", {-1: [WINDOW | {"window": n}] * 4})}
            for n in (9, 90, 500)
        ],
        (0.5, 1.0),
        2102748155,
    ),
    Case(
        "moa",
        {"alpha": 0, "beta": 0.25, "sinks": 4, "least": 16, "block": 8},
        {"beta": 1.0, "sinks": 4},
        [{"beta": 0.1}, {"beta": 0.25}, {"beta": 0.5, "alpha": 64}, {"beta": 1.0}],
        (1.0, 1.0),
        1356642973,
    ),
    Case(
        "last-dense",
        {"method": sf.methods.PBSAttn(threshold=0.3, block=16, segment=32), "rows": 16},
        {"method": sf.methods.Window(window=20), "rows": 256},
        [
            {"method": sf.methods.Window(window=9), "rows": 0},
            {"method": sf.methods.Window(window=9)},
            {"method": sf.methods.Window(window=90)},
            {"method": sf.methods.Window(window=90), "rows": 512},
        ],
        (0.3, 0.6),
        3591541521,
        needles=("question",),
        seeking={"rows": 32},
        chunk=32,
    ),
    Case(
        "flexprefill",
        {"gamma": 0.3, "tau": 0.0, "block": 16, "min_budget": 16},
        {"gamma": 1.0, "block": 16},
        [{"gamma": 0.01}, {"gamma": 0.3}, {"gamma": 0.9}],
        (0.2, 0.6),
        3006148542,
        needles=("question",),
        seeking={"gamma": 0.9, "min_budget": 96},
        chunk=32,
    ),
    Case(
        "flexprefill",
        {"gamma": 0.5, "tau": 1.0, "block": 16, "min_budget": 16, "shared": False},
        {"tau": 1.0, "gamma": 1.0, "block": 16},
        [{"gamma": 0.01}, {"gamma": 0.3}, {"gamma": 0.9}, {"gamma": 1.0}],
        (0.4, 0.8),
        4069555353,
        slow=True,
        chunk=32,
        note="query-aware",
    ),
    Case(
        "pbs-attn",
        {"threshold": 0.3, "block": 16, "segment": 32},
        {"threshold": 1.0, "block": 16, "segment": 32},
        [{"threshold": 0.1}, {"threshold": 0.3}, {"threshold": 0.9}, {"threshold": 1.0}],
        (0.3, 0.6),
        293627203,
        chunk=32,
    ),
    Case(
        "dynamic-mask",
        {"window": 40},
        {"window": 256},
        [{"window": 1}, {"window": 100}, {"window": 511}],
        (0.1, 0.2),
        1764362868,  # without numbers a window
    ),
    Case(
        "anchor-attention",
        {"theta": 0.95, "block": 16, "step": 2},
        {"theta": 1e9, "block": 16, "step": 2},
        [{"theta": -9.0}, {"theta": 0.8}, {"theta": 0.95}, {"theta": 1.1}],
        (0.2, 0.6),
        1903370864,
        needles=KINDS,
        recall=0.95,
        seeking={"theta": 5.0, "block": 4, "step": 8},  # the mean of more queries hides what one asks for
        chunk=32,
    ),
    Case(
        "anchor-attention",
        {"theta": 0.1, "block": 16, "step": 2, "sinks": 2, "anchor": "pooled"},
        {"theta": 1e9, "block": 16, "step": 4, "sinks": 0, "anchor": "pooled"},
        [{"theta": -9.0}, {"theta": 0.0}, {"theta": 0.1}, {"theta": 0.3}],
        (0.1, 0.6),
        3677978720,
        slow=True,
        chunk=32,
        note="pooled",
    ),
    Case(
        "mminference",
        {"strides": (4, 9), "sinks": 2, "near": 5, "last": 16},
        {"near": 256},
        [{"strides": (9,)}, {"strides": (4,)}, {"strides": (3,)}, {"near": 100}],
        (0.1, 0.3),
        2783063129,
        chunk=32,
    ),
    Case(
        "mminference",
        {"pattern": "2d-boundary", "vertical": 6, "slash": 2, "sinks": 1, "near": 1, "last": 16},
        {"pattern": "q-boundary", "vertical": 256},
        [{"vertical": 1, "slash": 1}, {"vertical": 6, "slash": 3}, {"vertical": 60, "slash": 10}],
        (0.2, 0.6),
        148553529,  # as minference: one modality
        needles=("question",),
        seeking={"vertical": 40, "slash": 8, "near": 8, "last": 32},
        slow=True,
        chunk=64,
        note="boundary",
    ),
    Case(
        "blasst",
        {"factor": 60.0},
        {"factor": 1e-30},
        [{}],
        (1.0, 1.0),
        577544799,  # what is selected is everything
        needles=KINDS,
        chunk=64,
    ),
    Case(
        "moba",
        {"budget": 64, "page": 16},
        {"budget": 256, "page": 16},
        [{"budget": 16}, {"budget": 64}, {"budget": 128}, {"budget": 512}],
        (0.2, 0.3),
        1764120189,
        needles=KINDS,
        recall=0.5,
        seeking={"budget": 128, "page": 4},
    ),
    Case(
        "quest",
        {"budget": 64},
        {"budget": 256},
        [{"budget": 16}, {"budget": 64}, {"budget": 128}, {"budget": 512}],
        (0.2, 0.3),
        1596741140,
        needles=KINDS,
        seeking={"share": "", "budget": 128},
    ),
    Case(
        "quest",
        {"budget": 60, "page": 20, "share": "max", "sinks": 1, "near": 2},
        {"budget": 260, "page": 20, "share": "max"},
        [{"budget": 60}, {"budget": 400}],
        (0.1, 0.3),
        2317731495,
        slow=True,
        note="forced",
    ),
    Case(
        "lserve",
        {"budget": 64, "page": 32, "part": 8, "streaming": (1,), "local": 2},
        {"budget": 256, "local": 8},
        [{"budget": 32}, {"budget": 128}, {"budget": 512}],
        (0.15, 0.4),
        2096633823,
        needles=KINDS,
        seeking={"streaming": (), "share": "", "budget": 128, "page": 16, "part": 4},
    ),
    Case(
        "double-sparsity",
        {"budget": 40, "channels": ((0, 2),)},
        {"budget": 256, "channels": ((0, 2),)},
        [{"budget": 10}, {"budget": 100}, {"budget": 512}],
        (0.05, 0.1),
        507769126,
        needles=KINDS,
        seeking={"share": "", "budget": 64, "channels": (tuple(range(64)),)},
    ),
    Case(
        "squeezed-attention",
        {"budget": 12, "context": 40, "clusters": 0.2, "window": 5},
        {"budget": 256, "context": 40},
        [{"budget": 5}, {"budget": 20}, {"budget": 512}],
        (0.5, 1.0),
        1317299812,
        needles=("question",),
        seeking={"context": 400, "budget": 100, "share": "", "window": 50},
    ),
    Case(
        "round-attention",
        {"rounds": (0, 10, 20, 30, 40), "budget": 10},
        {"share": 1.0},
        [{"budget": 5}, {"budget": 20}, {"share": 1.0, "budget": None}],
        (0.5, 1.0),
        3494975964,
    ),
    Case(
        "seer-attention",
        {"blocks": 1, "block": 16, "dense_tiles": 0},
        {"threshold": 0.0, "block": 16},
        [{"blocks": 1}, {"blocks": 4}, {"blocks": 8}, {"blocks": 16}],
        (0.1, 0.25),
        2431409910,
        chunk=16,
    ),
    Case(
        "dual-chunk-attention",
        {},
        {"context": 1024},
        [{}],
        (1.0, 1.0),
        577544799,  # within a chunk all of the past
    ),
    Case(
        "sparsed",
        {"select_share": 0.3, "block": 16},
        {"select_share": 1.0, "block": 16},
        [{"select_share": 0.05}, {"select_share": 0.3}, {"select_share": 1.0}],
        (0.28, 0.35),
        2156803853,
        full_mask="all",
        needles=KINDS,
        seeking={"block": 8},
    ),
    Case(
        "adaspa",
        {"sparsity": 0.7, "block": 16},
        {"sparsity": 0.0},
        [{"sparsity": 0.9}, {"sparsity": 0.7}, {"sparsity": 0.2}, {"sparsity": 0.0}],
        (0.27, 0.33),
        2156803853,
        full_mask="all",
        needles=KINDS,
        seeking={"block": 8},
    ),
    Case(
        "sliding-tile",
        {"tile": (2, 3, 4), "window": (3, 1, 2), "grid": (-1, 6, 8)},
        {"tile": (2, 3, 4), "window": (99, 99, 99), "grid": (-1, 6, 8)},
        [{"window": (1, 1, 1)}, {"window": (3, 1, 2)}, {"window": (99, 99, 99)}],
        (0.2, 0.4),
        3516019878,
        full_mask="all",
    ),
    Case(
        "efficient-vdit",
        {"references": 2, "grid": (-1, 5, 6)},
        {"references": 256, "grid": (-1, 5, 6)},
        [{"references": 1}, {"references": 2}, {"references": 2, "both": True}, {"references": 99}],
        (0.1, 0.2),
        17397195,
        full_mask="all",
    ),
    Case(
        "sparse-vdit",
        {
            "mode": ("stripe", "diagonal", "multi-diagonal", "skip"),
            "reach": 1,
            "stripes": 2,
            "block": 16,
            "grid": (-1, 4, 6),
        },
        {"mode": ("full", "diagonal", "stripe", "multi-diagonal"), "reach": 256, "stripes": 256},
        [{"reach": 0}, {"reach": 2}, {"reach": 4, "stripes": 8}, {"mode": "full"}],
        (0.02, 0.2),
        1095412525,
        full_mask="all",
    ),
    Case(
        "paro-attention",
        {"keep": 0.3, "block": 16, "grid": (-1, 4, 6)},
        {"keep": 1.0, "grid": (-1, 4, 6)},
        [{"keep": 0.05}, {"keep": 0.3}, {"keep": 0.9}, {"keep": 1.0}],
        (0.29, 0.31),
        3443115265,
        full_mask="all",
        needles=KINDS,
        seeking={"block": 8},
    ),
    Case(
        "orion-msp",
        {"special": 2, "window": 4, "random": 2},
        {"window": 256},
        [{"random": 0}, {"random": 2}, {"window": 40}, {"window": 512}],
        (1.0, 1.0),
        3698876035,
        full_mask="all",
        seeded=True,
    ),
]


def directions(B: int, H: int, T: int, D: int = 16, *, shift: int = 0) -> Tensor:
    """Vectors on no lattice whose values no generator, and no rounding, decides: fp32 [B,H,T,D]."""
    number = torch.arange(B * H * T * D, dtype=torch.float64).view(B, H, T, D) + shift
    return torch.sin(number * 12.9898 + 4.1414).mul(43758.5453).frac().float()


def mask_of(plan: sf.Plan | tuple[sf.Plan, ...]) -> Tensor:
    """The mask of a plan, or of the union of several: bool [B, H, Tq, Tk]."""
    plans = (plan,) if isinstance(plan, sf.Plan) else plan
    masks = [p.to_dense() for p in plans]
    heads = max(m.shape[1] for m in masks)
    union = masks[0].repeat_interleave(heads // masks[0].shape[1], 1)
    for m in masks[1:]:
        union = union | m.repeat_interleave(heads // m.shape[1], 1)
    return union


def hash_of(case: Case) -> int:
    """CRC-32 of the mask of a case's plan: integers alone, the same on every machine."""
    mask = mask_of(case.method().select(directions(1, 4, 96), directions(1, 4, 96, shift=7)).plan)
    return zlib.crc32(bytes(mask.expand(1, 4, -1, -1).flatten().to(torch.uint8).tolist()))


def main() -> None:
    """Write the hash of every case anew into this file, and say which changed: make golden."""
    text = Path(__file__).read_text(encoding="utf-8")
    for case in CASES:
        if (found := hash_of(case)) != case.golden:
            if text.count(str(case.golden)) != 1:
                raise SystemExit(
                    f"{case}: {case.golden} does not stand in this file once; write {found} by hand"
                )
            text = text.replace(str(case.golden), str(found))
            print(f"{case}: {case.golden} -> {found}")
    Path(__file__).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
