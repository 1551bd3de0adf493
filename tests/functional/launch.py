"""Launcher of a script on several ranks: forked from a process that has already imported
megatron-core, or by torchrun where there are GPUs."""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from tests.environment import environment_with

HERE = Path(__file__).parent
ON_GPUS = torch.cuda.is_available()
INNERMOST_FRAMES = 12
MOST_PROCESSES = torch.cuda.device_count() if ON_GPUS else 8


def torchrun(
    script: str | Path, *arguments: str, processes: int, check: bool = True, seconds: float = 600
) -> subprocess.CompletedProcess:
    """Run a script (one of this folder, or a path) in `processes` processes on one thread each.

    Processes that have not ended after `seconds` write their stacks to stderr, and fail the test.
    """
    run = _run_with_torchrun if ON_GPUS else _run_forked
    ended = run(str(HERE / script), arguments, processes, seconds)
    assert not check or ended.returncode == 0, ended.stdout[-4000:] + readable(ended.stderr)[-8000:]
    return ended


def readable(errors: str) -> str:
    """Shorten what ranks wrote to stderr: of each stack that a signal wrote, the innermost frames.

    faulthandler writes the innermost frame first, and a list of all extension modules last: the
    end of its text alone would not tell where a rank was.
    """
    lines = []
    frames = 0
    for line in errors.splitlines():
        is_frame = line.startswith("  File ")
        frames = frames + 1 if is_frame else 0
        if frames <= INNERMOST_FRAMES and not line.startswith("Extension modules:"):
            lines.append(line)
    return "\n".join(lines)


def _run_with_torchrun(
    script: str, arguments: tuple[str, ...], processes: int, seconds: float
) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(processes), script, *arguments]
    process = subprocess.Popen(
        command,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _abort_children(process.pid)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _run_forked(
    script: str, arguments: tuple[str, ...], processes: int, seconds: float
) -> subprocess.CompletedProcess:
    server = _rank_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        err = Path(folder, "err")
        job = {"script": script, "arguments": arguments, "processes": processes}
        job |= {"port": store.port, "out": str(out), "err": str(err)}
        assert server.stdin
        server.stdin.write(json.dumps(job).encode() + b"\n")
        server.stdin.flush()
        code = _answer(server, seconds)
        texts = [path.read_text(errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess([script, *arguments], code, *texts)


def _answer(server: subprocess.Popen, seconds: float) -> int:
    """Exit code of the running job, whose processes are aborted after `seconds`."""
    assert server.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(server.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            _abort_children(server.pid)
            assert selector.select(60), "the ranks of a job do not end"
    return int(server.stdout.readline())


def _abort_children(pid: int) -> None:
    """Make every descendant write its stacks to stderr, and end."""
    for child in psutil.Process(pid).children(recursive=True):
        child.send_signal(signal.SIGABRT)


@cache
def _rank_server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, str(HERE / "rank_server.py")],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(server.kill)
    return server


def _environment() -> dict[str, str]:
    # pyarrow's own allocator and OpenBLAS keep threads, which a fork would lose
    single = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
    single |= {name: os.environ[name] for name in single if name in os.environ}
    return environment_with(PYTHONWARNINGS="ignore", PYTHONFAULTHANDLER="1", **single)
