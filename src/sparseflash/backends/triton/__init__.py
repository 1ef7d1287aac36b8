"""Triton backend: exact flash attention over any plan, for NVIDIA and AMD GPUs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .blocks import MAX_DIM, WHOLE
from .common import INTERPRETED
from .linear import linear_backward, linear_forward
from .pages import page_scores
from .softmax import backward, decode, forward
from .statistics import stats
from .stick import stick_backward, stick_forward
from .trust import caution, standing

__all__ = [
    "DTYPES",
    "NAME",
    "backward",
    "caution",
    "decode",
    "forward",
    "linear_backward",
    "linear_forward",
    "page_scores",
    "refuse",
    "standing",
    "stats",
    "status",
    "stick_backward",
    "stick_forward",
]

NAME = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def status() -> tuple[bool, str]:
    """Return True if there is a GPU (or the interpreter stands in for one), and its name or the reason."""
    if INTERPRETED.value:
        return True, f"Triton {triton.__version__}, interpreted on the CPU: for tests, slow"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA or ROCm device"
    return True, f"Triton {triton.__version__}, {torch.cuda.get_device_name()}"


def refuse(*tensors: Tensor) -> list[str]:
    """List the reasons why an op on these tensors cannot run here."""
    q, reasons = tensors[0], []
    if INTERPRETED.value:
        if q.device.type != "cpu":
            reasons.append(f"tensors are on {q.device}, and TRITON_INTERPRET=1 runs kernels on the CPU")
        if q.dtype == torch.bfloat16:
            reasons.append("the interpreter gets bf16 wrong (it truncates): use fp32 or fp16 there")
    elif q.device.type != "cuda":
        reasons.append(f"tensors are on {q.device}")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} (fp32, bf16, fp16 run here)")
    if (largest := max(x.shape[-1] for x in tensors)) > MAX_DIM:
        reasons.append(f"head dimension {largest} (up to {MAX_DIM} run here)")
    elif len(tensors) > 2 and tensors[2].shape[-1] > WHOLE:
        reasons.append(f"values of {tensors[2].shape[-1]} dimensions (up to {WHOLE} run here)")
    return reasons
