"""Callback that records the steps of an elastic job, and holds it where a node is to be lost."""

import json
import time
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import PackSlice
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run


class PacedCallback(Callback):
    """Records of each step, as `tests.faults.job` reads them.

    Args:
        folder: folder of the job.
        alone_at: step after which two ranks wait for the loss of one.
        back_at: step after which one rank waits for the other.
    """

    collective = True

    def __init__(self, *, folder: str, alone_at: int, back_at: int) -> None:
        self._folder = Path(folder)
        self._alone_at = alone_at
        self._back_at = back_at
        self._packs: list[int] = []
        self._records: Path | None = None

    def on_start(self, run: Run) -> None:
        """Choose a file for the records: of a later start than all before. Collective."""
        start = [time.time_ns()]
        dist.broadcast_object_list(start, src=0)
        self._records = self._folder / f"records.{start[0]}.{dist.get_rank()}"

    def before_step(self, run: Run) -> None:
        """Wait where a node is to be lost or to come back."""
        if dist.get_world_size() == 2 and run.step == self._alone_at:
            while not (self._folder / "lost").exists():
                time.sleep(0.05)
                run.enter("callbacks")
        if dist.get_world_size() == 1 and run.step == self._back_at:
            while not run.stop.received:
                time.sleep(0.05)
                run.enter("callbacks")

    def on_losses(self, run: Run, losses: Tensor, *, batch: Batch, pack: PackSlice) -> None:
        """Note the pack."""
        self._packs.append(batch.pack_id)

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Write the step."""
        row = {"step": run.step, "loss": metrics.loss, "packs": self._packs}
        row["ranks"] = dist.get_world_size()
        assert self._records is not None
        with self._records.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._packs = []
        if dist.get_rank() == 0:
            (self._folder / "reached").write_text(str(run.step))
