"""Key caches: what is kept of the past, one object a layer, for Transformers and plain PyTorch alike.

>>> import torch, sparseflash as sf
>>> cache = sf.cache.Growing()
>>> cache.append(torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64))
>>> sf.decode(torch.randn(1, 4, 1, 64), cache.keys, cache.values, cache.plan()).shape
torch.Size([1, 4, 1, 64])
"""

from .base import Layer
from .files import load, save
from .growing import Growing
from .summaries import Labels, PageBounds, PageMean, Summary

__all__ = ["Growing", "Labels", "Layer", "PageBounds", "PageMean", "Summary", "load", "save"]
