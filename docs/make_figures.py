"""Every measured figure of README and docs, from benchmarks/results: python docs/make_figures.py.

A table stands between `<!-- measured: name -->` and `<!-- end -->`; a picture is docs/images/bench/name.svg.
With --check nothing is written, and what is stale is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from sparseflash import fusion
from sparseflash.bench import board, figures
from sparseflash.bench.results import read
from sparseflash.common.files import write

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
sys.path.insert(0, str(DOCS.parent))  # for what the experiments make of their rows
PAGES = (
    DOCS.parent / "README.md",
    *(
        DOCS / f"{name}.md"
        for name in (
            "benchmarks",
            "cpu",
            "design",
            "transformers",
            "fusion",
            "caches",
            "board",
            "vllm",
            "diffusion",
            "distributed",
        )
    ),
)
PICTURES = DOCS / "images" / "bench"
DRAWN = {
    "attention-table": "attention-table",
    "breakeven": "breakeven-both-fp32-64-4096",
    "coverage": "coverage-clustered-16",
    "mqar": "mqar",
    "long-run": "long-run-time",
    "curves": "curves-fp32",
}
"""Result file to the one of its pictures that a page shows."""
DERIVATIONS = DOCS / "images" / "fusion"
DTYPES = ("fp32", "bf16")

Cell = Callable[[str], str]


@cache
def rows(name: str) -> list[dict[str, str]]:
    """The rows of a result file."""
    return read(RESULTS / f"{name}.csv")


def figure(name: str, column: str, **wanted: str) -> float:
    """A cell of the one row that has the wanted ones."""
    found = [row for row in rows(name) if all(row[x] == value for x, value in wanted.items())]
    if len(found) != 1:
        raise SystemExit(f"{name}.csv: {len(found)} rows with {wanted}; expected one")
    return float(found[0][column])


def times(name: str, *cases: str, column: str = "ratio", **wanted: str) -> Cell:
    """Ratios of cases, `1.3x / 1.4x`, for a data type."""
    return lambda dtype: " / ".join(
        f"{figure(name, column, case=case, dtype=dtype, **wanted):.2g}x" for case in cases
    )


def both(name: str, case: str, **wanted: str) -> Cell:
    """Ratios of a case forward and backward."""
    return times(name, f"{case}, forward", f"{case}, backward", **wanted)


def steps(case: str, name: str = "step") -> Cell:
    """Speed-ups of a training step at both lengths."""
    return lambda dtype: " / ".join(
        times(name, case, column="speedup", T=T)(dtype) for T in ("8192", "16384")
    )


BRINGS: dict[str, Cell] = {
    "dense forward / backward": times("attention-table", "dense forward", "dense backward"),
    "hash-sparse, 16 buckets, forward + backward": times(
        "attention-table", "hash-sparse, 16 buckets, forward + backward"
    ),
    "QK-sparse, half of queries and keys dropped, forward + backward": times(
        "attention-table", "qk-sparse, half dropped on both sides, forward + backward"
    ),
    "a quarter of the 128 x 128 blocks at random, forward / backward": both(
        "kernel-table", "blocks of 128, 25 %", T="8192", heads="4", dim="64"
    ),
    "a quarter of the keys at random for every 64 queries, forward / backward": both(
        "kernel-table", "keys a tile of 64, 25 %", T="8192", heads="4", dim="64"
    ),
    "stick-breaking, every key in reach, forward / backward": both(
        "ops", "stick-breaking, every key counts", T="8192"
    ),
    "whole training step of a small GPT, hash-sparse, 8k / 16k tokens": steps("hash-sparse, 16 buckets"),
    "the same with a window of 128 beside the bucket, in every head": steps(
        "window 128 + hash, 16 buckets", "claim-steps"
    ),
    "whole training step, 30 % of queries and keys dropped, 8k / 16k tokens": steps("qk-sparse, 30% dropped"),
}


def brings() -> str:
    """What the library brings over SDPA."""
    body = [[what, *(cell(dtype) for dtype in DTYPES)] for what, cell in BRINGS.items()]
    return table(["", *DTYPES], body)


LEAST = 3
"""Rounds of a timed row that prose may quote: one is an anecdote."""


def quoted(name: str, column: str, **wanted: str) -> float:
    """A figure for prose, of a row that was measured often enough."""
    if figure(name, "rounds", **wanted) < LEAST:
        raise SystemExit(f"{name}.csv: {wanted} has fewer than {LEAST} rounds; measure it again")
    return figure(name, column, **wanted)


def ways() -> str:
    """What is left of other ways to the same result."""
    packed = {"what": "attention", "mix": "paragraphs", "case": "packed"}
    gains = [quoted("documents-books", "over_sdpa", dtype=dtype, **packed) for dtype in DTYPES]
    tiles = quoted("masks", "ratio", case="10 % of the tiles", T="8192", dtype="fp32")
    said = (
        "Against other ways to the same result, also forward + backward: packed documents "
        f"{gains[0]:.1f}x and {gains[1]:.1f}x over SDPA on padded batches "
        "(attention, paragraphs of novels, fp32 and bf16); a "
        f"boolean mask with 10 % of its tiles in use {tiles:.0f}x over SDPA with that mask, 8k tokens."
    )
    if (RESULTS / "short.csv").exists():
        body = [
            [row["T"], row["dtype"], *(f"{float(row[x]):.0f}" for x in ("us", "us_sdpa"))]
            for row in rows("short")
        ]
        head = ["tokens, 4 heads of 64, one forward", "dtype", "µs", "SDPA, µs"]
        said += " On few tokens SDPA may be faster:\n\n" + table(head, body)
    return textwrap.fill(said, 120) if "\n" not in said else said


def door(text: str) -> Callable[[], str]:
    """A measured line of README; `text` names figures by the keys of DOORS."""
    wanted = {name: cell for name, cell in DOORS.items() if f"{{{name}}}" in text}
    return lambda: textwrap.fill(text.format(**{name: cell() for name, cell in wanted.items()}), 125)


SAID = {
    "first": (
        "**Measured: CPUs. Not measured: GPUs.** On two cores of an AMD EPYC, dense attention runs "
        "{dense_fp32} (fp32) and {dense_bf16} (bf16) as fast as PyTorch's own, and sparse attention in "
        "proportion to what it leaves out ([table](#what-it-brings)). The Triton kernels agree with "
        "fp64 in Triton's interpreter and compile without a spill for sm_80, sm_90, sm_100 and gfx942; "
        "they have not run on a card yet, so there is no GPU figure on these pages."
    ),
    "mask": (
        "*A mask with 10 % of its tiles in use, 4,096 tokens, forward + backward over a plan that is "
        "made once: **{mask}** over SDPA with that mask (fp32).*"
    ),
    "prompt": (
        "*Queries and keys of SmolLM2-135M over 8,192 tokens of a novel: {recall} of the attention mass"
        " in {kept} of the pairs, **{prompt}** faster than our own dense attention, selection "
        "included.*"
    ),
    "cache": (
        "*Exact `sf.decode` over 64 MiB of fp32 cache, four query heads a KV head: **{decode}** over "
        "SDPA. SnapKV with 1/8 of 4,096 tokens holds {snapkv} of the attention mass, as many last "
        "tokens {cache_window}, random ones {cache_random}.*"
    ),
    "training": (
        "*A whole training step of a small GPT with it, 8k / 16k tokens: **{step_fp32}** (fp32), "
        "**{step_bf16}** (bf16) over SDPA. What it costs in quality is [a test of its "
        "own](docs/benchmarks.md#scfas-own-claim): in SmolLM2, weights as they are, on source code, a window "
        "of 128 with 4 of 64 centroids keeps **{far_kmeans}** of what dense attention gains further back, "
        "in {far_pairs} of the pairs; with a hash {far_lsh}, with random buckets {far_random}.*"
    ),
}


DOORS: dict[str, Callable[[], str]] = {
    "far_kmeans": lambda: share_kept("k-means, 4 of 64"),
    "far_pairs": lambda: share_kept("k-means, 4 of 64", "density"),
    "far_lsh": lambda: share_kept("LSH"),
    "far_random": lambda: share_kept("random buckets"),
    "dense_fp32": lambda: times("attention-table", "dense forward")("fp32"),
    "dense_bf16": lambda: times("attention-table", "dense forward")("bf16"),
    "mask": lambda: f"{figure('masks', 'ratio', case='10 % of the tiles', T='4096'):.0f}x",
    "prompt": lambda: f"{_prompt('gain'):.2g}x",
    "recall": lambda: f"{_prompt('recall'):.0%}",
    "kept": lambda: f"{_prompt('density'):.0%}",
    "decode": lambda: f"{_decode('ratio'):.2g}x",
    "snapkv": lambda: f"{_cache('recall'):.0%}",
    "cache_window": lambda: f"{_cache('window_recall'):.0%}",
    "cache_random": lambda: f"{_cache('random_recall'):.0%}",
    "step_fp32": lambda: steps("hash-sparse, 16 buckets")("fp32"),
    "step_bf16": lambda: steps("hash-sparse, 16 buckets")("bf16"),
}


def _prompt(column: str) -> float:
    return figure("prefill-8k", column, case="minference, summed, 96 rows")


def _decode(column: str) -> float:
    return figure("decode", column, case="contiguous", dtype="fp32", group="4", dim="64")


def _cache(column: str) -> float:
    return figure("caches", column, case="snapkv", share="1/8")


def mqar() -> str:
    """Recall at every learning rate."""
    rates = list(dict.fromkeys(row["lr"] for row in rows("mqar")))
    cases = dict.fromkeys((row["case"], row["density"]) for row in rows("mqar") if row["best"])
    body = []
    for case, density in cases:
        found = [figure("mqar", "accuracy", case=case, lr=lr) for lr in rates]
        body.append([case, f"{float(density):.2f}", *(f"{x:.1%}" for x in found)])
    return table(["attention", "density", *(f"lr {x}" for x in rates)], body)


@cache
def claimed() -> list[dict[str, str]]:
    """Shares of the far gain, by text and contender."""
    from benchmarks.experiments.claim import smollm

    return [{name: str(x) for name, x in row.items()} for row in smollm.kept(rows("claim-smollm"))]


def share_kept(case: str, name: str = "kept", text: str = "code") -> str:
    """One of these figures in per cent."""
    [row] = [x for x in claimed() if (x["case"], x["text"], x["T"], x["steps"]) == (case, text, "4096", "0")]
    return f"{float(row[name]):.0%}"


def claim() -> str:
    """The share of dense attention's far gain that each contender keeps, and what that says."""
    from benchmarks.experiments.claim import smollm

    parts = []
    for T, steps in dict.fromkeys((row["T"], row["steps"]) for row in claimed()):
        group = [row for row in claimed() if (row["T"], row["steps"]) == (T, steps)]
        kinds = list(dict.fromkeys(row["text"] for row in group))
        body = []
        for case in dict.fromkeys(row["case"] for row in group):
            of = {row["text"]: row for row in group if row["case"] == case}
            cells = [
                case,
                "; ".join(dict.fromkeys(f"{float(of[x]['density']):.3f}" for x in kinds if x in of)),
            ]
            for kind in kinds:
                own = of.get(kind)
                cells += [f"{float(own[x]):.3f}" for x in ("loss", "loss_far")] if own else ["", ""]
                cells += [f"{float(own[x]):.0%}" for x in ("kept", "kept_far")] if own else ["", ""]
            body.append(cells)
        head = ["", "pairs"]
        for kind in kinds:
            count = max(int(row["texts"]) for row in group if row["text"] == kind)
            head += [f"{kind} ({count}): loss", "far slice", "kept", "of the far slice"]
        parts.append(table(head, body))
    said = [line for line in smollm.verdict(rows("claim-smollm")) if "not all there" not in line]
    return "\n\n".join([*parts, "\n".join(f"- {line}." for line in said)])


