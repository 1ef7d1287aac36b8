"""The working tree against an older commit, in turn: `python -m benchmarks.compare --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # the repository is enough, nothing is installed
