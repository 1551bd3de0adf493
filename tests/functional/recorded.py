"""Runs whose steps are recorded, and which can be killed with their launcher."""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_vita.data.batch import Batch
from megatron_vita.training import loop
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.optimizer import optimizer
from megatron_vita.training.run.run import Run


def use_small_buckets() -> None:
    """Give this process's models as many buckets as real ones have."""
    optimizer.BUCKET_SIZE = 5000
    optimizer.BUCKET_SIZE_PER_RANK = 0


def record_steps(records: str) -> None:
    """Write a line for each step of this rank to RECORDS.RANK."""
    train_step = loop.train_step

    def recorded(run: Run, batches: Iterator[Batch]) -> StepMetrics:
        seen = []

        def watched() -> Iterator[Batch]:
            for batch in batches:
                seen.append(batch.pack_id)
                yield batch

        metrics = train_step(run, watched())
        row = {
            "step": metrics.step,
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "packs": seen,
            "damaged": metrics.damaged,
        }
        with Path(f"{records}.{dist.get_rank()}").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return metrics

    loop.train_step = recorded


def kill_all(rank: psutil.Process) -> None:
    """Kill the launcher of a rank and all of its processes, this one last."""
    me = psutil.Process()
    launcher = rank.parent()
    for process in [launcher, *launcher.children(recursive=True)]:
        if process != me:
            process.kill()
    me.kill()