def claim_mqar() -> str:
    """Far recall by contender."""
    body = []
    for row in rows("claim-mqar"):
        when = f"{row['steps_95']} / {float(row['minutes_95']):.1f}" if row["steps_95"] else "not reached"
        steps = f"{row['steps_last']} of {row['steps']}"
        share = f"{float(row['density']):.2f}"
        body.append([row["case"], row["seed"], share, f"{float(row['accuracy']):.1%}", when, steps])
    head = [
        "attention",
        "seed",
        "pairs",
        "answered",
        "steps / minutes to 95 %",
        "steps at 4,096 tokens, of all",
    ]
    return table(head, body)


def breakeven() -> str:
    """Gain of every kind of plan over density and length, and where it ends."""
    found = [row for row in rows("breakeven") if row["dim"] == "64" and row["direction"] == "both"]
    lengths = list(dict.fromkeys(row["T"] for row in found))
    body = []
    for kind, share in dict.fromkeys((row["kind"], row["share"]) for row in found):
        wanted = {"kind": kind, "share": share, "dim": "64", "direction": "both"}
        cells = [figure("breakeven", "gain", T=T, **wanted) for T in lengths]
        body.append([kind, f"{float(share):.3g}", *(f"{x:.2g}x" for x in cells)])
    lost = [row for row in rows("breakeven") if float(row["gain"]) < 1]
    groups = Counter(f"T = {x['T']}, D = {x['dim']}, {x['direction']}" for x in lost)
    where = "; ".join(f"{count} at {group}" for group, count in groups.items())
    said = (
        f"Of all {len(rows('breakeven'))} points, forward alone among them, dense was faster on {len(lost)}"
    )
    said += f" ({where})." if lost else "."
    return table(["plan", "density", *(f"T = {T}" for T in lengths)], body) + "\n\n" + said


def coverage() -> str:
    """Equal-bucket pairs attended, 16 buckets."""
    lengths = list(dict.fromkeys(row["T"] for row in rows("coverage")))
    body = []
    for inputs, case in dict.fromkeys((row["inputs"], row["case"]) for row in rows("coverage")):
        cells = [figure("coverage", "coverage", inputs=inputs, case=case, T=T, nb="16") for T in lengths]
        body.append([inputs, case, *(f"{x:.1%}" for x in cells)])
    return table(["tokens", "attention", *(f"T = {T}" for T in lengths)], body)


