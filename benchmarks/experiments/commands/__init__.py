"""One command an experiment, a page for each kind; importing them registers them."""

from . import kernels, models, plans, tables, training, vision
from .app import RESULTS, experiments

__all__ = ["RESULTS", "experiments", "kernels", "models", "plans", "tables", "training", "vision"]
