"""Where files that 0.1.0 wrote look for `Plan`; nothing else should."""

from .plan import Plan

__all__ = ["Plan"]
