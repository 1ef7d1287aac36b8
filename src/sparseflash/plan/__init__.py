"""Plans: the one object between method and kernel. `plan.py` has the public class, `record.py` its fields."""

from .options import ANY, NONE
from .plan import Plan, Plans
from .record import KeyLists

__all__ = ["ANY", "NONE", "KeyLists", "Plan", "Plans"]
