"""Record of a run in its folder: recipe, environment, log, and metrics as lines of JSON."""

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from megatron_vita.checkpoint.retention import step_of
from megatron_vita.config.run_files import METRICS
from megatron_vita.errors import PlatformError
from megatron_vita.files import cut_torn_line
from megatron_vita.training.metrics.environment import describe_environment
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.faults import FaultReport, sample_keys, write_dump
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.run_folder import RunLog, note_start, take_back_recipes

EXACT = ("train/loss", "train/grad_norm")
"""Metrics with all digits, which a replay compares."""


class FolderCallback(Callback):
    """Records the run in its folder, on rank 0 but for logs.

    Each line of `metrics.jsonl` has `event` (start, step, fault, rollback, validation, save,
    stop, error, end),
    `step` and `time`; a value that is not finite is null. A start or rollback at step s takes back
    what was done after s before.
    """

    def __init__(self, folder: Path, log: RunLog) -> None:
        self._folder = folder
        self._log = log
        self._metrics: TextIO | None = None
        self._has_failed = False
        self._taken_back_to = 0  # step, by the last rollback

    def on_start(self, run: Run) -> None:
        """Append to what earlier starts have recorded, without a torn last line.

        Raises:
            PlatformError: the folder cannot be written.
        """
        try:
            self._begin(run)
        except OSError as error:
            raise PlatformError(
                f"{self._folder}: the run's folder cannot be written: {error.strerror}; training.run_dir names it, "
                "or else checkpoint.save"
            ) from error

    def _begin(self, run: Run) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._log.open(self._folder)
        if dist.get_rank() != 0:
            return
        environment = describe_environment()
        note_start(self._folder, run.recipe, step=run.step, environment=environment)
        path = self._folder / METRICS
        cut_torn_line(path)
        self._metrics = path.open("a", encoding="utf-8")
        about = {name: environment[name] for name in ("version", "commit", "host", "ranks")}
        self._write("start", run.step, about | {"steps": run.recipe.training.train_iters})

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        """Write all scalars."""
        self._write("validation" if metrics.held_out else "step", metrics.step, metrics.scalars())

    def on_fault(self, run: Run, report: FaultReport) -> None:
        """Note packs and samples of a faulty step, and write its report to a file of its own."""
        if self._metrics is None:
            return
        self._write(
            "fault",
            report.step,
            {
                "action": report.action,
                "reason": report.reason,
                "train/loss": report.loss,
                "train/grad_norm": report.grad_norm,
                "packs": [pack.pack for pack in report.packs],
                "samples": sample_keys(report.packs),
                "dump": str(write_dump(report, self._folder)),
            },
        )

    def on_take_back(self, run: Run, step: int, *, back_to: int) -> None:
        """Note that the steps after `back_to` are done again, with the recipe of now."""
        self._taken_back_to = back_to
        if self._metrics is None:
            return
        take_back_recipes(self._folder, back_to)
        self._write("rollback", back_to, {"faulty": step})

    def on_rollback(self, run: Run, step: int) -> None:
        """Note it again if an older checkpoint had to be restored."""
        if run.step != self._taken_back_to:
            self.on_take_back(run, step, back_to=run.step)

    def on_save(self, run: Run, path: Path) -> None:
        """Note the checkpoint, which may be of an earlier step."""
        self._write("save", step_of(path.name), {"path": str(path)})

    def on_stop(self, run: Run) -> None:
        """Note that the run was told to stop."""
        self._write("stop", run.step, {})

    def on_error(self, run: Run, error: BaseException) -> None:
        """Note the error."""
        self._has_failed = True
        text = " ".join(str(error).split()) or type(error).__name__
        self._write("error", run.step, {"error": text})

    def on_end(self, run: Run) -> None:
        """Note that all steps are done, if they are and nothing has failed, and close the file."""
        if run.step == run.recipe.training.train_iters and not self._has_failed:
            self._write("end", run.step, {})
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _write(self, event: str, step: int, values: dict[str, Any]) -> None:
        if self._metrics is None:
            return
        row = {"event": event, "step": step, "time": round(time.time(), 3)}
        row |= {name: _plain(value, exact=name in EXACT) for name, value in values.items()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()


def _plain(value: Any, *, exact: bool) -> Any:
    """Round a float to its reliable digits unless `exact`; None for one that is not finite."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if exact else float(f"{value:.7g}")
