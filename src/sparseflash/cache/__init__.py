"""Key-value caches: one object per attention layer, for Transformers and plain PyTorch alike.

>>> import torch, sparseflash as sf
>>> cache = sf.cache.Growing()
>>> cache.append(torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64))
>>> sf.decode(torch.randn(1, 4, 1, 64), cache.keys, cache.values, cache.plan()).shape
torch.Size([1, 4, 1, 64])
"""

from .base import Attended, Layer
from .compressed import Compressed, Compression, Int8, Mustafar
from .evicting import Evicting
from .files import load, save
from .growing import Growing
from .offloaded import Offload, Offloaded, Reads
from .paged import Paged, Pages
from .policies.adakv import AdaKV
from .policies.base import Everything, Held, Policy, names, policy
from .policies.citrus import Citrus
from .policies.expected_attention import ExpectedAttention
from .policies.h2o import H2O
from .policies.knorm import KNorm
from .policies.moa import MoA
from .policies.pyramidkv import PyramidKV
from .policies.snapkv import SnapKV
from .policies.streaming_llm import StreamingLLM
from .policies.threshold import Threshold
from .policies.tova import TOVA
from .shared import Share, Shared
from .summaries import Labels, PageBounds, PageMean, Summary
from .thinned import Thinned

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "Attended",
    "Citrus",
    "Compressed",
    "Compression",
    "Everything",
    "Evicting",
    "ExpectedAttention",
    "Growing",
    "Held",
    "Int8",
    "KNorm",
    "Labels",
    "Layer",
    "MoA",
    "Mustafar",
    "Offload",
    "Offloaded",
    "PageBounds",
    "PageMean",
    "Policy",
    "PyramidKV",
    "Reads",
    "Paged",
    "Pages",
    "Share",
    "Shared",
    "SnapKV",
    "StreamingLLM",
    "Summary",
    "Thinned",
    "Threshold",
    "load",
    "names",
    "policy",
    "save",
]
