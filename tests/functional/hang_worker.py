"""Run in every rank: the ranks of a watched run, of which rank 1 hangs in a given way.

Arguments: kind of hang, folder of the run.
"""

import ctypes
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.training.callbacks.watching import WatchCallback
from megatron_vita.training.run import Run

HANG_SECONDS = 2.0


def in_loader(run: Run) -> None:
    """Wait for a pack that never comes."""
    run.enter("loading", micro_batch=2)
    queue.Queue[int]().get()


def stopped(run: Run) -> None:
    """Stop as by a debugger or a scheduler."""
    os.kill(os.getpid(), signal.SIGSTOP)


def in_native_code(run: Run) -> None:
    """Hold the interpreter in native code."""
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def in_a_lock(run: Run) -> None:
    """Wait for a lock, in Python."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def skips_a_collective(run: Run) -> None:
    """Leave out a collective, and wait in the next thing that all ranks do."""
    run.enter("metrics")
    dist.recv(torch.zeros(5), src=0)


def in_file_system(run: Run) -> None:
    """Wait for a file system that does not answer: a pipe that nobody reads from."""
    run.enter("saving")
    pipe = os.path.join(sys.argv[2], "pipe")
    os.mkfifo(pipe)
    os.open(pipe, os.O_WRONLY)


HANGS: dict[str, Any] = {
    "loader": in_loader,
    "stopped": stopped,
    "native": in_native_code,
    "lock": in_a_lock,
    "skipped": skips_a_collective,
    "storage": in_file_system,
}


def main() -> None:
    """Go through two steps; rank 1 hangs in the second."""
    kind, folder = sys.argv[1:]
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    recipe = Recipe().replaced({"training.run_dir": folder, "training.hang_seconds": HANG_SECONDS})
    run: Any = Run(recipe=recipe, chunks=[], optimizer=None, schedule=None, microbatches=1)
    watch = WatchCallback()
    watch.on_start(run)
    values = torch.ones(3, 4)
    for step in range(2):
        run.step = step
        watch.before_step(run)
        run.enter("forward", micro_batch=1, keys=[f"key_{dist.get_rank()}_{step}"])
        if step == 1 and dist.get_rank() == 1:
            HANGS[kind](run)
        dist.all_reduce(values)
        time.sleep(0.1)
    watch.on_end(run)
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
