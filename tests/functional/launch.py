"""Launcher of a script on several ranks: forked from a process that has already imported
megatron-core, or by torchrun where there are GPUs."""

import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from tests.environment import ROOT, environment_with
from tests.forked import ON_GPUS, Forked

HERE = Path(__file__).parent
INNERMOST_FRAMES = 12
MOST_PROCESSES = torch.cuda.device_count() if ON_GPUS else 8


def torchrun(
    script: str | Path,
    *arguments: str,
    processes: int,
    check: bool = True,
    seconds: float = 600,
    folder: Path = ROOT,
) -> subprocess.CompletedProcess:
    """Run a script (one of this folder, or a path) in `processes` processes on one thread each, from
    `folder`.

    Processes that have not ended after `seconds` write their stacks to stderr, and fail the test.
    """
    run = _run_with_torchrun if ON_GPUS else _run_forked
    ended = run(str(HERE / script), arguments, processes, seconds, folder)
    assert not check or ended.returncode == 0, ended.stdout[-4000:] + readable(ended.stderr)[-8000:]
    return ended


def run_ranks[**P](
    function: Callable[P, None], processes: int, /, *arguments: P.args, **keywords: P.kwargs
) -> subprocess.CompletedProcess:
    """Call a function of a test module, with the same arguments, in each rank of a process group."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(pickle.dumps((arguments, keywords)))
        place = (function.__module__, function.__name__)
        return torchrun("call.py", *place, file.name, processes=processes)


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
    script: str, arguments: tuple[str, ...], processes: int, seconds: float, folder: Path
) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(processes), script, *arguments]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment_with(PYTHONWARNINGS="ignore", PYTHONFAULTHANDLER="1"),
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
    script: str, arguments: tuple[str, ...], processes: int, seconds: float, folder: Path
) -> subprocess.CompletedProcess:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Files: a rank that writes much to a pipe would wait for its reader.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        launcher = Forked(
            script, *arguments, ranks=processes, port=store.port, cwd=folder,
            stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        )  # fmt: skip
        try:
            code = launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            _abort_children(launcher.pid)
            code = launcher.wait(60)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(launcher.args, code, out.read(), err.read())


def _abort_children(pid: int) -> None:
    """Make every descendant write its stacks to stderr, and end."""
    for child in psutil.Process(pid).children(recursive=True):
        child.send_signal(signal.SIGABRT)
