"""Reduction of recorded metrics, and their delivery to the callbacks that write them."""

from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run

FAILED = "callbacks/failed"


def is_logged(run: Run, metrics: StepMetrics) -> bool:
    """Tell whether a step is logged: every `log_interval` and the last."""
    training = run.recipe.training
    last = metrics.stops or run.step == training.train_iters
    return last or run.step % training.log_interval == 0


class RecordCallback(Callback):
    """Reduction of recorded metrics over all ranks at logged steps, and call of `on_log`."""

    collective = True

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Complete the step's metrics. Collective at steps that are logged."""
        if is_logged(run, metrics):
            # A hook may have failed since the step's metrics were reduced: tell all ranks here, in
            # a collective that they take part in anyway.
            run.recorded.add(FAILED, float(self._hooks.has_failed), reduce="max")
            metrics.recorded = run.recorded.reduce()
            if metrics.recorded.pop(FAILED):
                self._hooks.announce_failure()
        self._hooks.call("on_log", metrics)
