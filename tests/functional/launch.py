"""Starts torchrun on a worker of this folder."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from tests.environment import environment_with

HERE = Path(__file__).parent
MOST_PROCESSES = torch.cuda.device_count() if torch.cuda.is_available() else 8


def torchrun(
    script: str | Path, *arguments: str, processes: int, check: bool = True, seconds: float = 600
) -> subprocess.CompletedProcess:
    """Runs a script (one of this folder, or a path) in `processes` processes on one thread each.

    Processes that have not ended after `seconds` are made to say where they stand, and fail the
    test.
    """
    environment = environment_with(HERE, PYTHONWARNINGS="ignore", PYTHONFAULTHANDLER="1")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    command += [str(HERE / script), *arguments]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGABRT)  # each writes its stacks to stderr
        out, err = process.communicate(timeout=60)
    assert not check or process.returncode == 0, out[-4000:] + err[-8000:]
    return subprocess.CompletedProcess(command, process.returncode, out, err)
