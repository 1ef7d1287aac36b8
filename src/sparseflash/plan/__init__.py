"""The plan: which keys each tile of queries sees (`docs/design.md`)."""

from .core import ANY, NONE, KeyLists, Plan

__all__ = ["ANY", "NONE", "KeyLists", "Plan"]
