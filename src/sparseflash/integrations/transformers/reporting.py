"""`report(model, ...)`: density, recall of dense attention, and time of each layer and head."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...cache import Evicting
from ...cache.base import Attended
from ...methods.base import Method
from ...ops.attention import attention
from ...ops.stats import attention_stats
from .._host import exact
from .._sessions import Sessions
from .attention import SETTING
from .control import OVERHEARD, Setting, attached, on_sparse
from .layers import Layer, attention_layers, bare
from .mask import SparseMask
from .tokens import heard


@dataclasses.dataclass(frozen=True)
class Row:
    """Measurements of one layer in one call.

    Parameters
    ----------
    layer, index : str, int
        Name and index of the layer.
    methods : tuple of str
        Method of each head; "dense" if none.
    density : tuple of float
        Visible pairs over the pairs that the model's mask shows, by query head.
    recall : tuple of float
        Share of the dense softmax's mass on visible pairs, by query head, mean over queries. NaN for a cache
        that no longer has the other keys (`sparseflash generate --by-layer` measures beside a dense one).
    seconds, dense_seconds : float
        Time of the call, selection included; and of dense attention on the same tensors, NaN if a cache
        attends.
    notes : mapping
        What the methods say of each head (`Method.notes`), by name; NaN for heads without.
    """

    layer: str
    index: int
    methods: tuple[str, ...]
    density: tuple[float, ...]
    recall: tuple[float, ...]
    seconds: float
    dense_seconds: float
    notes: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of all calls, in order; `print` shows one line each."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [f"{'layer':<28} {'density':>18} {'recall':>18} {'ms':>8} {'dense ms':>9}  method"]
        for row in self.rows:
            names = " | ".join(dict.fromkeys(row.methods))
            lines.append(
                f"{row.layer[-28:]:<28} {_span(row.density):>18} {_span(row.recall):>18} "
                f"{row.seconds * 1e3:>8.2f} {row.dense_seconds * 1e3:>9.2f}  {names}"
            )
        return "\n".join(lines + self.remarks)

    @property
    def remarks(self) -> list[str]:
        """A line for each method that left nothing out in some calls: their tokens are within its budget."""
        whole: dict[str, list[str]] = {}
        for row in self.rows:
            for name in dict.fromkeys(row.methods):
                seen = [x for own, x in zip(row.methods, row.density, strict=True) if own == name]
                if name != "dense" and all(x == 1 for x in seen):
                    whole.setdefault(name, []).append(row.layer)
        return [
            f"{name} left nothing out in {len(layers)} of {len(self.rows)} calls ({layers[0]} first): the "
            "prompt is no longer than its budget, so these ran dense"
            for name, layers in whole.items()
        ]


def _span(x: Sequence[float]) -> str:
    return f"{sum(x) / len(x):.3f} ({min(x):.2f}-{max(x):.2f})"


def report(model: Any, **inputs: Any) -> Report:
    """Run a model once and measure every attention layer: density, recall, time.

    Inside `sparse(model, ...)` it measures the methods set there. It takes several times as long as a call,
    O(S) memory, and no gradients.

    Parameters
    ----------
    model : PreTrainedModel
    **inputs
        Arguments of the model's forward.

    Returns
    -------
    Report
        One row for each call of an attention layer.

    Examples
    --------
    >>> import torch, sparseflash as sf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> with sf.transformers.sparse(model, prefill=sf.methods.SinkWindow(window=16), layers=[0]):
    ...     found = sf.transformers.report(model, input_ids=torch.arange(200)[None])
    >>> [max(row.density) < 0.3 for row in found]
    [True, False]
    """
    with torch.no_grad(), measuring(model) as rows:
        model(**inputs)
    return Report(tuple(rows))


@contextlib.contextmanager
def measuring(model: Any, queries: int | None = None, dense: bool = True) -> Iterator[list[Row]]:
    """Record a row for every call of an attention layer inside the block, as in `report`.

    Parameters
    ----------
    model : PreTrainedModel
    queries : int, optional
        Measure density and recall on this many queries, one drawn from each part of the prompt: with 512 they
        differ from those of all queries by less than .001. None: all queries.
    dense : bool
        Whether to time dense attention on the same tensors; else `dense_seconds` is NaN.

    Yields
    ------
    list of Row
        Filled while the block runs.
    """
    model = bare(model)
    layers = attention_layers(model)
    sheet = _Sheet(queries, dense)
    probes = [
        _Probe(layer, getattr(layer.module, SETTING, None) or Setting(layer), sheet) for layer in layers
    ]
    with on_sparse(model), heard(model) as ear, attached(layers, probes, ear):
        yield sheet.rows


@dataclasses.dataclass
class _Sheet:
    """State shared by all probes: options, rows, and the calls that are warmed up."""

    queries: int | None
    dense: bool
    rows: list[Row] = dataclasses.field(default_factory=list)
    warm: set[Any] = dataclasses.field(default_factory=set)


class _Probe:
    """Replaces the setting of a layer: times it and watches its plans."""

    def __init__(self, layer: Layer, setting: Setting, sheet: _Sheet) -> None:
        self.layer, self.setting, self.sheet = layer, setting, sheet

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: SparseMask, options: dict[str, Any]
    ) -> Tensor:
        H = q.shape[1]
        names = ["dense"] * H
        sums = torch.zeros(H, 4, dtype=torch.float64)  # pairs: visible, all; mass; queries
        watching = 0.0
        notes: dict[str, list[float]] = {}

        def watch(method: Any, heads: Sequence[int], q: Tensor, k: Tensor, plan: Any, full: Any) -> None:
            """Called once for the whole batch, or once for each group of sequences."""
            nonlocal watching
            if method is not None:
                found, spent = _timed(lambda: self._seen(q, k, plan, full, options), q)
                sums[list(heads)] += found
                watching += spent
                ctx = {name: options[name] for name in ("scale", "softcap")} | {"q_offset": mask.offset}
                own, note = _timed(lambda: _notes(method, q, k, ctx | {"layer": self.layer.index}), q)
                watching += note
                for name, said in own.items():
                    each = notes.setdefault(name, [float("nan")] * H)
                    for head, x in zip(heads, said.tolist(), strict=True):
                        each[head] = x
                for head in heads:
                    names[head] = repr(method)

        told = vars(module).get(OVERHEARD)

        def run(**changes: Any) -> Tensor:
            vars(module)[OVERHEARD] = told
            return dataclasses.replace(self.setting, **changes)(module, q, k, v, mask, options)

        key = (repr(self.setting.prefill), repr(self.setting.decode), q.shape, k.shape)
        if key not in self.sheet.warm:  # excludes one-off builds from the time
            self.sheet.warm.add(key)
            run(sessions=Sessions())
            exact(q, k, v, mask.plan, options)
        if mask.padded is None:
            out, seconds = _timed(lambda: run(watch=watch), q)
            seconds -= watching
        else:  # watching disables batching of padded rows
            run(watch=watch, sessions=Sessions())
            out, seconds = _timed(run, q)
        dense = float("nan")
        if self.sheet.dense:
            _, dense = _timed(lambda: exact(q, k, v, mask.plan, options), q)
        shares = sums[:, 0::2] / sums[:, 1::2].clamp(min=1)
        shares[torch.tensor([name == "dense" for name in names])] = 1.0
        density, recall = shares.T.tolist()
        self.sheet.rows.append(
            Row(
                self.layer.name,
                self.layer.index,
                tuple(names),
                tuple(density),
                tuple(recall),
                seconds,
                dense,
                {name: tuple(each) for name, each in notes.items()},
            )
        )
        return out

    @property
    def decode(self) -> Any:
        """The method of the layer for single queries."""
        return self.setting.decode

    def of_cache(self, layer: Attended, q: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """A row of a cache that attends itself: what it holds of the tokens; of the rest it knows nothing."""
        out, seconds = _timed(run, q)
        H, nan = q.shape[1], float("nan")
        density, recall, name = (1.0,) * H, (1.0,) * H, "dense"
        if isinstance(layer, Evicting):
            share = (layer.held.double() / layer.real.clamp(min=1)[:, None]).mean(0)
            density = tuple(share.repeat_interleave(H // len(share)).tolist())
            recall, name = (1.0 if (share == 1).all() else nan,) * H, repr(layer.policy)
        row = Row(self.layer.name, self.layer.index, (name,) * H, density, recall, seconds, nan)
        self.sheet.rows.append(row)
        return out

    def _seen(self, q: Tensor, k: Tensor, plan: Any, full: Any, options: dict[str, Any]) -> Tensor:
        """For each head [Hq, 4]: visible pairs, all pairs, mass on visible pairs, queries."""
        T, n = q.shape[2], self.sheet.queries
        if n is not None and n < T:
            edges = torch.linspace(0, T, n + 1, dtype=torch.float64).long()
            drawn = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            rows = (edges[:-1] + (drawn * edges.diff()).long()).to(q.device)
            parts = plan if isinstance(plan, tuple) else (plan,)
            q, plan = q[:, :, rows], tuple(one.restrict(rows) for one in parts)
            full = full.restrict(rows)
        found = (_density(q, k, plan), _density(q, k, full), *_recall(q, k, plan, full, options))
        return torch.stack(found, -1).cpu()


def _notes(method: Method, q: Tensor, k: Tensor, ctx: dict[str, Any]) -> dict[str, Tensor]:
    """What a method says of its heads, told what it reads of `ctx`."""
    return method.notes(q, k, {name: x for name, x in ctx.items() if name in method.reads})


def _timed(call: Any, q: Tensor) -> tuple[Any, float]:
    wait = (lambda: None) if q.device.type == "cpu" else torch.accelerator.synchronize
    wait()
    start = time.perf_counter()
    out = call()
    wait()
    return out, time.perf_counter() - start


def _density(q: Tensor, k: Tensor, plan: Any) -> Tensor:
    """Number of visible pairs per head [Hq], as the sum of weights exp(0)."""
    q, k, lse = torch.zeros_like(q), torch.zeros_like(k), q.new_zeros(q.shape[:3], dtype=torch.float32)
    parts = plan if isinstance(plan, tuple) else (plan,)
    return sum(attention_stats(q, k, lse, one, over="row").sum((0, 2), dtype=torch.float64) for one in parts)


def _recall(q: Tensor, k: Tensor, plan: Any, full: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Dense softmax mass that a plan keeps, summed over queries, and the number of queries: [Hq] each."""
    same = {name: options[name] for name in ("scale", "softcap")}
    part, whole = (attention(q, k, k, x, return_lse=True, **same)[1] for x in (plan, full))
    real = whole > float("-inf")
    share = torch.where(real, torch.exp(part - torch.where(real, whole, 0)), 0)
    return share.sum((0, 2), dtype=torch.float64), real.sum((0, 2)).double()
