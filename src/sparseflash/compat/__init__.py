"""Other libraries' names and layouts over these kernels, for code that should run as it stands.

`compat.flash_attn` has the functions of the package of that name.
"""

from . import flash_attn

__all__ = ["flash_attn"]
