"""Work for the pool's tests: what a worker process can import."""

import os
import signal
import time
from pathlib import Path

from data_tools.workers.pool import SampleGuard
from megatron_vita.errors import DataError


def act(task: tuple[str, list[str]], guard: SampleGuard) -> list[str]:
    """Does the steps of a task, each named by what happens in it, and notes in a file which of them
    are begun."""
    log, names = task
    return [_outcome(name, Path(log), guard) for name in names]


def _outcome(name: str, log: Path, guard: SampleGuard) -> str:
    guard.advance()
    try:
        return guard.run(lambda known: _do(name, log, known))
    except DataError as error:
        return str(error)


def _do(name: str, log: Path, known: bool) -> str:
    with open(log, "a") as file:
        file.write(f"{name}{' again' if known else ''}\n")
    if name == "hang":
        while True:
            time.sleep(1)
    if name == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "exit":
        os._exit(3)
    if name == "bad":
        raise DataError("it is bad")
    if name == "full":
        raise MemoryError
    return f"{name} done"


def fall(task: str, guard: SampleGuard) -> None:
    """Ends in the way that the task names, outside any step."""
    guard.run(lambda known: None)
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "user error":
        raise DataError("the user's fault")
    raise ZeroDivisionError("our fault")
