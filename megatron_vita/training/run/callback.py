"""Interface of the loop's callbacks."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import PackSlice
from megatron_vita.training.metrics.metrics import StepMetrics

if TYPE_CHECKING:
    from megatron_vita.training.run.faults import FaultReport
    from megatron_vita.training.run.run import Run


class Callback:
    """A side feature of the loop. A hook that is not overridden does nothing.

    Hooks are called on every rank; `run.record` adds metrics from any of them. An error in a hook
    on one rank ends the run on all ranks after the step, with one line that names callback, hook
    and rank.

    collective: the hooks communicate with other ranks. An error in one ends its rank at once, since
        the others already wait in a collective.
    """

    collective: bool = False

    def on_start(self, run: "Run") -> None:
        """Prepare, once weights and position are loaded and before the first step."""

    def before_step(self, run: "Run") -> None:
        """Precede a step; `run.step` steps are done."""

    def on_losses(self, run: "Run", losses: Tensor, *, batch: Batch, pack: PackSlice) -> None:
        """See the losses of one pack of a training step.

        Called where they are computed: on the last pipeline stage, on the first rank of each
        tensor-parallel group, with the rows of this context-parallel rank.

        losses: [L] on the device, weighted, without gradients. Reading them on the host waits for
            the device.
        """

    def after_step(self, run: "Run", metrics: StepMetrics) -> None:
        """Follow a step: the weights are updated, and `metrics` are the same on every rank."""

    def on_fault(self, run: "Run", report: "FaultReport") -> None:
        """See a step that a rule of `numerics` refuses, before anything is done about it.

        `after_step` follows it if it is skipped. After a rollback it never counted.
        """

    def on_take_back(self, run: "Run", step: int, *, back_to: int) -> None:
        """Follow the decision to roll back for faulty step `step`, before anything is restored.

        The run's folder is set back: the run, or its next start, does the steps after `back_to`
        again. `on_rollback` follows, unless the run is told to stop or the restore fails.
        """

    def on_rollback(self, run: "Run", step: int) -> None:
        """Follow a rollback for faulty step `step`: `run.step` steps are done again."""

    def on_log(self, run: "Run", metrics: StepMetrics) -> None:
        """Write what is known of a step, or of a validation (`metrics.held_out`).

        Called after every step. Metrics of `run.record` are in `metrics.recorded` at steps that
        are logged. `metrics.scalars()` has all by name.
        """

    def on_validation(self, run: "Run", metrics: StepMetrics) -> None:
        """Follow a validation."""

    def on_save(self, run: "Run", path: Path) -> None:
        """Follow the writing of a complete checkpoint."""

    def on_complete(self, run: "Run") -> None:
        """Follow the last of all steps; called before `on_end` of any callback."""

    def on_stop(self, run: "Run") -> None:
        """Follow the last step of a run that was told to stop; it has been saved."""

    def on_error(self, run: "Run", error: BaseException) -> None:
        """Follow an error that ends the run on this rank."""

    def on_end(self, run: "Run") -> None:
        """Release resources when the loop ends, with or without an error."""
