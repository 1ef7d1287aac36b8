"""Options of distributed calls, as of `sparseflash.attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor


class Options(TypedDict, total=False):
    """Keyword options of a distributed call."""

    scale: float | None
    softcap: float | None
    key_bias: Tensor | None
    sink_logits: Tensor | None
    alibi_slopes: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    out_dtype: torch.dtype | None
    backend: str | None
    return_lse: bool
    ctx: Mapping[str, Any] | None
