"""Folders that are made once in a test run, whichever of its processes needs them first."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "VITA_TESTS_FOLDER"


def open_folder() -> Callable[[], None]:
    """Create the run's folder in its first process; returns what removes it at the process's end."""
    if VARIABLE in os.environ:
        return lambda: None
    folder = tempfile.mkdtemp(prefix="vita-tests-")
    os.environ[VARIABLE] = folder

    def remove() -> None:
        del os.environ[VARIABLE]
        shutil.rmtree(folder)

    return remove


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name`, which nobody may change; `make` fills it if no process has."""
    folder = Path(os.environ[VARIABLE], name)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            # Not made elsewhere and renamed: files may hold paths of their neighbours. A process
            # that was killed leaves half a folder.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
