"""The environment of programs that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment_with(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's environment, with the repository and then `folders` first on Python's module
    path."""
    paths = [str(ROOT), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}
