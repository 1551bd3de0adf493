"""Run by torchrun: trains a recipe, writes what each step read and lost, and dies by SIGKILL where it is told to.

Arguments: recipe, file for the records, place of death ("step:7", "saving:8" or "never"), overrides.
"""

import json
import sys
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import load_recipe
from megatron_vita.training import loop
from megatron_vita.training.metrics import StepMetrics
from megatron_vita.training.run import Run


def die() -> None:
    """Kills torchrun and all of its processes, this one last."""
    me = psutil.Process()
    launcher = me.parent()
    for process in [launcher, *launcher.children(recursive=True)]:
        if process != me:
            process.kill()
    me.kill()


def main() -> None:
    """Wraps a step, to record it, and the writing of a checkpoint, to die in the middle of it."""
    recipe, records, death, *overrides = sys.argv[1:]
    where, _, at = death.partition(":")
    train_step, save = loop.train_step, store.dist_checkpointing.save

    def recorded_step(run: Run, batches) -> StepMetrics:
        seen = []

        def watched():
            for batch in batches:
                seen.append(batch.pack_id)
                yield batch

        metrics = train_step(run, watched())
        row = {"step": metrics.step, "loss": metrics.loss, "grad_norm": metrics.grad_norm, "packs": seen}
        row["damaged"] = metrics.damaged
        with Path(f"{records}.{dist.get_rank()}").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if where == "step" and metrics.step == int(at) and dist.get_rank() == 0:
            die()
        return metrics

    def dying_save(state, path, **options) -> None:
        save(state, path, **options)
        if where == "saving" and f"step_{int(at):08d}" in str(path) and dist.get_rank() == 0:
            die()

    loop.train_step = recorded_step
    store.dist_checkpointing.save = dying_save
    loop.train(load_recipe(recipe, overrides))
    platform.leave_process()


if __name__ == "__main__":
    main()
