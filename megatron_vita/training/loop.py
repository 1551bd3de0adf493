"""The training loop."""

import logging
from contextlib import ExitStack

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.errors import StoppedError
from megatron_vita.training.batches import train_batches
from megatron_vita.training.callbacks import build_callbacks
from megatron_vita.training.header import describe_run
from megatron_vita.training.run import Run, open_run
from megatron_vita.training.step import train_step

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> None:
    """Runs a recipe to its last step, from where its checkpoints stand. Called by every rank.

    StoppedError once it has been told to stop (SIGTERM or SIGUSR1 to any rank), and has saved.
    """
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    run = open_run(recipe)
    callbacks = build_callbacks(run)
    if run.step >= recipe.training.train_iters:
        logger.info("nothing to do: step %d of %d is done", run.step, recipe.training.train_iters)
        return
    for line in describe_run(run):
        logger.info("%s", line)
    with ExitStack() as stack:
        for callback in callbacks:
            stack.callback(callback.close)
        batches = train_batches(run)
        stack.callback(batches.close)
        stack.enter_context(run.stop)
        while run.step < recipe.training.train_iters:
            for callback in callbacks:
                callback.before_step(run)
            metrics = train_step(run, batches)
            for callback in callbacks:
                callback.after_step(run, metrics)
            if metrics.stops and run.step < recipe.training.train_iters:
                raise StoppedError(_farewell(run))


def _farewell(run: Run) -> str:
    return (
        f"told to stop ({run.stop.heard or 'another rank was'}) after step {run.step} of "
        f"{run.recipe.training.train_iters}: "
        + (
            "saved; the same command goes on"
            if run.recipe.checkpoint.save
            else "nothing is saved: set checkpoint.save"
        )
    )
