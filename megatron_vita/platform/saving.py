"""Patch of megatron-core's checkpoint writing: no manager process."""

import logging
import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def use_local_results_queue() -> None:
    """Report what a rank wrote through a queue inside this process.

    megatron-core starts a manager process for it, so that other processes can report too; here none
    do. A launcher's SIGTERM ends the manager, and with it the save of a run that is stopping; and a
    manager that outlives its rank keeps the launcher's output open.
    """
    filesystem_async._results_queue = queue.Queue()


class _WriteFailure(logging.Filter):
    """Keeps why a file could not be written, which megatron-core logs and leaves out of its
    exception."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        self.reason = self.reason or record.getMessage()  # what follows repeats it
        return False


_write_failure = _WriteFailure()
logging.getLogger(filesystem_async.__name__).addFilter(_write_failure)


def take_write_failure() -> str:
    """Why this rank could not write its files of a checkpoint; empty if it could."""
    reason = _write_failure.reason
    _write_failure.reason = ""
    return reason
