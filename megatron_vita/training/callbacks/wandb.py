"""Metrics for Weights & Biases."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vita.training.callbacks.optional import known_run, note_run
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run

logger = logging.getLogger(__name__)


class WandbCallback(Callback):
    """Writer of all scalars from rank 0, plotted over `step`; a restart continues the same run.

    Steps that are done again, after a rollback or a restart, are logged again.

    Environment variables of the package (WANDB_MODE=offline, WANDB_ENTITY, WANDB_API_KEY ...) apply.
    """

    def __init__(self, project: str, *, name: str = "", folder: Path | None = None) -> None:
        """`folder`: of the run, for local files and the run's id."""
        self._project = project
        self._name = name
        self._folder = folder
        self._run: Any = None

    def on_start(self, run: Run) -> None:
        """Create the run in Weights & Biases, or continue the one of an earlier start."""
        if dist.get_rank() != 0:
            return
        import wandb

        known = known_run(self._folder, "wandb")
        self._run = wandb.init(
            project=self._project,
            name=self._name or None,
            id=known or None,
            resume="allow" if known else None,
            dir=str(self._folder) if self._folder else None,
            config=dataclasses.asdict(run.recipe),
            settings=wandb.Settings(silent=True, console="off"),
        )
        note_run(self._folder, "wandb", self._run.id)
        self._run.define_metric("*", step_metric="step")
        logger.info("W&B: %s", self._run.url or self._run.dir)

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        """Hand over the scalars, which a process of the package sends."""
        if self._run is not None:
            self._run.log({"step": metrics.step} | metrics.scalars())

    def on_error(self, run: Run, error: BaseException) -> None:
        """Mark the run as failed."""
        self._finish(1)

    def on_end(self, run: Run) -> None:
        """Wait until all is sent."""
        self._finish(0)

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None