def pixels() -> str:
    """Perplexity after equal steps."""
    body = [[row["case"], row["perplexity"], row["steps"]] for row in rows("pixels")]
    return table(["attention", "perplexity of a held-out pixel", "steps"], body)


def masks() -> str:
    """Attention under boolean masks over SDPA with them, and what making a plan of the longest costs."""
    lengths = list(dict.fromkeys(row["T"] for row in rows("masks")))
    body = []
    for case in dict.fromkeys(row["case"] for row in rows("masks")):
        cells = [f"{figure('masks', 'ratio', case=case, T=T):.3g}x" for T in lengths]
        build, compiled, eager = (
            figure("masks", x, case=case, T=lengths[-1])
            for x in ("ms_build", "ms_flex_build", "ms_flex_eager")
        )
        body.append([case, *cells, f"{build:,.1f}", f"{compiled:,.0f}", f"{eager:,.0f}"])
    return table(
        ["mask", *(f"T = {T}" for T in lengths), "plan, ms", "block mask compiled, ms", "block mask, ms"],
        body,
    )


def long_run() -> str:
    """Held-out bits per byte at equal steps, and after the time that the hashed model takes for them."""
    ms = {row["case"]: float(row["ms"]) for row in rows("long-run-step")}
    curves: dict[str, list[dict[str, str]]] = {}
    for row in rows("long-run"):
        if row["seed"] == "0":
            curves.setdefault(row["case"], []).append(row)
    sdpa = ms["dense, torch SDPA"]
    time = float(curves["hash, 1 window head"][-1]["minutes"])
    dense = float(curves["dense"][-1]["bpb"])
    body = []
    for case in sorted(curves, key=lambda case: float(curves[case][-1]["bpb"])):
        curve = curves[case]
        bpb = float(curve[-1]["bpb"])
        seeds = [
            f"{float(row['bpb']):.3f}"
            for row in rows("long-run")
            if row["case"] == case and row["step"] == row["steps"]
        ]
        then = [row["bpb"] for row in curve if float(row["minutes"]) <= 1.001 * time][-1]
        over = sdpa / ms[case]
        body.append(
            [
                case,
                " / ".join(seeds),
                f"{bpb / dense - 1:+.1%}",
                f"{float(then):.3f}",
                f"{ms[case]:.0f}",
                f"{over:.2f}x",
            ]
        )
    late = [row["bpb"] for row in curves["dense"] if float(row["minutes_sdpa"]) <= 1.001 * time]
    body.append(["dense, torch SDPA", "as dense", "", f"{float(late[-1]):.3f}", f"{sdpa:.0f}", "1x"])
    head = ["attention", "bits per byte", "over dense", f"after {time:.1f} minutes", "ms a step", "over SDPA"]
    return table(head, body)


PEAK = {"fp32": 218, "bf16": 448}
"""GF/s of the vector units of the measured machine, both cores: a loop of independent multiply-adds."""


def peak() -> str:
    """Dense attention beside what the multipliers could do."""
    body = []
    for dtype in DTYPES:
        for case, products in (("dense forward", 2), ("dense backward", 5)):
            ms = figure("attention-table", "ms", case=case, dtype=dtype)
            rate = products * 2 * 64 * 4 * 8192 * 8193 / 2 / ms * 1e-6
            cells = [f"{dtype} {case.removeprefix('dense ')}", f"{ms:.0f} ms", f"{rate:.0f}"]
            body.append([*cells, f"{rate / PEAK[dtype]:.2f}"])
    return table(["dense", "time", "GF/s", "share of the peak"], body)


def levels(level: str = "avx2", dtype: str = "fp32") -> str:
    """Dense attention at one level of instructions."""
    body = []
    for T, dim in dict.fromkeys((row["T"], row["dim"]) for row in rows("levels")):
        wanted = {"level": level, "T": T, "dim": dim}
        cells = [figure("levels", "ratio", case=f"dense, {way}", **wanted) for way in ("forward", "backward")]
        body.append([f"T = {T}, D = {dim}", *(f"{x:.2f}x" for x in cells)])
    return table([f"dense, {dtype}, H = 4", "forward", "backward"], body)


def kernels() -> str:
    """Every plan of the kernel table, both ways and dtypes."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows("kernel-table"):
        way = "forward" if ", forward" in row["case"] else "backward"
        plan = row["case"].replace(f", {way}", "")
        cells = found.setdefault((plan, row["T"], row["heads"], row["dim"]), {})
        cells[f"{row['dtype']} {way}"] = f"{float(row['ratio']):.3g}x"
    body = [
        [*key, *(" / ".join(cells[f"{dtype} {way}"] for way in ("forward", "backward")) for dtype in DTYPES)]
        for key, cells in found.items()
    ]
    return table(["plan", "T", "H", "D", *DTYPES], body)


def rates() -> str:
    """Held-out bits per byte at every learning rate of the sweep."""
    found = [row for row in rows("rates") if row["step"] == row["steps"]]
    lrs = sorted({row["lr"] for row in found}, key=float)
    body = [
        [
            case,
            *(
                next(f"{float(x['bpb']):.3f}" for x in found if (x["case"], x["lr"]) == (case, lr))
                for lr in lrs
            ),
        ]
        for case in dict.fromkeys(row["case"] for row in found)
    ]
    return table(
        [f"bits per byte after {found[0]['steps']} steps", *(f"lr {float(lr):g}" for lr in lrs)], body
    )


def selection() -> str:
    """What selecting takes, beside dense attention and the same in PyTorch."""
    body = []
    for row in rows("selection"):
        if row.get("ms"):
            faster = float(row["ratio"]) if row.get("ratio") else 0.0
            plain = f"{faster:.0f}x" if faster >= 10 else f"{faster:.2g}x" if faster else ""
            ms = f"{float(row['ms']):.3g} ms"
            body.append([row["case"], row["dtype"], ms, f"{float(row['share']):.2g}", plain])
    return table(["", "products", "time", "of dense attention", "faster than PyTorch alone"], body)


def prefill(name: str = "prefill") -> str:
    """Methods for long prompts on a pretrained model's queries and keys, beside two controls."""
    body = []
    for row in rows(name):
        shares = [
            f"{float(row[name]):.4f}" for name in ("density", "recall", "window_recall", "random_recall")
        ]
        times = [f"{float(row['ms_select']):.3g}", f"{float(row['share']):.0%}", f"{float(row['gain']):.2g}x"]
        body.append([row["case"], *shares, f"{float(row['error']):.3f}", *times])
    head = [
        "method",
        "kept",
        "recall",
        "a window's",
        "random blocks'",
        "error",
        "selecting, ms",
        "share of time",
    ]
    return table([*head, "over dense"], body)


def gates() -> str:
    """Recall of SeerAttention's gates by the blocks that a tile chooses, beside means, chance and targets."""
    found = rows("gates")
    budgets = list(dict.fromkeys(row["blocks"] for row in found))
    kept = [float(next(row["kept"] for row in found if row["blocks"] == n)) for n in budgets]
    body = [
        [case, *(f"{float(row['recall']):.3f}" for row in found if row["case"] == case)]
        for case in dict.fromkeys(row["case"] for row in found)
    ]
    said = [f"{n} blocks ({share:.2f} of the pairs)" for n, share in zip(budgets, kept, strict=True)]
    return table(["chosen by", *said], body)


