"""Run by torchrun: trains a recipe, records what each step read and its loss, and dies or is
stopped at a given point.

Arguments: recipe, file for the records, point of its end, overrides. The end is SIGKILL after a
step ("step:7"), while a checkpoint is written ("saving:8") or before it is the latest
("publishing:8"), SIGTERM to torchrun ("term:7"), SIGUSR1 to
the last rank ("usr1:7"), or "never".
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import saver
from megatron_vita.checkpoint.saver import Saver
from megatron_vita.config import load_recipe
from megatron_vita.data.batch import Batch
from megatron_vita.training import loop
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run
from tests.functional.recorded import kill_all, record_steps, use_small_buckets

use_small_buckets()


def die() -> None:
    """Kill torchrun and all of its processes."""
    kill_all(psutil.Process())


def be_told_to_stop(run: Run, how: str) -> None:
    """Send the stop signal, and return once it has arrived."""
    if how == "term" and dist.get_rank() == 0:
        psutil.Process().parent().terminate()
    if how == "usr1" and dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    while not run.stop.received and (how == "term" or dist.get_rank() == dist.get_world_size() - 1):
        time.sleep(0.01)


def main() -> None:
    """Record the steps, and wrap them and the writing of a checkpoint to die in the middle of it."""
    recipe, records, death, *overrides = sys.argv[1:]
    where, _, at = death.partition(":")
    record_steps(records)
    recorded_step = loop.train_step
    start = Saver.start
    publish = saver.publish

    def dying_step(run: Run, batches: Iterator[Batch]) -> StepMetrics:
        metrics = recorded_step(run, batches)
        if where == "step" and metrics.step == int(at) and dist.get_rank() == 0:
            die()
        if where in ("term", "usr1") and metrics.step == int(at):
            be_told_to_stop(run, where)
        return metrics

    def dying_start(self: Saver, *, step: int, **state: Any) -> None:
        start(self, step=step, **state)
        if where == "saving" and step == int(at) and dist.get_rank() == 0:
            die()

    def dying_publish(source: Path, target: Path) -> None:
        publish(source, target)
        if where == "publishing" and target.name == f"step_{int(at):08d}":
            die()

    loop.train_step = dying_step
    Saver.start = dying_start  # type: ignore[method-assign]
    saver.publish = dying_publish
    loop.train(load_recipe(recipe, overrides))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
