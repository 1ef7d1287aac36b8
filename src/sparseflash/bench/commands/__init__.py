"""`sparseflash bench`: one command a benchmark, a page for each kind; importing them registers them."""

from . import files, kernels, methods, models, plans, training
from .app import bench, setting

__all__ = ["bench", "files", "kernels", "methods", "models", "plans", "setting", "training"]
