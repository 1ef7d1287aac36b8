"""Names that vLLM's registry leads to on CPUs; which class stands behind them is decided once a process.

`doors.CPU_ATTN` is `backend.CPUBackend` where vLLM's configuration or the environment asks for it, and the
class that was registered before (vLLM's own) where nobody does. Latent attention (MLA) is not served.
"""

from __future__ import annotations

import functools
from typing import Any

from ...common.errors import SparseFlashError
from .settings import asked

NAMES = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")
"""Of vLLM's registry, what its CPU platform takes without being told."""
before: dict[str, str] = {}
"""What stood there."""


def __getattr__(name: str) -> Any:
    if name not in before:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    config = get_current_vllm_config_or_none()
    if asked(config and config.additional_config) is None:
        return _own(resolve_obj_by_qualname(before[name]))
    if name != "CPU_ATTN":
        raise SparseFlashError(
            "sparseflash does not serve this: latent attention (MLA); ask for it in neither configuration "
            "nor environment of this model"
        )
    from .backend import CPUBackend

    return CPUBackend


@functools.cache
def _own(theirs: Any) -> Any:
    """vLLM's own class, which vLLM keeps for the models that follow: one of these that asks is refused."""
    builder = theirs.get_builder_cls()

    class Builder(builder):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            if asked(self.vllm_config.additional_config) is not None:
                raise SparseFlashError(
                    "this model asks for sparseflash, and an earlier one of this process did not, but vLLM "
                    "chooses once a process: serve them in processes of their own"
                )

    class Own(theirs):
        @staticmethod
        def get_builder_cls() -> Any:
            return Builder

    for made, kind in ((Builder, builder), (Own, theirs)):
        made.__module__, made.__name__, made.__qualname__ = kind.__module__, kind.__name__, kind.__qualname__
    return Own
