"""A process that has imported what programs of tests need, and forks them: imports cost more than
most tests.

Jobs come over the socket at descriptor 0, one message each (see `tests.forked`), with descriptors
for stdin, stdout, stderr and the job's end. A job is a program, or a launcher with its ranks as
torchrun would start them. Nothing here uses CUDA or keeps threads.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any

from tqdm import tqdm

LONGEST_MESSAGE = 1 << 17
SECONDS_TO_STOP = 10
"""Time between SIGTERM and SIGKILL for ranks that outlive a failed one."""
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def main() -> None:
    """Import the modules that are named, then fork jobs until the client is gone."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    tqdm.monitor_interval = (
        0  # else each bar has a thread, and a process with threads is not forked
    )
    gc.collect()
    gc.freeze()  # no collection of a fork visits what is imported, and copies its pages
    vars(util)["spawnv_passfds"] = _spawn
    ends: dict[int, int] = {}
    with socket.socket(fileno=os.dup(0)) as jobs, _wakeups() as wakeups:
        jobs.setblocking(False)
        while True:
            _wait_for(jobs, wakeups, ends)
            message, descriptors, *_ = socket.recv_fds(jobs, LONGEST_MESSAGE, 4)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                wakeups.close()
                jobs.close()
                for other in ends.values():
                    os.close(other)
                _end_with_parent()
                os._exit(_run(json.loads(message), descriptors))
            *streams, end = descriptors
            for stream in streams:
                os.close(stream)
            os.write(end, f"{pid}\n".encode())
            ends[pid] = end


@contextlib.contextmanager
def _wakeups() -> Iterator[socket.socket]:
    """A socket that becomes readable when a child has ended."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with reader, writer:
        yield reader


def _wait_for(jobs: socket.socket, wakeups: socket.socket, ends: dict[int, int]) -> None:
    """Report the ends of children until there is a job."""
    while True:
        readable, *_ = select.select([jobs, wakeups], [], [])
        with contextlib.suppress(BlockingIOError):
            wakeups.recv(4096)
        _report_ends(ends)
        if jobs in readable:
            return


def _report_ends(ends: dict[int, int]) -> None:
    """Write the statuses of children that have ended to their clients."""
    while ends:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        end = ends.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(end, f"{status}\n".encode())
        os.close(end)


def _end_with_parent() -> None:
    """Have this process killed when its parent ends."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(job: dict[str, Any], descriptors: list[int]) -> int:
    """Run a job in this process, which is its own; returns the exit code."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, end = descriptors
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.close(end)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    if job["session"]:
        os.setsid()
    if job["ranks"]:
        return _launch(job)
    return _run_program(job["arguments"])


def _launch(job: dict[str, Any]) -> int:
    """Fork the ranks of a job, pass SIGTERM on to them, and end all when one fails.

    Returns the exit code of the rank that failed first, 128 + n for signal n.
    """
    ranks = [_start_rank(job, rank) for rank in range(job["ranks"])]
    signal.signal(signal.SIGTERM, lambda *_: _send(ranks, signal.SIGTERM))
    failed = 0
    kill_at = float("inf")
    while ranks:
        time.sleep(0.01)
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            ranks.remove(pid)
            if status and not failed:
                code = os.waitstatus_to_exitcode(status)
                failed = code if code > 0 else 128 - code
                kill_at = time.monotonic() + SECONDS_TO_STOP
                _send(ranks, signal.SIGTERM)
        if time.monotonic() > kill_at:
            _send(ranks, signal.SIGKILL)
    return failed


def _send(ranks: list[int], number: signal.Signals) -> None:
    for pid in ranks:
        os.kill(pid, number)


def _start_rank(job: dict[str, Any], rank: int) -> int:
    """Fork one rank with torchrun's variables; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    _end_with_parent()
    world = str(job["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    # The store lives in the process that asked: no port is given up before a rank binds it.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "fork_server"}
    warnings.simplefilter("ignore")
    # Now, while the rank has no threads and `_spawn` can fork: loader processes come from this
    # server, and one that is started anew imports torch first, as each of them does then.
    forkserver.ensure_running()
    os._exit(_run_program(job["arguments"]))


def _run_program(arguments: list[str]) -> int:
    """Run what follows `python` on a command line; returns its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        _run_as_main(*arguments)
    except SystemExit as ended:
        code = _exit_code(ended)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # The resource tracker closes its own.
        with contextlib.suppress(ValueError):
            stream.flush()
    return code


def _run_as_main(first: str, *rest: str) -> None:
    """Run a script, `-m module` or `-c code` as `__main__`."""
    if first == "-m":
        sys.argv = list(rest)
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _exit_code(ended: SystemExit) -> int:
    """The exit code that the interpreter gives a SystemExit; a message goes to stderr."""
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)  # noqa: T201
    return 1


_spawn_anew = util.spawnv_passfds


def _spawn(path: bytes, arguments: list[str], kept: list[int]) -> int:
    """Fork the servers of multiprocessing, too, from a process without threads; returns the pid."""
    if arguments[-2] != "-c" or len(os.listdir("/proc/self/task")) > 1:
        return _spawn_anew(path, arguments, kept)
    pid = os.fork()
    if pid:
        return pid
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    atexit._clear()
    code = 1
    try:
        code = _run_program(["-c", arguments[-1]])
    finally:
        # Whatever happens, this process must not go on as the one that it was forked from.
        os._exit(code)


if __name__ == "__main__":
    main()
