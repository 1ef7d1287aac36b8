"""Methods inside Diffusers transformers: `with sf.diffusers.sparse(pipe.transformer, method)`.

Importing this package imports Diffusers without changing it.
"""

from __future__ import annotations

from importlib import import_module

from ...common.errors import SparseFlashError

try:
    import_module("diffusers")  # a missing package is reported here, once
except ImportError as missing:
    raise SparseFlashError(
        f"Diffusers is needed ({missing}): pip install 'sparseflash[diffusers]'"
    ) from missing

from .host import Report, sparse
from .layouts import LAYOUTS

__all__ = ["LAYOUTS", "Report", "sparse"]
