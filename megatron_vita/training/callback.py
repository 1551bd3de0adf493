"""The interface of the loop's side features."""

from megatron_vita.training.metrics import StepMetrics
from megatron_vita.training.run import Run


class Callback:
    """A side feature of the loop; what it does not override does nothing."""

    def before_step(self, run: Run) -> None:
        """Called on every rank before the packs of a step are taken."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Called on every rank once the weights are updated, with the same metrics."""

    def close(self) -> None:
        """Called on every rank when the loop ends, however it ends."""
