"""Termination of child processes together with their parent."""

import fcntl
import multiprocessing
import os


def end_with_parent() -> None:
    """Let the kernel kill this `multiprocessing` child when its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with(parent.sentinel)


def end_with(pipe: int) -> None:
    """Let the kernel kill this process, even inside a decoder, when the other end of a pipe is
    closed.

    The kernel sends SIGIO, which ends a process without a handler, on any event of the pipe:
    nothing else may happen on it.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
