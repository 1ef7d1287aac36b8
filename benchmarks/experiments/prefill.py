"""Prefill methods on the queries and keys of a pretrained model: time, density, recall and error in one row.

Selection is inside the time. Beside each method stand two controls of its density: a window, and blocks drawn
at random. A method that keeps no more of the attention mass than they do has found nothing. `density` is
visible pairs over those of causal attention, `recall` the share of dense attention's mass on the visible
pairs, mean over queries; `gain` is dense attention's time over that of selecting and attending.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import methods
from sparseflash.bench import capture
from sparseflash.bench.quality import Dense, density
from sparseflash.bench.results import Row
from sparseflash.methods.base import Method, Selection

LAYERS = (4, 15, 21)
METHODS: Mapping[str, Method] = {
    "tri-shape": methods.TriShape(sinks=128, window=512),
    "block-topk": methods.BlockTopK(),
    "xattention": methods.XAttention(),
    "flashprefill": methods.FlashPrefill(dense_tiles=0),
    "minference": methods.MInference(vertical=200, slash=300),
    "minference, summed": methods.MInference(vertical=200, slash=300, share="sum"),
    "minference, summed, near 30": methods.MInference(vertical=200, slash=300, share="sum", near=30),
    "minference, largest": methods.MInference(vertical=200, slash=300, share="max"),
    "flexprefill": methods.FlexPrefill(),
    "flexprefill, halo": methods.FlexPrefill(halo=True),
    "anchor-attention": methods.AnchorAttention(),
    "anchor-attention, theta 5": methods.AnchorAttention(theta=5.0),
    "pbs-attn": methods.PBSAttn(),
    "blasst": methods.BLASST(),
    "blasst, factor 1000": methods.BLASST(factor=1000),
}
LONG: Mapping[str, Method] = METHODS | {
    "tri-shape": methods.TriShape(sinks=128, window=1024),
    "minference": methods.MInference(vertical=500, slash=700),
    "minference, summed": methods.MInference(vertical=500, slash=700, share="sum"),
    "minference, summed, near 30": methods.MInference(vertical=500, slash=700, share="sum", near=30),
    "minference, summed, 96 rows": methods.MInference(vertical=500, slash=700, share="sum", last=96),
    "minference, largest": methods.MInference(vertical=500, slash=700, share="max"),
    "anchor-attention, theta 5": methods.AnchorAttention(theta=5.0, step=4),
    "anchor-attention, theta 5, pooled": methods.AnchorAttention(theta=5.0, step=4, anchor="pooled"),
}
"""From 8192 tokens on."""


def methods_of(length: int) -> Mapping[str, Method]:
    """What is tried at a length, by name."""
    return LONG if length >= 8192 else METHODS


def window_of(T: int, wanted: float) -> Method:
    """The window whose density over T tokens comes next to the one that is wanted."""
    width = next(w for w in range(1, T + 1) if (w * T - w * (w - 1) / 2) / (T * (T + 1) / 2) >= wanted)
    return methods.Window(window=width)


def random_plan(shape: tuple[int, int], T: int, wanted: float) -> sf.Plan:
    """Blocks of 64 drawn at random, but for each tile's own, at that density."""
    grid = sf.selection.Grid(T, T, 64, 64)
    near, reach = grid.near(), grid.reach()
    left = (wanted * float(reach.sum()) - float(near.sum())) / float((reach & ~near).sum())
    draw = torch.rand(*shape, grid.tiles, grid.units, generator=torch.Generator().manual_seed(0))
    return grid.plan((draw < left) & reach | near)


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    *,
    name: str = "smollm2",
    length: int = 4096,
    rounds: int = 5,
    threads: int = 0,
    text: Path | None = None,
    skip: int = 0,
    cases: Sequence[str] = (),
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """One row a method: means over the layers of a capture, times of rounds in which all take turns.

    Of `cases`, if any are named. With a text (from character `skip` on), `name` is a model, and layers 4, 15
    and 21 are listened to.
    """
    tried = {name: method for name, method in methods_of(length).items() if name in cases or not cases}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        layers = list(_layers(name, length, text, skip))
        found: dict[str, Row] = {}
        spent: dict[str, list[list[float]]] = {case: [[], [], []] for case in tried}
        for at, layer in enumerate(layers):
            selections = {
                case: m.select(layer.q, layer.k, {"scale": layer.scale}) for case, m in tried.items()
            }
            for n in range(rounds):
                for case, method in tried.items():
                    runs = timed(layer, method, selections[case])
                    for times, run in zip(spent[case], runs, strict=True):
                        times.append(seconds(run))
                on_run(f"layer {at + 1} of {len(layers)}, round {n + 1}")
            for case in tried:
                row = found.setdefault(case, {})
                for figure, value in quality(layer, tried[case], selections[case]).items():
                    row[figure] = float(row.get(figure) or 0) + value / len(layers)
        shape: Row = {"bench": "prefill", "capture": name, "T": length, "rounds": rounds}
        if text is not None:
            shape |= {"text": text.stem, "skip": skip}
        for case, row in found.items():
            dense, select, attend = (
                sum(min(times[n * rounds : (n + 1) * rounds]) for n in range(len(layers))) / len(layers)
                for times in spent[case]
            )
            whole = select + attend
            yield shape | {"case": case, "method": repr(tried[case])} | row | {
                "ms_dense": dense * 1e3, "ms_select": select * 1e3, "ms_attend": attend * 1e3,
                "share": select / whole, "gain": dense / whole,
            }  # fmt: skip
    finally:
        torch.set_num_threads(before)


def _layers(name: str, length: int, text: Path | None, skip: int) -> Iterator[capture.Layer]:
    if text is None:
        captured = capture.load(name)
        yield from (captured.layer(n, tokens=length) for n in captured.layers)
        return
    words = text.read_text(encoding="utf-8", errors="replace")[skip:]
    tensors, about = capture.of_model(name, words, length, LAYERS)
    said = json.loads(about["layers"])
    for n in LAYERS:
        q, k, v = (tensors[f"layer.{n}.{x}"].float().contiguous() for x in "qkv")
        yield capture.Layer(q, k, v, said[str(n)]["scale"])


def timed(layer: capture.Layer, method: Method, selection: Selection) -> tuple[Callable[[], Any], ...]:
    """Dense attention, selecting, and attending over what was selected."""
    q, k, v, scale = layer.q, layer.k, layer.v, layer.scale
    return (
        lambda: sf.attention(q, k, v, causal=True, scale=scale),
        lambda: method.select(q, k, {"scale": scale}),
        lambda: method(q, k, v, scale=scale, selection=selection),
    )


def quality(layer: capture.Layer, method: Method, selection: Selection) -> dict[str, float]:
    """Density, recall and error of a selection, and the recall of its two controls."""
    k, v, T = layer.k, layer.v, layer.q.shape[2]
    q = layer.q * (layer.scale * layer.q.shape[-1] ** 0.5)  # so that the default scale is the model's
    plan = method.shown(q, k, selection)
    dense, kept = Dense.of(q, k, v), density(plan)
    out: Tensor = method(q, k, v, selection=selection)
    share = {}
    if isinstance(method, methods.FlexPrefill):  # of heads that the pattern test calls query-aware
        share["aware"] = float((method.distances(q, k) < method.tau).float().mean())
    return share | {
        "density": kept,
        "recall": dense.recall(q, k, v, plan),
        "error": dense.error(out),
        "window_recall": dense.recall(q, k, v, window_of(T, kept).select(q, k).plan),
        "random_recall": dense.recall(q, k, v, random_plan((1, q.shape[1]), T, kept)),
    }
