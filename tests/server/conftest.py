"""The plain training loop of tests/parallel is the reference here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "parallel"))
