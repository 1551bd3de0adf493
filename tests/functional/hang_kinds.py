"""Ways in which rank 1 of a job hangs, and what the report of the hang says of it."""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

HANG_SECONDS = 2.0
PIPE = "pipe"
_PTRACE_ATTACH = 16
_PR_SET_PDEATHSIG = 1


def in_loader(run: Any) -> None:
    """Wait for a pack that never comes."""
    run.enter("loading", micro_batch=2)
    queue.Queue[int]().get()


def in_loader_of_validation(run: Any) -> None:
    """Wait for a held-out pack that never comes."""
    run.enter("validation", held_out=True)
    in_loader(run)


def stopped(run: Any) -> None:
    """Stop as by a scheduler."""
    os.kill(os.getpid(), signal.SIGSTOP)


def traced(run: Any) -> None:
    """Stop as by a debugger."""
    library = ctypes.CDLL(None, use_errno=True)
    rank = os.getpid()
    if os.fork() == 0:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for thread in os.listdir(f"/proc/{rank}/task"):
            library.ptrace(_PTRACE_ATTACH, int(thread), None, None)
        while True:
            signal.pause()
    threading.Event().wait()


def in_native_code(run: Any) -> None:
    """Hold the interpreter in native code."""
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def in_a_lock(run: Any) -> None:
    """Wait for a lock, in Python."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def in_a_loop(run: Any) -> None:
    """Compute for ever."""
    run.enter("backward")
    while True:
        pass


def for_a_thread(run: Any) -> None:
    """Wait for a thread that does not do its part."""
    run.enter("optimizer")
    threading.Event().wait()


def skips_a_collective(run: Any) -> None:
    """Leave out a collective, and wait in the next thing that all ranks do."""
    run.enter("metrics")
    dist.recv(torch.zeros(5), src=0)


def in_another_group(run: Any) -> None:
    """Begin the collective of one group where the others begin that of another."""
    dist.all_reduce(torch.zeros(7), group=run.other_group)


def in_file_system(run: Any) -> None:
    """Wait for a file system that does not answer: a pipe that nobody reads from."""
    run.enter("saving")
    os.open(_pipe(), os.O_WRONLY)


def in_disk(run: Any) -> None:
    """Wait in the kernel, as for a disk: for a child that has not begun its program, since it opens
    a pipe that nobody writes to."""
    opened = [(os.POSIX_SPAWN_OPEN, 0, _pipe(), os.O_RDONLY, 0)]
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=opened)


def for_the_network(run: Any) -> None:
    """Wait for a server that accepts a connection and never answers."""
    run.enter("callbacks")
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).recv(1)


def _pipe() -> str:
    path = os.path.join(sys.argv[2], PIPE)
    os.mkfifo(path)
    return path


@dataclass(frozen=True, kw_only=True)
class HangKind:
    """A way to hang.

    hang: called in the second step of rank 1, in the forward pass.
    said: pattern of the report's first line, after "rank 1 on HOST".
    has_stacks: the rank can tell its stacks, or writes them when signalled.
    """

    hang: Callable[[Any], None]
    said: str
    has_stacks: bool = True


_WAITED_FOR = r"is in {} while others wait for it in gloo:all_reduce \d+ \[3, 4\]"
HANGS = {
    "loader": HangKind(
        hang=in_loader,
        said=r"waits for its loader.*get \(.*queue.py.*step 2, micro-batch 2, loading",
    ),
    "validation": HangKind(
        hang=in_loader_of_validation,
        said="waits for its loader.*step 2, validation, micro-batch 2, loading",
    ),
    "stopped": HangKind(
        hang=stopped,
        said=r"is stopped \(SIGSTOP\); step 2, micro-batch 1, forward; samples key_1_1",
        has_stacks=False,
    ),
    "traced": HangKind(
        hang=traced,
        said="is stopped by a debugger; step 2, micro-batch 1, forward; samples key_1_1",
        has_stacks=False,
    ),
    "native": HangKind(
        hang=in_native_code,
        said="does not answer: native code holds its interpreter; step 2.*forward.*key_1_1",
    ),
    "disk": HangKind(
        hang=in_disk,
        said="does not answer: it waits for a disk or a file system; step 2.*forward.*key_1_1",
        has_stacks=False,
    ),
    "lock": HangKind(hang=in_a_lock, said=r"stays in forward \(at in_a_lock \(.*samples key_1_1"),
    "loop": HangKind(hang=in_a_loop, said=r"stays in backward \(at in_a_loop \(.*samples key_1_1"),
    "thread": HangKind(hang=for_a_thread, said=r"stays in optimizer \(at wait \(.*samples key_1_1"),
    "network": HangKind(
        hang=for_the_network, said=r"stays in callbacks \(at for_the_network \(.*samples key_1_1"
    ),
    "skipped": HangKind(hang=skips_a_collective, said=_WAITED_FOR.format("recv")),
    "other group": HangKind(
        hang=in_another_group, said=_WAITED_FOR.format(r"gloo:all_reduce \d+ \[7\] of \d+ other")
    ),
    "storage": HangKind(
        hang=in_file_system,
        said=r"saves: the file system of the checkpoints does not answer \(at in_file_system",
    ),
}
