"""Jobs of two ranks of which one hangs."""

import contextlib
import os
import re
import subprocess
from pathlib import Path

import psutil

from tests.functional.hang_kinds import PIPE
from tests.functional.launch import torchrun


def run_hanging(kind: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a job that hangs until it has ended."""
    ended = torchrun("hang_worker.py", kind, str(folder), processes=2, check=False, seconds=200)
    # Lets go a child of the rank that waits to open it; nobody does where it waits no more.
    with contextlib.suppress(OSError):
        os.close(os.open(folder / PIPE, os.O_WRONLY | os.O_NONBLOCK))
    return ended


def processes_left(report: str) -> list[int]:
    """Return the ranks that a report names and that are still there."""
    named = [int(pid) for pid in re.findall(r", process (\d+):", report)]
    return [pid for pid in named if psutil.pid_exists(pid)]
