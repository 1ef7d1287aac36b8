"""Every sparse attention method, exact forward and backward, over one small set of fast kernels."""

import importlib
from typing import Any

# The subpackage first: loading it later would take the function's name.
from . import backends as _backends  # noqa: F401
from . import methods
from .dispatch import backends
from .errors import BackendError, PlanError, SparseFlashError
from .explain import explain
from .methods.training.hash_sparse import hash_sparse_attention
from .methods.training.qk_sparse import qk_sparse_attention
from .ops.attention import attention, attention_backward
from .ops.decode import decode
from .ops.indexer import indexer_topk
from .ops.indexer_loss import indexer_kl_loss
from .ops.jagged import jagged_attention
from .ops.linear import linear_attention
from .ops.merge import merge
from .ops.pointwise import pointwise_attention
from .ops.stats import attention_stats
from .ops.stick_breaking import stick_breaking
from .ops.varlen import attention_varlen
from .packing import PackingCollator, cu_seqlens_of
from .plan import Plan

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`sf.transformers`, loaded when it is first asked for: it imports Transformers."""
    if name == "transformers":
        return importlib.import_module("sparseflash.integrations.transformers")
    raise AttributeError(f"module 'sparseflash' has no attribute {name!r}")


__all__ = [
    "BackendError",
    "PackingCollator",
    "Plan",
    "PlanError",
    "SparseFlashError",
    "attention",
    "attention_backward",
    "attention_stats",
    "attention_varlen",
    "backends",
    "decode",
    "cu_seqlens_of",
    "explain",
    "hash_sparse_attention",
    "indexer_kl_loss",
    "indexer_topk",
    "jagged_attention",
    "linear_attention",
    "merge",
    "methods",
    "pointwise_attention",
    "qk_sparse_attention",
    "stick_breaking",
]
