"""The experiments behind README and docs, which no install has: `python -m benchmarks.experiments --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # the repository is enough, the library need not be installed
