"""TensorBoard files."""

from typing import Any

import torch.distributed as dist

from megatron_vita.training.callbacks.recording import is_logged
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run


class TensorBoardCallback(Callback):
    """Writer of all scalars of steps and validations, on rank 0.

    Scalars that a killed run wrote after its checkpoint are purged, and those of steps that a
    rollback takes back.
    """

    def __init__(self, folder: str, *, step: int) -> None:
        """`step`: position of the run."""
        self._folder = folder
        self.writer: Any = None
        self._open(step)

    def _open(self, step: int) -> None:
        """Open a file whose reader drops the scalars after `step` from earlier files."""
        if dist.get_rank() == 0:
            # Not above: a second of imports, for runs that have such files.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self._folder, purge_step=step + 1)

    def on_rollback(self, run: Run, step: int) -> None:
        """Begin another file, since the steps after `run.step` are done again."""
        self.on_end(run)
        self._open(run.step)

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        """Write the scalars; those of logged steps are in the file when this returns."""
        if self.writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in metrics.scalars().items()
        ]
        # one event for all: add_scalar takes as long for each value
        self.writer.file_writer.add_summary(Summary(value=values), metrics.step)
        if metrics.held_out or is_logged(run, metrics):
            self.writer.flush()

    def on_end(self, run: Run) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()
