"""Attention of vLLM on these kernels, where it is asked for: dense and exact, or what a method chooses.

vLLM loads `register` in each of its processes (entry point group `vllm.general_plugins`). Importing this
package imports nothing of vLLM; `backend` does, when vLLM asks for the class that serves.
"""

from .attend import Layer
from .pool import Kept, Pool
from .registration import register
from .settings import KEY, VARIABLE, Settings, asked
from .step import Step

__all__ = ["KEY", "VARIABLE", "Kept", "Layer", "Pool", "Settings", "Step", "asked", "register"]
