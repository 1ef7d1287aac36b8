"""How the backend gets into vLLM: by its registry, in every process of it, and only where somebody asks."""

from __future__ import annotations

import os

from ...common.errors import SparseFlashError
from .settings import VARIABLE, Settings


def register() -> None:
    """Enter the doors into vLLM's registry: what its entry point group `vllm.general_plugins` calls.

    On CPUs vLLM looks at no name that a user gives, and takes what its registry has as CPU_ATTN: that becomes
    a door (`doors`), which leads to vLLM's own class unless something else is asked for. On other devices the
    class stands in the registry as CUSTOM, and who gives that name (`attention_backend="CUSTOM"`) asks.

    Raises
    ------
    SparseFlashError
        Where the environment asks for it, and this vLLM has no such registry, or the settings are no good.
    """
    wanted = Settings.read(os.environ.get(VARIABLE, ""))
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from . import doors

        if not current_platform.is_cpu():
            if not AttentionBackendEnum.CUSTOM.is_overridden():
                register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.backend.CustomBackend")
            return
        for name in doors.NAMES:
            member = AttentionBackendEnum[name]
            path = member.get_path()
            if path != f"{doors.__name__}.{name}":
                doors.before[name] = path
                register_backend(member, f"{doors.__name__}.{name}")
    except (ImportError, AttributeError, KeyError, ValueError) as error:
        if wanted is None:  # somebody's vLLM that knows of no such thing serves as it always did
            return
        raise SparseFlashError(
            f"{VARIABLE} asks for sparseflash, and this vLLM has no place for it ({error!r}): expected 0.32, "
            f"or a later one with the same registry of attention backends; unset {VARIABLE} to do without"
        ) from error
