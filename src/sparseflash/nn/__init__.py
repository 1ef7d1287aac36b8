"""Layers with parameters: `Layer(width, heads, **options)`, `x [B, T, width]` in and out; a file per paper.

>>> import torch, sparseflash as sf
>>> layer = sf.nn.SelfAttention(64, 4, method="window")
>>> layer(torch.randn(1, 100, 64)).shape, float(layer.aux_loss)
(torch.Size([1, 100, 64]), 0.0)
"""

from .base import Layer, State, update
from .combiner import Combiner
from .convolution import GatedConvolution
from .dynamic_mask import DynamicMaskAttention
from .hrsam import CyclicScan, HRSAMAttention, HRSAMBlocks
from .lightning import LightningAttention
from .longgen import LongGenAttention
from .lookups import Lookups
from .muse import muse_attention
from .native_sparse import NativeSparseAttention
from .nm import NMConv2d, NMLinear, nm_mask
from .orion import MultiScaleRows, PerceiverMemory
from .registry import find, get, names, options
from .routing import RoutingAttention
from .seer import SeerGate
from .seer_decode import SeerDecodeGate
from .self_attention import SelfAttention
from .seqboat import EMA, SeqBoat
from .sparsek import SparseKAttention, sparsek_threshold
from .sparsifiner import SparsifinerAttention
from .stick_breaking import StickBreakingAttention
from .together import Together

__all__ = [
    "Combiner",
    "CyclicScan",
    "HRSAMAttention",
    "HRSAMBlocks",
    "MultiScaleRows",
    "PerceiverMemory",
    "SparsifinerAttention",
    "DynamicMaskAttention",
    "EMA",
    "Layer",
    "LightningAttention",
    "LongGenAttention",
    "GatedConvolution",
    "Lookups",
    "NMConv2d",
    "NMLinear",
    "NativeSparseAttention",
    "RoutingAttention",
    "SeerDecodeGate",
    "SeerGate",
    "SelfAttention",
    "SeqBoat",
    "SparseKAttention",
    "State",
    "StickBreakingAttention",
    "Together",
    "find",
    "get",
    "muse_attention",
    "names",
    "nm_mask",
    "options",
    "sparsek_threshold",
    "update",
]
