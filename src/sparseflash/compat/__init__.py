"""Other libraries' names and layouts over these kernels, for code that should run as it stands.

`compat.flash_attn` has the functions of the package of that name, `compat.flex_attention` is that of PyTorch.
"""

from . import flash_attn
from .flex import flex_attention

__all__ = ["flash_attn", "flex_attention"]
