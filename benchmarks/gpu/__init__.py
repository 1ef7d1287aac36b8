"""Everything that needs a GPU, in stages that may be cut off: `python -m benchmarks.gpu --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]  # the repository is enough, nothing is installed
