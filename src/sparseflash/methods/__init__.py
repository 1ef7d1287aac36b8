"""Sparse attention methods, one file each. `names()` lists their slugs, `get(slug, ...)` makes one."""

from ..selection.calibrate import Profile
from ..selection.orders import coverage
from .adaspa import AdaSpa
from .anchor_attention import AnchorAttention
from .base import Method, Selection, find, get, names
from .bigbird import BigBird
from .blasst import BLASST
from .block_causal import BlockCausal
from .block_topk import BlockTopK
from .cycle_scan import CycleScan
from .dilated import Dilated
from .documents import Documents
from .double_sparsity import DoubleSparsity, heavy_channels
from .dual_chunk_attention import DualChunkAttention
from .dynamic_mask import DynamicMask
from .efficient_vdit import EfficientVDiT
from .flashprefill import FlashPrefill
from .flexprefill import FlexPrefill
from .grid_window import GridWindow
from .hash_sparse import HashSparse
from .last_dense import LastDense
from .lserve import LServe, streaming_heads
from .minference import MInference
from .mminference import MMInference
from .moa import MoA
from .moba import MoBA
from .mtraining import MTraining
from .orion_msp import OrionMSP
from .paro_attention import PAROAttention
from .pbs_attn import PBSAttn
from .prefix_lm import PrefixLM
from .profiled import Profiled
from .qk_sparse import QKSparse
from .quest import Quest
from .reformer import Reformer
from .round_attention import RoundAttention, Rounds
from .seer_attention import Gates, SeerAttention
from .seer_decode import DecodeGates, SeerDecode
from .session import Session
from .sink_window import SinkWindow
from .sliding_tile import SlidingTile
from .sparse_vdit import SparseVDiT
from .sparsed import SparseD
from .squeezed_attention import SqueezedAttention
from .star_attention import StarAttention
from .strided import Strided
from .tree import Tree
from .tri_shape import TriShape
from .window import Window
from .xattention import XAttention

__all__ = [
    "AdaSpa",
    "SparseD",
    "SlidingTile",
    "EfficientVDiT",
    "SparseVDiT",
    "PAROAttention",
    "OrionMSP",
    "BLASST",
    "BigBird",
    "BlockCausal",
    "CycleScan",
    "Dilated",
    "Documents",
    "GridWindow",
    "HashSparse",
    "LastDense",
    "MInference",
    "MoA",
    "MoBA",
    "Method",
    "PrefixLM",
    "Profile",
    "Profiled",
    "QKSparse",
    "Reformer",
    "Selection",
    "RoundAttention",
    "Rounds",
    "SeerAttention",
    "SeerDecode",
    "DecodeGates",
    "Gates",
    "Session",
    "SinkWindow",
    "Strided",
    "Tree",
    "Window",
    "TriShape",
    "BlockTopK",
    "FlashPrefill",
    "FlexPrefill",
    "PBSAttn",
    "DynamicMask",
    "XAttention",
    "AnchorAttention",
    "MMInference",
    "MTraining",
    "StarAttention",
    "DualChunkAttention",
    "DoubleSparsity",
    "LServe",
    "Quest",
    "SqueezedAttention",
    "coverage",
    "heavy_channels",
    "find",
    "get",
    "names",
    "streaming_heads",
]
