"""megatron-core's way of writing checkpoints, without the process that it starts for it."""

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def write_without_a_manager() -> None:
    """Has what a rank writes reported through a queue of this process.

    megatron-core starts a manager process for it, which other processes could reach and ours need
    not: a launcher's SIGTERM ends it, and with it the saving of a run that was told to stop; and
    one that outlives its rank keeps the launcher's output open.
    """
    filesystem_async._results_queue = queue.Queue()
