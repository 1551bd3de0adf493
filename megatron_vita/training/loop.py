"""The training loop."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.errors import StoppedError
from megatron_vita.supervise.last_words import keep_last_words
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.callbacks.build import build_hooks
from megatron_vita.training.callbacks.importing import import_callbacks
from megatron_vita.training.callbacks.optional import check_packages
from megatron_vita.training.header import describe_run
from megatron_vita.training.rollback import restore, take_back
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run, open_run
from megatron_vita.training.run.run_folder import RunLog
from megatron_vita.training.step.batches import FinalBatches, train_batches
from megatron_vita.training.step.step import train_step

logger = logging.getLogger(__name__)


def train(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> None:
    """Run a recipe to its last step, resuming from its latest checkpoint. Called by every rank.

    Args:
        recipe: a checked recipe.
        callbacks: hooks of the loop, the same on every rank; the recipe's `training.callbacks` are
            added to them.

    Raises:
        StoppedError: a rank received SIGTERM, SIGUSR1 or Ctrl-C, or a callback asked for it; the
            run has saved.
        CallbackError: a callback failed on some rank.
    """
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    keep_last_words()
    check_packages(recipe)
    callbacks = [*callbacks, *import_callbacks(recipe.training.callbacks)]
    with RunLog(dist.get_rank()) as log:
        run = open_run(recipe)
        if run.step >= recipe.training.train_iters:
            done = recipe.training.train_iters
            logger.info("nothing to do: step %d of %d is done", run.step, done)
            return
        run.hooks = build_hooks(run, callbacks, log=log)
        if dist.get_rank() == 0:
            for line in describe_run(run):
                logger.info("%s", line)
        _loop(run, run.hooks)


def _loop(run: Run, hooks: Hooks) -> None:
    steps = run.recipe.training.train_iters
    logger.info("reading the first packs")
    # Entered in this order, left in the reverse: hooks end first, while batches still exist.
    with ExitStack() as stack:
        batches = train_batches(run)
        stack.callback(lambda: batches.close())
        stack.enter_context(run.stop)
        stack.enter_context(hooks)
        while run.step < steps:
            hooks.call("before_step")
            metrics = train_step(run, batches)
            if metrics.rolls_back:
                batches = _roll_back(run, batches, stops=metrics.stops)
                continue
            hooks.after_step(metrics)
            if metrics.stops and run.step < steps:
                raise StoppedError(_stop_message(run))


def _roll_back(run: Run, batches: FinalBatches, *, stops: bool) -> FinalBatches:
    """Return to an earlier step, and begin to read the packs that follow. Collective.

    Raises:
        StoppedError: the run was told to stop; it resumes at the earlier step.
    """
    batches.close_together()
    faulty = run.step + 1
    resume = take_back(run)
    assert run.hooks is not None
    # Before the restore, which a run may not come to the end of.
    run.hooks.call("on_take_back", faulty, back_to=resume.step)
    # Who stops a run may not wait for a restore.
    if stops:
        raise StoppedError(
            f"told to stop ({_stop_reason(run)}) in step {faulty} of {run.recipe.training.train_iters}, which is "
            f"rolled back to step {resume.step}: run the same command to resume"
        )
    restore(run, resume)
    batches = train_batches(run)
    run.hooks.call("on_rollback", faulty)
    return batches


def _stop_message(run: Run) -> str:
    outcome = "nothing is saved: set checkpoint.save"
    if run.recipe.checkpoint.save:
        outcome = "saved; run the same command to resume"
    return (
        f"told to stop ({_stop_reason(run)}) after step {run.step} of "
        f"{run.recipe.training.train_iters}: {outcome}"
    )


def _stop_reason(run: Run) -> str:
    return run.stop.received or run.stop_reason or "another rank was"
