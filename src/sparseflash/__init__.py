"""Every sparse attention method, exact forward and backward, over one small set of fast kernels."""

import importlib
from typing import Any

from . import backends, cache, distributed, methods, nn, selection
from .backends import records
from .backends.dispatch import backend_status
from .common import moved
from .common.errors import BackendError, PlanError, RankError, SparseFlashError
from .methods.hash_sparse import hash_sparse_attention
from .methods.qk_sparse import qk_sparse_attention
from .nn.muse import muse_attention
from .ops.attention import attention, attention_backward
from .ops.costs import predict
from .ops.decode import decode
from .ops.indexer import indexer_topk
from .ops.indexer_loss import indexer_kl_loss
from .ops.jagged import jagged_attention, jagged_pool
from .ops.linear import linear_attention
from .ops.merge import merge
from .ops.packing import PackingCollator, cu_seqlens_of
from .ops.pointwise import pointwise_attention
from .ops.quantised import attention_quantised
from .ops.recall import recall
from .ops.relative import t5_buckets
from .ops.scan import scan
from .ops.stats import attention_stats
from .ops.stick_breaking import stick_breaking
from .ops.varlen import attention_varlen
from .plan import Plan, Plans
from .selection import calibrate

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `sf.transformers`, `sf.diffusers`, `sf.compat` on first access; resolve renamed names of 0.1."""
    if name == "transformers":
        return importlib.import_module("sparseflash.integrations.transformers")
    if name == "diffusers":
        return importlib.import_module("sparseflash.integrations.diffusers")
    if name == "compat":
        return importlib.import_module("sparseflash.compat")
    if name == "explain":
        moved.warn("sparseflash.explain", "sparseflash.predict")
        return predict
    if name in moved.MODULES:
        return importlib.import_module(f"sparseflash.{name}")
    raise AttributeError(f"module 'sparseflash' has no attribute {name!r}")


moved.install()
moved.callable_once(backends, "sparseflash.backends()", "sparseflash.backend_status()", backend_status)

__all__ = [
    "BackendError",
    "PackingCollator",
    "Plan",
    "PlanError",
    "Plans",
    "RankError",
    "SparseFlashError",
    "attention",
    "attention_backward",
    "attention_quantised",
    "attention_stats",
    "attention_varlen",
    "backend_status",
    "cache",
    "calibrate",
    "decode",
    "cu_seqlens_of",
    "distributed",
    "hash_sparse_attention",
    "indexer_kl_loss",
    "indexer_topk",
    "jagged_attention",
    "jagged_pool",
    "linear_attention",
    "merge",
    "methods",
    "muse_attention",
    "nn",
    "pointwise_attention",
    "predict",
    "qk_sparse_attention",
    "recall",
    "records",
    "scan",
    "selection",
    "stick_breaking",
    "t5_buckets",
]
