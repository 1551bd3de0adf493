"""The training loop."""

import logging

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.training.batches import train_batches
from megatron_vita.training.callbacks import build_callbacks
from megatron_vita.training.run import open_run
from megatron_vita.training.step import train_step

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> None:
    """Runs a recipe to its last step, from where its checkpoints stand. Called by every rank."""
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    run = open_run(recipe)
    callbacks = build_callbacks(run)
    if run.step >= recipe.training.train_iters:
        logger.info("nothing to do: step %d of %d is done", run.step, recipe.training.train_iters)
        return
    batches = train_batches(run)
    try:
        while run.step < recipe.training.train_iters:
            metrics = train_step(run, batches)
            for callback in callbacks:
                callback.after_step(run, metrics)
    finally:
        batches.close()
