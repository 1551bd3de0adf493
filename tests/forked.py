"""Programs in processes of their own, forked from one that has already imported megatron-core."""

import atexit
import json
import os
import select
import socket
import subprocess
import sys
from typing import Any

import torch

from tests.environment import ROOT, environment_with

ON_GPUS = torch.cuda.is_available()
PRELOADED = (
    "data_tools.cli",
    "megatron_vita.convert.importing",
    "megatron_vita.inference.engine.engine",
    "megatron_vita.inference.server.server",
    "megatron_vita.training.loop",
    # which the first optimizer of a process would import
    "torch._dynamo",
    "webdataset",
)


class Forked(subprocess.Popen[str]):
    """A program of Python that is forked instead of started: imports of megatron-core take seconds.

    The process is a child of the server of forks, which reports its end.
    """

    def __init__(self, *arguments: str, ranks: int = 0, port: int = 0, **options: Any) -> None:
        """`arguments`: what follows `python` on a command line; `options`: Popen's; `ranks`: number
        of processes that a launcher starts as torchrun does, with a store at `port`."""
        self._job: dict[str, Any] = {"arguments": arguments, "ranks": ranks, "port": port}
        super().__init__([sys.executable, *arguments], **({"text": True} | options))

    def _execute_child(self, *options: Any) -> None:
        # in the order of Popen's: command, executable, preexec_fn, close_fds, pass_fds, cwd, env ...
        folder, environment = options[5:7]
        pipes = options[10:16]  # two ends for each stream, -1 for a stream that is inherited
        ours = (pipes[0], pipes[3], pipes[5])
        streams = [number if end == -1 else end for number, end in enumerate(ours)]
        self._job["folder"] = str(folder or os.getcwd())
        self._job["environment"] = dict(environment or os.environ)
        self._job["session"] = options[21]
        self._end, end = os.pipe()
        socket.send_fds(fork_server(), [json.dumps(self._job).encode()], [*streams, end])
        os.close(end)
        self.pid = int(self._report())
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _report(self) -> str:
        """Line about the process: its pid, then its status."""
        line = b""
        while not line.endswith(b"\n"):
            character = os.read(self._end, 1)
            assert character, "the server of forks has ended"
            line += character
        return line.decode()

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Do what `os.waitpid` does for a child."""
        seconds = 0 if wait_flags else None
        if not select.select([self._end], [], [], seconds)[0]:
            return 0, 0
        status = int(self._report())
        os.close(self._end)
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def start_program(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Start a program with the repository on its module path: forked, or anew where there are GPUs."""
    options = {"env": environment_with(), "text": True, **options}
    if ON_GPUS:
        return subprocess.Popen([sys.executable, *arguments], **options)
    return Forked(*arguments, **options)


def run_program(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, with its output as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_program(*arguments, **(pipes | options)) as process:
        try:
            out, err = process.communicate()
        except BaseException:  # such as the test's timeout: the end is not waited for
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


_servers: list[tuple[socket.socket, subprocess.Popen]] = []


def fork_server() -> socket.socket:
    """Return the socket for jobs, whose end is the server's; start the server if there is none."""
    if not _servers or _servers[-1][1].poll() is not None:
        _servers.append(_start_server())
    return _servers[-1][0]


def _start_server() -> tuple[socket.socket, subprocess.Popen]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # pyarrow's own allocator and OpenBLAS keep threads, which a fork would lose
    single = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
    single |= {name: os.environ[name] for name in single if name in os.environ}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server", *PRELOADED],
        cwd=ROOT,
        env=environment_with(PYTHONFAULTHANDLER="1", **single),
        stdin=theirs.fileno(),
        start_new_session=True,
    )
    theirs.close()
    atexit.register(_end_server, server, os.getpid())
    return ours, server


def _end_server(server: subprocess.Popen, owner: int) -> None:
    """Kill a server at the exit of the process that started it, but not of that one's forks."""
    if os.getpid() == owner:
        server.kill()
