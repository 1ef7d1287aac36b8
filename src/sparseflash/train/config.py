"""The configuration of a training run: one frozen dataclass, saved as JSON inside every checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sparseflash.train.errors import TrainError

DTYPES = ("fp32", "bf16")
QK = ("untied", "tied")
OBJECTIVES = ("next", "masked")

# Fields that must not change on resume: the weights would not fit, or it would be another run.
SHAPE = ("objective", "length", "layers", "width", "heads", "qk", "rope_base")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, model, attention, optimiser.

    Parameters
    ----------
    data : str
        A text file, or a directory that is searched for text files.
    attention : str
        Sequence mixer of each layer: ``"dense"`` (torch SDPA), the slug of a trainable method, e.g.
        ``"hash-sparse"``, or of a layer, e.g. ``"lightning-attention"``; or a pattern that the layers repeat
        in turn: ``"sink-window*2,dense"``. Names are looked up in ``methods``, then in ``nn``.
    options : dict
        Hyper-parameters of the mixers. ``option`` applies to every name that has it, ``name.option`` to that
        one.
    length, batch, accumulate : int
        Tokens (bytes) per sequence; sequences per forward pass and process; passes per optimiser step.
    steps : int
        Optimiser steps of the whole run; the cosine schedule ends there.
    layers, width, heads : int
        Model shape. ``width / heads`` is the head dimension and must be even (RoPE).
    qk : str
        ``"untied"``: separate, RMS-normalised q and k. ``"tied"``: ``k = q / |q|`` per head, as in the
        sparse-causal-flash-attention paper.
    dtype : str
        ``"fp32"``, or ``"bf16"`` for autocast (weights and optimiser stay fp32).
    lr, warmup, weight_decay, clip : float
        Peak learning rate; warm-up as a fraction of ``steps``; decoupled decay of matrices;
        gradient norm limit.
    seed : int
        Fixes initial weights, batches and the methods' random planes.
    rope_base : float
        Base of the rotary frequencies; a larger one rotates slower and reaches further.
    eval_length : int
        Bytes of a validation sequence; 0 means ``length``. Longer ones are read in parts of ``length``, with
        a state carried from part to part, if the attention has a state; else in one pass.
    context_parallel : int
        Processes that share each sequence (under ``torchrun``); 1: every process has its own sequences.
    dropout : float
        Share in [0, 1) of attention weights to drop in training. Each step, pass and sequence draws its own
        mask: processes differ, and a resumed run draws what the original would have drawn.
    objective : str
        ``"next"``: predict the next byte; ``"masked"``: fill in masked bytes, seeing both sides (a
        masked-diffusion language model, see `sparseflash.train.masked`).
    eval_every, eval_sequences, save_every : int
        Steps between validations; held-out sequences per validation; steps between checkpoints.
    """

    data: str
    attention: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)
    length: int = 1024
    batch: int = 1
    accumulate: int = 1
    steps: int = 200
    layers: int = 4
    width: int = 256
    heads: int = 4
    qk: str = "untied"
    dtype: str = "fp32"
    lr: float = 4e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 50
    eval_sequences: int = 4
    save_every: int = 100
    context_parallel: int = 1
    dropout: float = 0.0
    rope_base: float = 10_000.0
    eval_length: int = 0
    objective: str = "next"

    def __post_init__(self) -> None:
        for broken, message in self._problems():
            if broken:
                raise TrainError(message)

    def _problems(self) -> list[tuple[bool, str]]:
        positive = ("length", "batch", "accumulate", "steps", "layers", "width", "heads")
        positive += ("eval_every", "eval_sequences", "save_every", "context_parallel")
        table = [
            (
                getattr(self, name) < 1,
                f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1",
            )
            for name in positive
        ]
        heads = max(self.heads, 1)
        fitting = max(self.width // heads, 1) * heads
        dim = self.width // heads
        return table + [
            (
                self.width % heads != 0,
                f"--width {self.width} is not divisible by --heads {self.heads}; "
                f"use --width {fitting + heads}",
            ),
            (
                dim % 2 != 0,
                f"--width {self.width} / --heads {self.heads} gives head dimension {dim}, which is odd, "
                f"and rotary positions need an even one; use --width {(dim + 1) * heads}",
            ),
            (self.qk not in QK, f"--qk {self.qk!r} is unknown; choose one of: {', '.join(QK)}"),
            (
                self.objective not in OBJECTIVES,
                f"--objective {self.objective!r} is unknown; choose one of: {', '.join(OBJECTIVES)}",
            ),
            (
                self.objective == "masked" and self.context_parallel > 1,
                "--objective masked does not go with --context-parallel, which is causal; leave one out",
            ),
            (
                self.dtype not in DTYPES,
                f"--dtype {self.dtype!r} is unknown; choose one of: {', '.join(DTYPES)}",
            ),
            (
                not 0 <= self.dropout < 1,
                f"--dropout is {self.dropout}; expected a share of 0 up to, not including, 1",
            ),
            (not self.rope_base > 0, f"--rope-base is {self.rope_base}; expected a positive number"),
            (self.eval_length < 0, f"--eval-length is {self.eval_length}; expected at least 0"),
            (
                self.eval_length > 0 and self.context_parallel > 1,
                "--eval-length does not go with --context-parallel, whose ranks share sequences of --length",
            ),
            (not self.lr > 0, f"--lr is {self.lr}; expected a positive number such as 0.002"),
            (not 0 <= self.warmup <= 1, f"--warmup is {self.warmup}; expected a fraction of the run, 0 to 1"),
        ]

    def to_json(self) -> str:
        """Write every field as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote; unknown fields (of later versions) are ignored.

        Raises
        ------
        TrainError
            If a value has another type than the field, or no run can have it.
        """
        given = json.loads(text)
        if not isinstance(given, dict):
            raise TrainError(f"the config is {given!r}: expected a JSON object")
        known = {f.name: f for f in fields(cls) if f.name in given}
        if "data" not in known:
            raise TrainError("the config has no data")
        for name, f in known.items():
            want = type(f.default_factory() if name == "options" else "" if name == "data" else f.default)
            value = given[name]
            if not (type(value) is want or (want is float and type(value) is int)):
                raise TrainError(f"the config has {name} = {value!r}: expected {want.__name__}")
        return cls(**{name: given[name] for name in known})