def layers_recall() -> str:
    """Accuracy of layers on associative recall, by seed, and the pairs that a query costs."""
    found = rows("layers-recall")
    seeds = sorted({row["seed"] for row in found})
    body = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = [row for row in found if row["case"] == case]
        best = {s: [float(row["accuracy"]) for row in own if row["seed"] == s] for s in seeds}
        pairs = sum(float(row["pairs"]) for row in own) / len(own)
        body.append([case, f"{pairs:.1f}", *(f"{max(x):.1%}" if x else "" for x in best.values())])
    return table(["layer", "pairs a query", *(f"seed {s}" for s in seeds)], body)


def layers_weights() -> str:
    """Accuracy of nets with N:M weights, by seed, beside their multiplications."""
    found = rows("layers-weights")
    seeds = sorted({row["seed"] for row in found})
    body = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = {row["seed"]: row for row in found if row["case"] == case}
        shares = [f"{float(next(iter(own.values()))[name]):.2f}" for name in ("share_sparse", "share")]
        body.append([case, *shares, *(f"{float(own[s]['accuracy']):.1%}" if s in own else "" for s in seeds)])
    head = ["weights", "multiplications of these layers", "of the net", *(f"seed {s}" for s in seeds)]
    return table(head, body)


def layers_products() -> str:
    """Products and steps with N:M weights, times faster than dense ones in fp32."""
    found = [row for row in rows("layers-products") if row["case"] != "dense"]
    body = [
        [
            f"{row['tokens']} x {row['inputs']} x {row['outputs']}",
            row["case"],
            *(f"{float(row[x]):.2f}x" for x in ("speedup", "speedup_step")),
        ]
        for row in found
    ]
    return table(["tokens, inputs, outputs", "weights", "product", "training step"], body)


def by_seed(name: str, columns: dict[str, tuple[str, str]]) -> str:
    """A row for each case of a file, seeds beside one another; columns: name in the file and format."""
    found = rows(name)
    body = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = [row for row in found if row["case"] == case]
        cells = [
            " / ".join(format(float(row[x]), shape) for row in own if row.get(x))
            for x, shape in columns.values()
        ]
        body.append([case, *cells])
    return table(["layer", *columns], body)


LAYERS = {
    "language": {
        "bits per byte": ("bpb", ".3f"),
        "far ones": ("far", ".3f"),
        "pairs a query": ("pairs", ".0f"),
        "active": ("active", ".0%"),
        "ms a step": ("ms_step", ".0f"),
    },
    "lists": {
        "right answers": ("accuracy", ".1%"),
        "of nested lists": ("nested", ".1%"),
        "pairs a query": ("pairs", ".0f"),
        "active": ("active", ".0%"),
    },
    "longer": {
        "bits at 4,096": ("bpb", ".3f"),
        "far ones": ("far", ".3f"),
        "bits at 512": ("bpb_short", ".3f"),
        "cache": ("cache", ".2f"),
        "ms a step": ("ms_step", ".0f"),
    },
}
"""Tables of what layers learn: heads, with the column of the file and its format."""


def layers_clusters() -> str:
    """Error of MuSe by form and clusters, and its time over exact attention, where sequences are longer."""
    found = rows("layers-clusters")
    counts = list(dict.fromkeys(row["clusters"] for row in found))
    lengths = list(dict.fromkeys(row["T"] for row in found))
    body = []
    for model, layer, case in dict.fromkeys((row["model"], row["layer"], row["case"]) for row in found):
        own = {(row["T"], row["clusters"]): row for row in found
               if (row["model"], row["layer"], row["case"]) == (model, layer, case)}  # fmt: skip
        errors = [f"{float(own[lengths[0], n]['error']):.1%}" for n in counts]
        times = [f"{float(own[T, '64']['ratio']):.1f}x" if (T, "64") in own else "" for T in lengths]
        plain = f"{float(own[lengths[0], counts[0]]['error_mean']):.0%}"
        body.append([f"{model}, {layer}", case, plain, *errors, *times])
    heads = [f"{n} clusters" for n in counts]
    return table(
        ["model, layer", "form", "mean alone", *heads, *(f"over exact, {int(T):,}" for T in lengths)], body
    )


def layers_lengths() -> str:
    """Bits per byte of models that were trained on short sequences, by length."""
    found = rows("layers-extrapolation")
    lengths = [name for name in found[0] if name.startswith("bpb_")]
    body = [[row["case"], row["seed"], *(f"{float(row[x]):.3f}" for x in lengths)] for row in found]
    return table(["layer", "seed", *(x.removeprefix("bpb_") for x in lengths)], body)


def prompt_losses() -> str:
    """What prompts under each method lose, by text, and the needles that it keeps where they were planted."""
    found = rows("prompt-losses")
    texts = list(dict.fromkeys((row["text"], row["tokens"]) for row in found))
    body = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = {(row["text"], row["tokens"]): row for row in found if row["case"] == case}
        first = next(iter(own.values()))
        losses = [f"{float(own[x]['kl']):.4f}" if x in own else "" for x in texts]
        needles = [f"{float(first[x]):.2f}" if first[x] else "" for x in ("question", "mid", "lone")]
        shares = [f"{float(first[x]):.3f}" for x in ("kept", "recall")]
        body.append([case, *shares, *losses, *needles])
    said = [f"KL, {text}, {int(tokens):,}" for text, tokens in texts]
    return table(["method", "kept", "recall", *said, "question", "middle", "lone"], body)


def board_best() -> str:
    """What to take at each budget, from the board: the methods that lose least and beat both controls."""
    found = board.lines(rows("board"))
    parts = []
    for model, tokens in dict.fromkeys((x.model, x.tokens) for x in found):
        for phase, title in (("prompt", "Prompts"), ("decode", "Caches and decoding")):
            own = [x for x in found if (x.phase, x.model, x.tokens) == (phase, model, tokens)]
            body = []
            for budget in sorted({x.budget for x in own} - {1}):
                each = sorted((x for x in own if x.budget == budget), key=lambda x: x.figures["kl"])
                named = {x.case: f"{x.case} ({x.figures['kl']:.2g} at {x.figures['kept']:.2f})" for x in each}
                good = [named[x.case] for x in each if x.beats][:5]
                control = [named[x] for x in board.CONTROLS[phase] if x in named]
                bad = [x.case for x in each if x.beats is False] or ["none"]
                body.append([f"1/{budget}", *map(", ".join, (good, control, bad))])
            if body:
                texts = max(x.texts for x in own)
                sure = board.agreement(rows("board"), phase, model, tokens)
                says = f", {texts} texts" if texts > 1 else ", one text"
                says += "" if sure is None else f", rank correlation of two {sure:.2f}"
                head = ["budget", "least KL (at what is kept)", "controls", "does not beat both"]
                parts.append(f"**{title}: {model}, {tokens:,} tokens{says}**\n\n{table(head, body)}")
    return "\n\n".join(parts)


