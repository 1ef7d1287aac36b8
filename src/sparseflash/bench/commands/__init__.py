"""`sparseflash bench`: one command a benchmark, a page for each kind; importing them registers them."""

from . import curves, files, methods, prompts
from .app import bench

__all__ = ["bench", "curves", "files", "methods", "prompts"]
