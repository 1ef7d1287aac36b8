"""Transformers models on these kernels: `attn_implementation="sparse"`, exact, with optional methods.

Importing this package registers an attention function and a mask function under that name in the two public
registries, and adds the name to the attention class tables of models that do not use the registry (`tables`).
Nothing else of Transformers is changed.
"""

from __future__ import annotations

from ...common.errors import SparseFlashError

try:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
except ImportError as missing:
    raise SparseFlashError(
        f"Transformers 5 or newer is needed ({missing}): pip install 'sparseflash[transformers]'"
    ) from missing

from .attention import HARMLESS, sparse_attention
from .caches import read
from .control import sparse
from .indexer import StreamedIndexer, streamed
from .layers import Layer, attention_layers
from .mask import SparseMask
from .pretrained import MODELS, load
from .ranges import NUMBERS, TRUTHS, sparse_mask
from .ranks import Across, context_parallel
from .reporting import Report, report
from .spec_prefill import SpecPrefill
from .tables import watch
from .verification import verify

AttentionInterface.register("sparse", sparse_attention)
AttentionMaskInterface.register("sparse", sparse_mask)
watch()

__all__ = [
    "Across",
    "HARMLESS",
    "MODELS",
    "NUMBERS",
    "Layer",
    "Report",
    "SparseMask",
    "SpecPrefill",
    "StreamedIndexer",
    "TRUTHS",
    "attention_layers",
    "context_parallel",
    "load",
    "read",
    "report",
    "sparse",
    "sparse_attention",
    "sparse_mask",
    "streamed",
    "verify",
]