def samples() -> str:
    """Samples of one prompt in a whole model: its own cache, one with room, one that shares the prompt."""
    named = {"stock": "Transformers' own", "room": "`Growing`", "shared": "`Shared`"}
    body = []
    for row in rows("samples"):
        size = f"{int(row['bytes']) / 2**20:,.0f} MiB"
        rate, gain = f"{float(row['rate']):.0f}", f"{float(row['gain']):.1f}x"
        body.append([row["samples"], named[row["case"]], rate, gain, size, f"{float(row['agree']):.0%}"])
    return table(["samples", "cache", "tokens/s", "over its own", "keys and values", "same tokens"], body)


def ranks() -> str:
    """A step of two ranks beside one process of two threads, and beside its forecast."""
    body = [
        [
            row["case"],
            row["layout"],
            f"{float(row['ms_one']):.0f}",
            f"{float(row['ms']):.0f}",
            f"{float(row['overhead']):+.0%}",
            f"{float(row['ms_forecast']):.0f}",
        ]
        for row in rows("ranks")
        if row["part"] == "step"
    ]
    return table(["plan", "layout", "one process, ms", "two ranks, ms", "over", "forecast, ms"], body)


def video(part: str) -> str:
    """Of moving digits: generated videos, times, or what methods find in the trained model."""
    every = rows("video") if (RESULTS / "video.csv").exists() else []
    found = [row for row in every if (row["part"], row["study"]) == (part, every[-1]["study"])]
    if not found:
        return "(to be measured)"

    def cells(row: dict[str, str], columns: dict[str, str]) -> list[str]:
        return [format(float(row[x]), how) if row.get(x) else "" for x, how in columns.items()]

    if part == "stages":
        columns = {"kept": ".0%", "distance": ".3f", "frechet": ".3f", "drift": ".2f", "unlike": ".3f"}
        body = [
            [row["case"], row["stage"], row["steps"].strip("0") and row["steps"]]
            + [
                " ".join(dict.fromkeys(row["references"].split()))
                if row["kept"] == "1"
                else row["references"]
            ]
            + cells(row, columns)
            for row in found
        ]
        names = ["kept", "distance", "Fréchet", "drift", "unlike stage 1"]
        of = dict(re.findall(r"(\w+)=([\d.]+)", found[0]["study"]))
        said = (
            "Optimiser steps of {batch} videos: {steps} for the teacher, {distil} for stage 1, {tune} for "
            "each student of stage 3. The search lets an error of {bound} of a layer pass; {videos} videos "
            "are judged."
        ).format(**of)
        head = ["videos", "stage", "steps", "reference frames", *names]
        return f"{textwrap.fill(said, 120)}\n\n{table(head, body)}"
    if part == "time":
        gains = {"gain_steps": ".1f", "gain_attention": ".1f", "gain_model": ".2f", "gain": ".1f"}
        body = [
            [row["T"], row["case"], row["steps"], *cells(row, {"kept": ".0%", "ms": ",.0f"})]
            + [f"{x}x" for x in cells(row, gains)]
            for row in found
        ]
        said = ["of steps", "of attention alone", "of it in a step", "of both"]
        return table(["tokens", "model", "steps", "kept", "ms", *said], body)
    columns = dict.fromkeys(
        ("kept", "recall", "recall_later", "recall_random", "recall_uniform", "recall_window"), ".2f"
    )
    body = [
        [f"`{name}`{rest}", *cells(row, columns)] for row in found for name, rest in [_named(row["case"])]
    ]
    named = ["kept", "recall", "half of the steps later", "random", "evenly spaced", "window"]
    return table(["method", *named], body)


def diffusion(part: str) -> str:
    """What methods for diffusion keep of planted heads, and what reused patterns do to a language model."""
    found = [row for row in rows("diffusion") if row["what"] == part]
    if part == "masked":
        cases = ("reuse", "own", "first", "window", "random")
        shares = dict.fromkeys(row["share"] for row in found)
        body = [
            [
                f"{float(own[0]['density']):.0%}",
                *(f"{float(row['kl']):.2g}" for x in cases for row in own if row["case"] == x),
            ]
            for own in ([row for row in found if row["share"] == share] for share in shares)
        ]
        of = {x: f"{float(found[0][x]):.0%}" for x in ("overlap_next", "overlap_last", "overlap_heads")}
        said = (
            "Of the step's own blocks, at the smaller share, {overlap_next} are kept by the pattern one step "
            "later and {overlap_last} at the end; heads 0 and 1 share {overlap_heads} of theirs."
        ).format(**of)
        head = [
            "pairs kept",
            "blocks of the last dense step",
            "the step's own",
            "of step 0",
            "window",
            "random",
        ]
        return f"{table(head, body)}\n\n{textwrap.fill(said, 120)}"
    if part == "orders":
        shown = {"empty": ".0%", "int8": ".1%", "int4": ".0%"}
        body = [
            [row["head"]]
            + [
                " to ".join(f"{float(row[f'{x}_{y}']):{how}}" for y in ("raster", "found"))
                for x, how in shown.items()
            ]
            for row in found
        ]
        return table(["head, raster to found order", "empty blocks", "error in INT8", "in INT4"], body)
    heads = list(dict.fromkeys(row["head"] for row in found))
    body = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = {row["head"]: row for row in found if row["case"] == case}
        kept = dict.fromkeys(f"{float(own[x]['density']):.0%}" for x in heads)
        mean = [sum(float(own[x][y]) for x in heads) / len(heads) for y in ("recall_random", "recall_window")]
        name, rest = _named(case)
        body.append(
            [f"`{name}`{rest}, {', '.join(kept)}", *(f"{float(own[x]['recall']):.2f}" for x in heads)]
            + [", ".join(f"{x:.2f}" for x in mean)]
        )
    named = {"place": "same place", "alike": "what is alike"}
    head = ["method, pairs kept", *(named.get(x, x) for x in heads), "mean of random, window"]
    return table(head, body)


def vision(part: str) -> str:
    """Small vision models with fewer links and tokens; time over features of a table, and over pixels."""
    found = [row for row in rows("vision") if row["what"] == part]
    if part == "links":
        seeds = {row["seed"]: row for row in found}
        body = []
        for case in dict.fromkeys(row["case"] for row in found):
            own = [row for row in found if row["case"] == case]
            right = [100 * float(row["accuracy"]) for row in own]
            kept = [float(row["recall"]) for row in own if row["recall"]]
            mass = f"{sum(kept) / len(kept):.2f}" if kept else "1"
            body.append([case, f"{sum(right) / len(right):.1f}", ", ".join(f"{x:.1f}" for x in right), mass])
        return table(["links", "right, %", f"seeds {', '.join(seeds)}", "attention mass on them"], body)
    if part == "tokens":
        body = [
            [row["case"], f"{100 * float(row['accuracy']):.1f}", f"{float(row['points']):+.1f}"]
            + [f"{float(row['mflops']):.1f}", f"{float(row['fewer']):.1%}"]
            for row in found
        ]
        return table(["fine-tuned with", "right, %", "points", "MFLOPs an image", "fewer"], body)
    if part == "plan":
        names = {"ms_choose": "choose keys", "ms_mask": "plan from the mask", "ms_lists": "from lists"}
        names |= {"ms": "attend", "ms_dense": "SDPA, all keys"}
        body = [[row["case"], *(f"{float(row[x]):.2f}" for x in names)] for row in found]
        return table(["197 tokens, 6 heads, ms", *names.values()], body)
    names = {"features": {"T": "features", "ms": "`orion-msp`, ms", "ms_dense": "dense attention, ms"}}
    names["hrsam"] = {
        "case": "image", "ms": "a block of HRSAM, ms", "ms_sam": "a layer of SAM's encoder, ms",
        "ms_dense": "our dense attention alone, ms",
    }  # fmt: skip
    body = [
        [f"{float(row[x]):.2f}" if x.startswith("ms") and row[x] else row[x] for x in names[part]]
        + [f"{1e3 * float(row['ms']) / int(row['T']):.2f}"]
        for row in found
    ]
    return table([*names[part].values(), "µs a token"], body)


