"""Processes that read for another one."""

import fcntl
import multiprocessing
import os


def end_with_parent() -> None:
    """Has the kernel end this process, also in the midst of a decoder, when the one that started it is gone.

    For processes of `multiprocessing`, by a signal that comes when the parent's end of a pipe is closed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
