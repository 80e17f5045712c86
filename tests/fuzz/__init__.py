"""A fuzz harness: thousands of damaged inputs, each run as a command in a process of its own (README.md here)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))  # where `python -m fuzz` finds what tests share
