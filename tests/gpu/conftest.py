"""GPU tests use the workers of tests/functional, and the deterministic kernels of Transformer
Engine."""

import os

os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
