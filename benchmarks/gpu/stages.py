"""The stages, in the order in which they are worth their minutes."""

from __future__ import annotations

from . import conformance, kernels, quality, scfa, training, tuning
from .task import Stage

STAGES = {
    "check": Stage(
        conformance.check, 9, "every kind of plan against fp64, all dtypes; thirty repeats, bit for bit", True
    ),
    "device": Stage(
        conformance.device, 2, "plans made on the card without a wait for the host; CUDA graphs", True
    ),
    "dense": Stage(kernels.dense, 8, "dense causal over cuDNN, flash and FlexAttention, D 64 and 128"),
    "blocks": Stage(kernels.blocks, 9, "block-sparse at density 1, .5, .25 and .1 over the same"),
    "decode": Stage(kernels.decode, 4, "bandwidth of decoding over a measured copy; latency in a CUDA graph"),
    "hash": Stage(scfa.hashed, 8, "SCFA: hash-sparse over length and buckets (E1, E1b), all included"),
    "qk": Stage(scfa.kept, 7, "SCFA: QK-sparse over length and dropped share (E3), all included"),
    "train": Stage(training.steps, 8, "SCFA: steps of the 122M model, dense against hash and QK (E9, E10)"),
    "quality": Stage(quality.quality, 7, "loss of the 122M model: dense, window and hash, window and chance"),
    "tune": Stage(tuning.tune, 12, "blocks of the kernels by D, unit and dtype"),
    "sanitize": Stage(conformance.sanitize, 6, "compute-sanitizer: memcheck and racecheck", True),
}
