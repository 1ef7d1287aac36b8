"""What SCFA claims: speed without losing quality. Four tests that can fail, one a module.

`recall` asks for what is far away, `smollm` exchanges the attention of a pretrained model, `pairing`
repeats the paper's own comparison, `steps` times whole training steps. Beside the contenders stand the same
controls: a window alone, a wider one of the same budget, and buckets drawn at random. A choice that keeps no
more than they do has chosen nothing.
"""

from .controls import ByMass, Centred, Chance, Oracle
from .rows import Job, measure, unfinished

__all__ = ["ByMass", "Centred", "Chance", "Job", "Oracle", "measure", "unfinished"]
