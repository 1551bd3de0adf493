"""Processes that read for another one."""

import fcntl
import multiprocessing
import os


def end_with_parent() -> None:
    """Has the kernel end this process of `multiprocessing` when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with(parent.sentinel)


def end_with(pipe: int) -> None:
    """Has the kernel end this process, also in the midst of a decoder, when the other end of a pipe
    is closed.

    It sends SIGIO, which ends a process without a handler for it, at whatever happens to the pipe:
    nothing else may.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
