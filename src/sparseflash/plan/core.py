"""Module path under which files saved by 0.1.0 look up `Plan`; import it from nowhere else."""

from .plan import Plan

__all__ = ["Plan"]
