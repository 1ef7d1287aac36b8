"""Plans: the one object between a method and a kernel. `plan.py` is the face, `record.py` the ground."""

from .options import ANY, NONE
from .plan import Plan, Plans
from .record import KeyLists

__all__ = ["ANY", "NONE", "KeyLists", "Plan", "Plans"]
