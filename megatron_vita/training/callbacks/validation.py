"""Validation on held-out packs."""

from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run
from megatron_vita.training.step.batches import validation_batches
from megatron_vita.training.step.step import validate


class ValidationCallback(Callback):
    """Validation every `eval_interval` steps and after the last, unless the run stops."""

    collective = True

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Validate if it is due, and call `on_validation` and `on_log`."""
        training = run.recipe.training
        is_last = run.step == training.train_iters
        if not is_last and (metrics.stops or run.step % training.eval_interval):
            return
        run.enter("validation", held_out=True)
        # Opened for each validation: its packs are the same ones again from the first.
        batches, count = validation_batches(run)
        try:
            result = validate(run, batches, num_microbatches=count)
        finally:
            batches.close()
        run.enter("callbacks", held_out=False)
        self._hooks.call("on_validation", result)
        self._hooks.call("on_log", result)
