"""GPU tests use the workers of tests/functional, and the deterministic kernels of Transformer
Engine."""

import os
import sys
from pathlib import Path

for folder in (Path(__file__).parents[1] / "functional", Path(__file__).parent):
    sys.path.insert(0, str(folder))
os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