def _named(case: str) -> tuple[str, str]:
    """The name of a method, and what is said behind it."""
    name, comma, rest = case.partition(", ")
    return name, comma + rest


def methods_of(block: str, budget: int = 8) -> str:
    """A table of README's methods, with what the board says of each at an eighth of the pairs or keys."""
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    own = text.partition(f"<!-- measured: {block} -->")[2].partition("<!-- end -->")[0]
    measured: dict[str, list[board.Line]] = {}
    for line in board.lines(rows("board")):
        if line.budget == budget and line.tokens == 4096:
            measured.setdefault(line.case.removesuffix("-kmeans"), []).append(line)
    body = []
    for name, sees, paper in re.findall(r"^\| `([\w-]+)` \| (.*?) \| (\[.*?)(?: \|.*)?$", own, re.MULTILINE):
        best = min(measured.get(name, []), key=lambda x: x.figures["kl"], default=None)
        said = ""
        if best is not None:
            kl = f"{best.figures['kl']:.2g}"
            said = f"{f'**{kl}**' if best.beats else kl} ({best.figures['kept']:.2f})"
        body.append([f"`{name}`", sees, paper.removesuffix(" |"), said])
    return table(["name", "what a query sees", "paper", "KL (kept)"], body)


def methods_said() -> str:
    """What the last column of README's tables of methods is, and what its controls have."""
    at = {x.case: x for x in board.lines(rows("board")) if x.budget == 8 and x.tokens == 4096}
    controls = [f"{at[x].figures['kl']:.2g}" for phase in ("prompt", "decode") for x in board.CONTROLS[phase]]
    texts = max(x.texts for x in at.values())
    return (
        "KL is what a method loses on SmolLM2-135M behind 4,096 tokens "
        f"({'one text' if texts == 1 else f'mean of {texts} texts'}), with about an eighth of the pairs of "
        "the prompt or of the keys, in brackets what was kept; the first and last keys lose "
        f"{controls[0]} (prompts) and {controls[2]} (caches), a random choice {controls[1]} and "
        f"{controls[3]}. **Bold** beats both at what it keeps. No entry: trained layers, masks that a task "
        "has, other hosts, or not on [the board](docs/board.md) yet. Weights are as they were trained, dense."
    )


def board_tasks() -> str:
    """Which questions about a long document are still answered, of the kinds that tell methods apart."""
    own = [row for row in rows("board") if row["phase"] == "task"]
    parts = []
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in own):
        here = [row for row in own if (row["model"], row["tokens"]) == (model, tokens)]
        right = {(row["case"], row["text"]): float(row["right"]) for row in here}
        kinds = list(dict.fromkeys(row["text"] for row in here))
        told = [kind for kind in kinds if board.tells(right, kind)]
        body = [
            [case, *(f"{right[case, kind]:.0%}" if (case, kind) in right else "" for kind in told)]
            for case in dict.fromkeys(row["case"] for row in here)
        ]
        dropped = ", ".join(kind for kind in kinds if kind not in told) or "none"
        says = f"**{model}, {int(tokens):,} tokens.** Kinds that random keys answer as well: {dropped}."
        parts.append(f"{says}\n\n{table(['method', *told], body)}")
    return "\n\n".join(parts)


def caches() -> str:
    """What caches lose that keep or read few keys, by budget; where a control is as good, in brackets."""
    found, shares = rows("caches"), ("1/2", "1/4", "1/8", "1/16")

    def cells(of: dict[str, dict[str, str]], column: str = "recall") -> list[str]:
        made = []
        for share in shares:
            row = of[share]
            text = f"{float(row[column]):.3f}"
            made.append(f"({text})" if column == "recall" and row["beats"] == "False" else text)
        return made

    body = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = {row["share"]: row for row in found if row["case"] == case}
        held = [f"{float(own[share]['bytes']):.2f}" for share in ("1/2", "1/16")]
        error = f"{float(own['1/8']['error']):.2f}"
        body.append([case, own["1/2"]["few"], *cells(own), error, " to ".join(held)])
    for name, said in (("window_recall", "the first four and the last"), ("random_recall", "random")):
        body.append([said, "", *cells({row["share"]: row for row in found}, name), "", ""])
    head = ["", "keys are", *(f"recall, {share}" for share in shares), "error, 1/8", "bytes"]
    return table(head, body)


def budgets() -> str:
    """What a model says with few keys, by budget; in brackets what a control says as well."""
    found, shares = rows("budgets"), ("1/2", "1/4", "1/8", "1/16")
    body = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = {row["share"]: row for row in found if row["case"] == case}
        cells = []
        for share in shares:
            text = f"{float(own[share]['kl']):.4f}" if share in own else ""
            cells.append(f"({text})" if text and own[share]["beats"] == "False" else text)
        one = own.get("1/8", own["1/2"])
        needles = [f"{float(one[kind]):.2f}" for kind in ("asked", "before", "anew")]
        body.append([case, one["few"], *cells, f"{float(one['bytes']):.2f}", *needles])
    head = ["", "keys are", *(f"KL, {share}" for share in shares), "bytes, 1/8", "asked", "before", "anew"]
    return table(head, body)


def vllm() -> str:
    """Tokens per second of vLLM with its own attention and with ours, and how many tokens are the same."""
    found = rows("vllm")
    one = found[0]
    head = ["attention", "", "tokens of prompts / s", "", "tokens made / s", "", "same tokens"]
    body = []
    for row in found:
        gains = [f"{float(row[name]):.2f}x" for name in ("prompts_gain", "gain")]
        agree = f"{float(row['agree']):.0%}"
        body.append([row["case"], row["dtype"], row["prompts"], gains[0], row["rate"], gains[1], agree])
    says = (
        f"{one['model']}, {one['requests']} requests of {int(one['T']):,} tokens that come together, "
        f"{one['tokens']} tokens made for each, on {one['threads']} thread of {one['cpu']} (seconds that it "
        "had of its core). Methods have budgets of an eighth of the keys or blocks."
    )
    return f"{says}\n\n{table(head, body)}"


