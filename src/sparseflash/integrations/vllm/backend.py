"""The classes that vLLM asks for: what they take, what they refuse, and the way from there to `Layer`."""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ...common.errors import SparseFlashError
from .attend import Layer
from .pool import Pool
from .refusals import check_batch, check_layer, check_model
from .settings import Settings, asked
from .step import Step

log = logging.getLogger("vllm.sparseflash")  # below vLLM's own, whose handlers print it


class Builder(AttentionMetadataBuilder[Step]):
    """Of the batch that vLLM has put together, what all layers of a KV group share."""

    reorder_batch_threshold: int | None = 1  # requests with one token stand first, and lie in one piece

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_model(_settings(vllm_config), vllm_config)
        self.block = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """The step of a batch."""
        batch = common_attn_metadata
        check_batch(batch)
        n = batch.num_reqs
        given = batch.query_start_loc[: n + 1], batch.seq_lens[:n], batch.block_table_tensor[:n]
        return Step(*given, batch.slot_mapping, self.block)


class Impl(AttentionImpl[Step]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **more: Any,
    ) -> None:
        settings = _settings(get_current_vllm_config())
        check_layer(
            settings,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=str(getattr(attn_type, "value", attn_type)),
            alibi_slopes=alibi_slopes,
            shares_keys=kv_sharing_target_layer_name is not None,
            more=more,
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.writes = kv_sharing_target_layer_name is None
        self.layer = Layer(settings, self.scale, logits_soft_cap or None, sliding_window, sinks)
        _say(settings, type(self))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write keys and values `[tokens,Hkv,D]`, and attend, of `[tokens,Hq,D]`, into `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise SparseFlashError("outputs in fewer bits (fused quantisation) are not served by sparseflash")
        if attn_metadata is None:  # vLLM measures the memory of a forward
            return output.zero_()
        pool = Pool.of(kv_cache, self.head_size)
        if pool.block != attn_metadata.block:
            raise SparseFlashError(
                f"blocks of {pool.block} tokens in the cache, of {attn_metadata.block} in the batch: "
                "expected one size; give one that all layers take (block_size=)"
            )
        if self.writes:
            self.layer.write(pool, key, value, attn_metadata)
        self.layer(pool, query, attn_metadata, output)
        return output


class _Backend(AttentionBackend):
    """What both backends take."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The class of a layer."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The class that makes a step of a batch."""
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens of a block."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The one in which the tokens of all blocks lie at one stride."""
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Whether layers may have a window."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Whether heads may have a sink."""
        return True


class CPUBackend(_Backend):
    """In the place of vLLM's own on CPUs, under its name."""

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's registry."""
        return "CPU_ATTN"


class CustomBackend(_Backend):
    """On other devices. Unverified: no card has run it yet."""

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's registry."""
        return "CUSTOM"


def _settings(config: Any) -> Settings:
    """What is asked for; where nothing is, vLLM kept this class from an earlier model, which asked."""
    found = asked(config.additional_config)
    if found is None and config.device_config.device_type == "cpu":
        raise SparseFlashError(
            "an earlier model of this process asked for sparseflash, and this one does not, but vLLM chooses "
            "once a process: serve them in processes of their own"
        )
    return found or Settings()


@functools.cache
def _say(settings: Settings, cls: type) -> None:
    """Once a process, and for each of its settings."""
    log.info("sparseflash serves attention (%s.%s): %s", cls.__module__, cls.__qualname__, settings)
