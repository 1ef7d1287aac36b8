"""One command an experiment, a page for each kind; importing them registers them."""

from . import claim, kernels, layers, models, plans, tables, training, vision
from .app import RESULTS, experiments

__all__ = [
    "RESULTS",
    "claim",
    "experiments",
    "kernels",
    "layers",
    "models",
    "plans",
    "tables",
    "training",
    "vision",
]
