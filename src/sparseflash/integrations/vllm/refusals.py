"""What is not served, said before a token is: nothing is left out or approximated in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...common.errors import SparseFlashError
from ...methods.reading import ReadingMethod
from .settings import Settings

_PLAIN = ("auto", "float32", "float16", "bfloat16")


def _refuse(*said: tuple[Any, str]) -> None:
    for is_so, why in said:
        if is_so:
            raise SparseFlashError(f"sparseflash does not serve this: {why}")


def check_layer(
    settings: Settings,
    *,
    kv_cache_dtype: str = "auto",
    attn_type: str = "decoder",
    alibi_slopes: Any = None,
    shares_keys: bool = False,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a layer that would not get what it asks for.

    Raises
    ------
    SparseFlashError
        For keys in fewer bits, encoders and cross-attention, ALiBi, whatever else is given and unknown, and
        layers without keys of their own under a method that keeps summaries of them.
    """
    given = {name: x for name, x in (more or {}).items() if x not in (None, False, -1)}
    _refuse(
        (
            kv_cache_dtype not in _PLAIN,
            f"kv_cache_dtype={kv_cache_dtype!r}; expected keys and values as the model has them, 'auto'",
        ),
        (
            attn_type != "decoder",
            f"attention of type {attn_type!r}; expected a decoder, whose queries see what is before them",
        ),
        (alibi_slopes is not None, "ALiBi, since a paged plan has no distances; serve this model without it"),
        (given, f"a layer with {', '.join(sorted(given))}, which is not known here"),
        (
            shares_keys and isinstance(settings.decode, ReadingMethod),
            f"decode={settings.decode} in a model whose layers read the keys of other layers, since what is "
            "kept of keys is kept where they are written; expected 'dense' or 'streaming-llm'",
        ),
    )


def check_model(settings: Settings, config: Any) -> None:
    """Refuse a configuration of vLLM under which the settings would not mean what they say."""
    parallel = config.parallel_config
    own = settings.decode or settings.prefill
    _refuse(
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "the keys of a request on several ranks (context parallelism)",
        ),
        (
            config.kv_transfer_config is not None and isinstance(settings.decode, ReadingMethod),
            f"decode={settings.decode} with a KV connector, which writes keys that no summary hears of",
        ),
        (
            config.speculative_config is not None and own is not None,
            f"speculative decoding with {settings}, since it asks for several tokens at once; expected dense",
        ),
    )


def check_batch(batch: Any) -> None:
    """Refuse a batch in which requests see other keys than those before them."""
    _refuse(
        (
            isinstance(batch.causal, Tensor) or not batch.causal,
            "requests that are not causal, or some of which are; expected causal=True",
        ),
        (
            getattr(batch, "mm_req_doc_ranges", None) is not None,
            "tokens of images that see one another (a prefix of several modalities)",
        ),
        (
            getattr(batch, "rswa_prefix_lens", None) is not None,
            "windows that begin behind each request's own prefix (R-SWA)",
        ),
    )