def attention() -> str:
    """Time, recall and error of methods on what a trained model sees, at the longest length."""
    found = [row for row in rows("attention") if row["inputs"] == "captured" and row["target"] == "0.125"]
    longest = max(found, key=lambda row: int(row["T"]))["T"]
    body = []
    for row in found:
        if row["T"] == longest and not row["case"].startswith("naive"):
            naive = row.get(f"over naive {row['case']}")
            gains = [f"{float(row['over sdpa']):.2g}x", f"{float(naive):.2g}x" if naive else ""]
            loss = [
                f"{float(row['density']):.3g}",
                f"{float(row['recall']):.3f}",
                f"{float(row['error']):.2f}",
            ]
            body.append([row["case"], *gains, row["ms_select"], row["ms"], *loss])
    head = ["attention", "over SDPA", "over a mask", "selecting, ms", "all, ms", "density", "recall", "error"]
    return table(head, body)


def experiments() -> str:
    """What the SCFA paper reports, what was measured here, and why they differ."""
    longest = max({row["T"] for row in rows("curves")}, key=int)

    def gain(case: str, T: str = longest) -> str:
        return f"{figure('curves', 'speedup', case=case, T=T):.2g}x"

    def over(case: str, naive: str) -> str:
        both = [figure("curves", "ms", case=name, T="4096") for name in (naive, case)]
        return f"{both[0] / both[1]:.0f}x"

    def rate(case: str, T: str) -> str:
        return f"{figure('curves', 'ms', case=case, T=T) / int(T) * 1e3:.1f}"

    def covered(inputs: str, T: str) -> str:
        case = "reformer, chunks of T / nb"
        return f"{figure('coverage', 'coverage', inputs=inputs, case=case, T=T, nb='16'):.0%}"

    def final(case: str) -> str:
        trained = (
            f"{float(row['bpb']):.2f}"
            for row in rows("long-run")
            if (row["case"], row["seed"], row["step"]) == (case, "0", row["steps"])
        )
        return next(trained, "(to be trained)")

    hashed, dropped = "hash-sparse, {} buckets", "qk-sparse, {}% dropped"
    fewest = next(
        (
            drop
            for drop in (30, 50, 70)
            if figure("curves", "speedup", case=f"naive {dropped.format(drop)}", T="8192") > 1
        ),
        None,
    )
    crossing = f"from {fewest} % dropped on" if fewest else "at none of 30, 50, 70 %"
    return table(
        [
            "",
            "command",
            "the paper",
            f"here, {int(longest):,} tokens where nothing is said",
            "why they differ",
        ],
        [
            [
                "hash-sparse, 4 / 16 / 64 buckets",
                "`curves`",
                "1.5x / 2.7x / 3.5x at 32k",
                " / ".join(gain(hashed.format(nb)) for nb in (4, 16, 64)),
                "its kernels scan all blocks of keys, ours walk a list of those that are met",
            ],
            [
                "the same by a mask",
                "`curves`",
                "never faster than dense",
                f"never; ours takes a {over(hashed.format(16), 'naive masked, 16 buckets')} shorter time "
                "at 4,096",
                "a mask visits every pair",
            ],
            [
                "30 / 50 / 70 % dropped",
                "`curves`",
                "1.3x / 2.5x / 6.2x at 32k",
                " / ".join(gain(dropped.format(drop)) for drop in (30, 50, 70)),
                "(1 - drop)² of the pairs; our dense kernel is faster than SDPA to begin with",
            ],
            [
                "the same compacted, with a mask",
                "`curves`",
                "faster than dense beyond about 70 % dropped",
                f"{crossing} (8,192 tokens)",
                "SDPA under a mask visits both triangles",
            ],
            [
                "µs a token, Reformer and hash-sparse, 1,024 to " + f"{int(longest):,}",
                "`curves`",
                "both grow slowly, hash-sparse is faster",
                f"Reformer {rate('reformer', '1024')} to {rate('reformer', longest)}, 16 buckets "
                f"{rate(hashed.format(16), '1024')} to {rate(hashed.format(16), longest)}, 64 buckets "
                f"{rate(hashed.format(64), '1024')} to {rate(hashed.format(64), longest)}",
                "our Reformer runs on the same kernels and sees a chunk of 64 at every length; "
                "buckets grow with it",
            ],
            [
                "pairs of equal buckets that Reformer sees, 16 buckets, 512 to 4,096",
                "`coverage`",
                "falls steeply",
                f"normal {covered('normal', '512')} to {covered('normal', '4096')}, clustered "
                f"{covered('clustered', '512')} to {covered('clustered', '4096')}, trained "
                f"{covered('captured', '512')} to {covered('captured', '4096')}; hash-sparse all",
                "chunks here grow with the sequence, as the paper says; unevenness of the buckets decides",
            ],
            [
                "sequential MNIST, perplexity, hash-sparse / Reformer",
                "`pixels`",
                "1.67 / 1.76",
                " / ".join(f"{float(rows('pixels')[n]['perplexity']):.2f}" for n in (1, 2)),
                "150 steps of 8 images: no one has converged",
            ],
            [
                "bytes of text, hash-sparse / Reformer",
                "`long-run`",
                "2.29 / 3.32",
                f"{final('hash')} / {final('reformer')} bits (dense {final('dense')}; "
                f"one window head {final('hash, 1 window head')})",
                "novels for enwik8; two layers; 1,500 steps",
            ],
            [
                "language, 30 / 50 / 70 % dropped",
                "`long-run`",
                "30 % as good as dense, then worse",
                " / ".join(final(f"{drop} % dropped") for drop in (30, 50, 70))
                + f" bits (dense {final('dense')})",
                "two layers: what one drops the other can hardly make up for",
            ],
            ["queries without any key", "the tests", "no NaN", "zero output, zero gradients, no NaN", ""],
        ],
    )


def prediction() -> str:
    """How far `predict` is off on the points that its fit has not seen."""
    off = sorted(abs(float(row["off"])) for row in rows("breakeven") if row["held_out"])
    close = sum(x <= 0.25 for x in off) / len(off)
    return (
        f"On {len(off)} points left out of the fit it was off by {off[len(off) // 2]:.0%} in the median, "
        f"by at most 25 % on {close:.0%} of them (worst: {off[-1]:.0%})."
    )


def layers() -> str:
    """How many times faster a layer of half a billion parameters is under a method."""
    found = _rows_of("Qwen2-0.5B")
    lengths = sorted({int(row["T"]) for row in found})
    body = []
    for case in dict.fromkeys((row["what"], row["method"], row["dtype"]) for row in found):
        own = {
            int(row["T"]): f"{float(row['ratio']):.2g}x"
            for row in found
            if (row["what"], row["method"], row["dtype"]) == case
        }
        body.append([", ".join(case), *(own.get(T, "") for T in lengths)])
    return table(["", *(f"T = {T}" for T in lengths)], body)


