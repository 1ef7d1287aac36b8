"""Commands of `sparseflash bench`, one per benchmark; importing these modules registers them."""

from . import curves, files, methods, prompts
from .app import bench

__all__ = ["bench", "curves", "files", "methods", "prompts"]
