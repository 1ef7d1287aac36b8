"""Names that vLLM's registry leads to on CPUs; which class stands behind them is decided once a process.

`doors.CPU_ATTN` is `backend.CPUBackend` where vLLM's configuration or the environment asks for it, and the
class that was registered before (vLLM's own) where nobody does. Latent attention (MLA) is not served.
"""

from __future__ import annotations

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
        return resolve_obj_by_qualname(before[name])
    if name != "CPU_ATTN":
        raise SparseFlashError(
            "sparseflash does not serve this: latent attention (MLA); ask for it in neither configuration "
            "nor environment of this model"
        )
    from .backend import CPUBackend

    return CPUBackend
