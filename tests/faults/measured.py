"""Run in every rank: trains a recipe, and records what the rank and its loaders hold.

Arguments: recipe, a file beside which the records are put, a list that is not used, overrides.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import load_recipe
from megatron_vita.data.batch import Batch
from megatron_vita.training import loop
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run

MIB = 1 << 20
EVERY = 5
"""Steps between two records: those right after a save, which has just ended or not, are among
them."""


def held() -> dict[str, float]:
    """What this process and its children hold."""
    me = psutil.Process()
    shared = sum(path.stat().st_size for path in Path("/dev/shm").iterdir() if path.is_file())
    memory = 0
    for process in (me, *me.children(recursive=True)):
        # A writer of a checkpoint may end at any moment.
        try:
            memory += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return {
        "memory (MiB)": memory / MIB,
        "file handles": me.num_fds(),
        "threads": me.num_threads(),
        "shared memory (MiB)": shared / MIB,
    }


def main() -> None:
    """Train, with a record after every few steps."""
    recipe, records, _, *overrides = sys.argv[1:]
    train_step = loop.train_step

    def measured(run: Run, batches: Iterator[Batch]) -> StepMetrics:
        metrics = train_step(run, batches)
        if run.step % EVERY == EVERY // 2:
            path = Path(records).parent / f"held.{dist.get_rank()}"
            with path.open("a") as file:
                file.write(json.dumps({"step": run.step, **held()}) + "\n")
        return metrics

    loop.train_step = measured
    loop.train(load_recipe(recipe, overrides))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
