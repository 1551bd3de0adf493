"""Child processes that may be killed at any time, and that end together with their parent.

Loader processes, the workers of `data_tools` and the writers of checkpoints are `WorkerProcess`es,
each with its own rules for time limits and blame. The processes that decode media for an engine come from a fork server of
their own (`inference/vision/decode_worker.py`), since Python's fork server is one per process, takes
no environment, and is not restarted when it dies.
"""

import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkServerContext
from typing import Any


def fork_server(*preload: str) -> ForkServerContext:
    """Return the context of processes forked from a server that has imported some modules.

    Args:
        preload: modules that the server imports at its start; later calls do not change them.
    """
    # A fork of this process could inherit a lock held by one of its threads, and hang; the fork
    # server also spares each process the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


class WorkerProcess:
    """A child process and the pipe to it, which its death closes.

    Args:
        context: what starts the process: a fork server, or a fork of this process as it is now.
        target: called with its end of the pipe; for a fork server, a function at the top level of
            a module.
        arguments: further arguments of `target`.
    """

    def __init__(
        self,
        context: ForkServerContext | ForkContext,
        target: Callable[..., None],
        *arguments: Any,
    ) -> None:
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(target, theirs, *arguments), daemon=True)
        self._process.start()
        # Only the child's own copy is open then, so that its death closes the pipe.
        theirs.close()

    def exit_code(self, *, seconds: float | None = None) -> int | None:
        """Wait for the end of the process, which may follow shortly after that of the pipe.

        Returns:
            The exit code, negative for a signal; None if the process runs on after `seconds`.
        """
        self._process.join(timeout=seconds)
        return self._process.exitcode

    def kill(self) -> None:
        """End the process, and wait until it has ended."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _run(target: Callable[..., None], *arguments: Any) -> None:
    end_with_parent()
    # Ctrl-C goes to the whole process group; the parent ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target(*arguments)


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
