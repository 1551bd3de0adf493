"""Patch of megatron-core's checkpoint writing: no manager process."""

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def write_without_a_manager() -> None:
    """Report what a rank wrote through a queue inside this process.

    megatron-core starts a manager process for it, so that other processes can report too; here none
    do. A launcher's SIGTERM ends the manager, and with it the save of a run that is stopping; and a
    manager that outlives its rank keeps the launcher's output open.
    """
    filesystem_async._results_queue = queue.Queue()
