"""Drop-in functions with the names and layouts of other libraries, so that their callers run unchanged.

`compat.flash_attn` has the functions of the flash-attn package, `compat.flex_attention` is PyTorch's.
"""

from . import flash_attn
from .flex import flex_attention

__all__ = ["flash_attn", "flex_attention"]
