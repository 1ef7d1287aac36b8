"""Layers of Transformers models at their real size, random weights: stock attention against "sparse".

One layer is measured: prefill (no gradients), or a training step (forward, backward, SGD), between an
embedding of few tokens and a norm, without a language head. A model of n such layers takes n times as long.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.bench import memory
from sparseflash.bench.cases import DTYPES
from sparseflash.bench.results import Row
from sparseflash.bench.timing import Box, Timing, seconds
from sparseflash.integrations.transformers.attention import SETTING
from sparseflash.integrations.transformers.control import attached

WHAT = ("prefill", "training step")
LIMIT = 13 << 30
"""Bytes above which the stock layer is not run."""
WARM = 256
"""Tokens of the call before the first round: it loads code and builds what is kept."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A layer to measure.

    Parameters
    ----------
    family : str
        Transformers' prefix of its config and model.
    config : dict
        Sizes.
    methods : dict
        What stands beside the stock layer, by name; None is the model's own choice of keys, streamed.
    held : float
        GiB that the stock layer holds for 1024 tokens squared, as measured; 0: linear.
    """

    family: str
    config: dict[str, Any]
    methods: dict[str, Any]
    held: float = 0.0

    def model(self, T: int, dtype: torch.dtype) -> nn.Module:
        """The layer, with random weights."""
        import transformers

        sizes = {"vocab_size": 256, "num_hidden_layers": 1, "use_cache": False, "max_position_embeddings": T}
        config = getattr(transformers, f"{self.family}Config")(**sizes, **self.config)
        torch.manual_seed(0)
        return getattr(transformers, f"{self.family}Model")(config).to(dtype)


def _dsa(heads: int, index_heads: int) -> Subject:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "index_n_heads": index_heads}
    mlp = {"intermediate_size": 64, "first_k_dense_replace": 1}  # the experts are not what is measured
    return Subject("DeepseekV32", sizes | mlp, {"its own choice, streamed": None}, held=1.5 * heads / 128)


SUBJECTS = {
    "Qwen2-0.5B": Subject(
        "Qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        {f"hash-sparse, {nb} buckets": sf.methods.HashSparse(nb=nb) for nb in (4, 10)},
    ),
    "DeepSeek-V3.2": _dsa(128, 64),
    "DeepSeek-V3.2, an eighth of the heads": _dsa(16, 8),
}


def measure(
    wanted: Sequence[tuple[str, str, str, int]],
    *,
    rounds: int = 3,
    minutes: float = 6.0,
    subjects: dict[str, Subject] = SUBJECTS,
    on_run: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure what is wanted, each a layer, a dtype, one of `WHAT` and a length, in turn with stock.

    Yields
    ------
    dict
        A row for each method: `ms` of the layer and `mb` beyond what it holds before, both also of the stock
        layer (sdpa), and the ratios (median over the rounds); `density` of what the layer's queries see.
    """
    box = Box(minutes * 60)
    for number, (name, dtype, what, T) in enumerate(wanted):
        share = Box(box.left / (len(wanted) - number))
        subject = subjects[name]

        def say(text: str, at: str = f"{name}, {dtype}, {what}, T = {T}") -> None:
            on_run(f"{at}: {text}")

        yield from _compare(name, subject, dtype, what, T, rounds, share, say)


def _compare(
    name: str,
    subject: Subject,
    dtype: str,
    what: str,
    T: int,
    rounds: int,
    box: Box,
    on_run: Callable[[str], None],
) -> Iterator[Row]:
    model = subject.model(T, DTYPES[dtype])
    ids = torch.randint(256, (1, T), generator=torch.Generator().manual_seed(0))
    layers = {method: _Layer(model, how) for method, how in subject.methods.items()}
    held = int(subject.held * (T / 1024) ** 2 * 2**30)
    if held < LIMIT:
        layers = {"stock": _Layer(model, "sdpa"), **layers}
    runs = {x: lambda size, layer=layer: layer(ids[:, :size], what) for x, layer in layers.items()}
    timings, peaks = _rounds(runs, T, rounds, box, on_run)
    for method in subject.methods:
        own = timings[method]
        row: Row = {"bench": "transformers", "model": name, "what": what, "method": method, "dtype": dtype}
        row |= {"T": T, "layers": 1, "density": layers[method].density(T), "ms": own.median * 1e3}
        row |= {"mb": peaks[method] / 2**20}
        if "stock" in runs:
            stock = timings["stock"]
            row |= {"ms_stock": stock.median * 1e3, "ratio": stock.over(own)}
            row |= {"mb_stock": peaks["stock"] / 2**20, "mb_ratio": peaks["stock"] / max(peaks[method], 1)}
        else:
            row["note"] = f"the stock layer would hold about {held / 2**30:.0f} GiB: not run"
        yield row | {"rounds": len(own.times)}


def _rounds(
    runs: dict[str, Callable[[int], Any]], T: int, rounds: int, box: Box, on_run: Callable[[str], None]
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Time and peak memory of every run, in turn; at least one round, whatever the box says."""
    timings, peaks = {name: Timing(0.0) for name in runs}, dict.fromkeys(runs, 0)
    for run in runs.values():
        run(min(T, WARM))
    began = box.left
    for number in range(rounds):
        if number and box.left < (began - box.left) / number:
            break
        for name, run in runs.items():
            on_run(f"round {number + 1}, {name}")

            def timed(run: Callable[[int], Any] = run, times: list[float] = timings[name].times) -> None:
                times.append(seconds(lambda: run(T)))

            peaks[name] = max(peaks[name], memory.peak(timed))
    return timings, peaks


class _Layer:
    """The layer under "sdpa", under a method, or (None) under its own indexer, streamed."""

    def __init__(self, model: Any, how: Any) -> None:
        self.model, self.how, self.plan = model, how, None

    def __call__(self, ids: Tensor, what: str) -> None:
        with self._attention():
            if what == "prefill":
                with torch.no_grad():
                    self.model(ids)
                return
            optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
            self.model(ids).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        if self.how == "sdpa":
            self.model.set_attn_implementation("sdpa")
            yield
        elif self.how is None:
            self.model.set_attn_implementation("sparse")
            with sf.transformers.streamed(self.model):
                yield
        else:
            with sf.transformers.sparse(self.model, prefill=self.how):
                [layer] = sf.transformers.attention_layers(self.model)
                setting = getattr(layer.module, SETTING)
                with attached([layer], [dataclasses.replace(setting, watch=self._keep)]):
                    yield

    def _keep(self, method: Any, heads: Any, q: Tensor, k: Tensor, plan: Any, full: Any) -> None:
        (self.plan,) = plan

    def density(self, T: int) -> float:
        """Visible pairs over the causal ones, of the last call."""
        if self.plan is not None:
            return self.plan.density
        topk = min(self.model.config.index_topk, T)
        return (topk * (topk + 1) / 2 + (T - topk) * topk) / (T * (T + 1) / 2)
