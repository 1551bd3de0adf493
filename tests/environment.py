"""The environment of programs that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment_with(**variables: str) -> dict[str, str]:
    """This process's environment, with the repository first on Python's module path."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}
