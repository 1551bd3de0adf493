"""Checkpoints of a run."""

import logging
from pathlib import Path

from megatron_vita.training.callbacks.callback import Callback
from megatron_vita.training.callbacks.hooks import Hooks
from megatron_vita.training.metrics import StepMetrics
from megatron_vita.training.run import Run, save_run

logger = logging.getLogger(__name__)


class SaveCallback(Callback):
    """Saving every `save_interval` steps, after the last, and when the run stops."""

    collective = True

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Save if it is due, and call `on_save`."""
        # The last step too, whatever the interval: its weights are the result of the run.
        last = metrics.stops or run.step == run.recipe.training.train_iters
        if run.step % run.recipe.checkpoint.save_interval and not last:
            return
        path: Path = save_run(run)
        logger.info("saved %s", path)
        self._hooks.call("on_save", path)
