"""Benchmarks, each run as a module from the root of the repository: `python -m benchmarks.outputs`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Nets and counts of the tests, and what the examples have in common, are used here, too.
sys.path[:0] = [path for path in map(str, (ROOT, ROOT / "tests", ROOT / "examples")) if path not in sys.path]