def dsa() -> str:
    """A layer with an indexer: stock and ours, time and memory."""
    body = []
    for row in _rows_of("DeepSeek-V3.2"):
        stock = (
            [f"{float(row['ms_stock']) / 1e3:.2g} s", _mib(row["mb_stock"])] if row["ratio"] else ["-", "-"]
        )
        ratio = (
            [f"{float(row['ratio']):.2g}x", f"{float(row['mb_ratio']):.2g}x"] if row["ratio"] else ["-", "-"]
        )
        what = f"{'16 / 8' if 'eighth' in row['model'] else '128 / 64'}, {row['what']}, {row['dtype']}"
        cells = [what, row["T"], f"{float(row['density']):.2g}", *stock]
        body.append([*cells, f"{float(row['ms']) / 1e3:.2g} s", _mib(row["mb"]), *ratio])
    head = [
        "heads of attention / indexer",
        "T",
        "density",
        "stock",
        "memory",
        "ours",
        "memory",
        "time",
        "memory",
    ]
    return table(head, body)


KEYS = {"dense": "all", "indexer": "of the indexer", "random": "random", "last": "the last"}


def learned() -> str:
    """What an indexer finds of a trained model's attention, and how the model reads with it."""
    body = []
    for row in rows("learned-indexer"):
        if row["stage"] != "warm-up" or row["keys"] == "indexer":  # which moves nothing else
            body.append([row["stage"], KEYS[row["keys"]], f"{float(row['recall']):.3f}", row["bpb"]])
    return table(["after", "keys", "recall", "bits per byte"], body)


def _mib(cell: str) -> str:
    return f"{float(cell):.0f} MiB"


def _rows_of(model: str) -> list[dict[str, str]]:
    found = [row for row in rows("transformers") if row["model"].startswith(model)]
    return sorted(found, key=lambda row: (row["model"], row["what"], row["dtype"], int(row["T"])))


def imports() -> str:
    """Who may import whom, from the table that tests/support/test_imports.py holds, as far as it is there.

    What follows from other arrows is left out, and programs may import everything.
    """
    path = DOCS.parent / "tests" / "support" / "test_imports.py"
    spec = importlib.util.spec_from_file_location("test_imports", path)
    assert spec is not None and spec.loader is not None
    held = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(held)
    there = {part for part in held.MAY_IMPORT if part not in ("__init__", "__main__")}
    below = {
        part: {x for x in held.MAY_IMPORT[part] if x in there} - {part}
        for part in sorted(there)
        if "*" not in held.MAY_IMPORT[part]
    }

    def under(part: str) -> set[str]:
        return below[part].union(*map(under, below[part]))

    arrows = [(x, part) for part, own in below.items() for x in sorted(own - set().union(*map(under, own)))]
    programs = sorted(part for part in there if part not in below)
    tops = sorted(set(below) - {x for x, _ in arrows})
    node = {part: part.replace(".", "_") for part in below}
    lines = [f'  {node[part]}["{part}"]' for part in sorted(below) if node[part] != part]
    lines += [f"  {node[x]} --> {node[part]}" for x, part in sorted(arrows)]
    lines += [f'  {node[part]} --> programs["{", ".join(programs)}"]' for part in tops]
    return "```mermaid\ngraph LR\n" + "\n".join(lines) + "\n```"


@cache
def derivation(name: str) -> fusion.Derivation:
    """How a program is fused where only bytes count, as `sparseflash fuse` shows it."""
    return fusion.fuse(fusion.GOLDEN[name](), fusion.SIZES[name], tiers=fusion.BYTES)


def fused() -> str:
    """A fused layer as row tiles, beside eager torch and torch.compile."""
    body = []
    for case in dict.fromkeys(row["case"] for row in rows("fusion")):
        cells = [f"{figure('fusion', 'ms', case=case, dtype=dtype):.0f} ms" for dtype in DTYPES]
        cells += [f"{figure('fusion', 'ratio', case=case, dtype=dtype):.2f}x" for dtype in DTYPES]
        cells += [f"{figure('fusion', 'mib', case=case, dtype=dtype):.0f} MiB" for dtype in DTYPES]
        body.append([case, *cells])
    kinds = ("time", "over eager", "memory")
    return table(["", *(f"{kind}, {dtype}" for kind in kinds for dtype in DTYPES)], body)


BLOCKS = {
    **{
        f"fusion-{name}": lambda name=name: f"```\n{derivation(name).explain()}\n```"
        for name in fusion.GOLDEN
    },
    "fusion": fused,
    "layers": layers,
    "dsa": dsa,
    "learned": learned,
    "brings": brings,
    "ways": ways,
    **{f"door-{name}": door(text) for name, text in SAID.items()},
    "mqar": mqar,
    "claim": claim,
    "claim-mqar": claim_mqar,
    "breakeven": breakeven,
    "coverage": coverage,
    "pixels": pixels,
    "prediction": prediction,
    "masks": masks,
    "long-run": long_run,
    "peak": peak,
    "levels": levels,
    "levels-amx": partial(levels, "amx", "bf16"),
    "kernels": kernels,
    "rates": rates,
    "attention": attention,
    "experiments": experiments,
    "imports": imports,
    "selection": selection,
    "prefill": prefill,
    "gates": gates,
    "layers-clusters": layers_clusters,
    "layers-lengths": layers_lengths,
    **{f"layers-{part}": partial(by_seed, f"layers-{part}", columns) for part, columns in LAYERS.items()},
    "layers-recall": layers_recall,
    "layers-weights": layers_weights,
    "layers-products": layers_products,
    "prompt-losses": prompt_losses,
    "prefill-8k": lambda: prefill("prefill-8k"),
    "budgets": budgets,
    "vllm": vllm,
    "caches": caches,
    "board": board_best,
    "board-tasks": board_tasks,
    "samples": samples,
    "ranks": ranks,
    **{f"vision-{part}": partial(vision, part) for part in ("links", "tokens", "plan", "features", "hrsam")},
    "diffusion-masked": partial(diffusion, "masked"),
    "diffusion-orders": partial(diffusion, "orders"),
    "diffusion-planted": partial(diffusion, "planted"),
    **{f"video-{x}": partial(video, x) for x in ("stages", "time", "capture")},
    "methods": methods_said,
    **{f"methods-{x}": partial(methods_of, f"methods-{x}") for x in ("chosen", "prompts", "caches", "near")},
}


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def made() -> dict[Path, str]:
    """Every page and picture as it has to be."""
    found = {}
    for page in PAGES:
        found[page] = re.sub(
            r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->)",
            lambda at: f"{at[1]}{BLOCKS[at[2]]()}\n{at[3]}",
            page.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
    for name in fusion.GOLDEN:
        for step, picture in derivation(name).pictures().items():
            found[DERIVATIONS / f"{name}-{step}.svg"] = picture
    for name, picture in DRAWN.items():
        found[PICTURES / f"{picture}.svg"] = figures.draw(rows(name), name)[f"{picture}.svg"]
    return found


def stale() -> list[str]:
    """Pages and pictures that are not what the results say."""
    return [
        str(path.relative_to(DOCS.parent))
        for path, text in made().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    """Write what is stale, or with --check name it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    old = stale()
    if parser.parse_args().check:
        raise SystemExit(f"stale, run make figures: {', '.join(old)}" if old else 0)
    for folder in (PICTURES, DERIVATIONS):
        folder.mkdir(parents=True, exist_ok=True)
    for path, text in made().items():
        write(path, text)
    sys.stdout.write("\n".join(old or ["nothing was stale"]) + "\n")


if __name__ == "__main__":
    main()
