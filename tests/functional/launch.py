"""Starts torchrun on a worker of this folder."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
MOST_PROCESSES = torch.cuda.device_count() if torch.cuda.is_available() else 8


def torchrun(script: str | Path, *arguments: str, processes: int, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script (one of this folder, or a path) in `processes` processes on one thread each."""
    path = HERE / script
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(path), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return result
