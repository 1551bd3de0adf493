"""Metrics for MLflow."""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vita.config.run_files import RECIPE
from megatron_vita.training.callbacks.optional import known_run, note_run
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run

_UNKNOWN = re.compile(r"[^A-Za-z0-9_.:/ -]")
"""Characters that MLflow refuses in names of metrics, while names of datasets may have any."""
logger = logging.getLogger(__name__)


class MlflowCallback(Callback):
    """Writer of all scalars from rank 0 in the background; a restart continues the same run.

    Steps that are done again, after a rollback or a restart, are logged again.

    `train/loss/SOURCE` is `train/loss.SOURCE` there: in a local folder `train/loss` is a file, which
    can hold no others.
    """

    def __init__(
        self, experiment: str, *, tracking_uri: str = "", name: str = "", folder: Path | None = None
    ) -> None:
        """`tracking_uri`: a server or a local folder; empty: MLFLOW_TRACKING_URI. `folder`: of the
        run, for its recipe and id."""
        self._experiment = experiment
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self._is_local = "://" not in self._uri or self._uri.startswith("file:")
        self._name = name
        self._folder = folder
        self._client: Any = None
        self._run_id = ""
        self._pending: Any = None

    def on_start(self, run: Run) -> None:
        """Create the run in MLflow, or continue the one of an earlier start."""
        if dist.get_rank() != 0:
            return
        if self._is_local:  # the package otherwise refuses plain folders
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri or None)
        self._run_id = known_run(self._folder, "mlflow") or self._create_run()
        note_run(self._folder, "mlflow", self._run_id)
        self._client.update_run(self._run_id, status="RUNNING")
        if self._folder is not None:
            self._client.log_artifact(self._run_id, str(self._folder / RECIPE))
        logger.info("MLflow: experiment %s, run %s", self._experiment, self._run_id)

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        """Hand over the scalars, which a thread of the package sends."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        values = [
            Metric(_name_there(name), value, now, metrics.step)
            for name, value in metrics.scalars().items()
        ]
        # Also to a folder: it appends to a file for each metric, which takes milliseconds.
        self._pending = self._client.log_batch(self._run_id, values, synchronous=False)

    def on_error(self, run: Run, error: BaseException) -> None:
        """Mark the run as failed."""
        self._finish("FAILED")

    def on_end(self, run: Run) -> None:
        """Wait until all is sent."""
        self._finish("FINISHED")

    def _create_run(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            known.experiment_id if known else self._client.create_experiment(self._experiment)
        )
        return self._client.create_run(experiment, run_name=self._name or None).info.run_id

    def _finish(self, status: str) -> None:
        if self._client is None:
            return
        client = self._client
        self._client = None
        try:
            if self._pending is not None:
                self._pending.wait()
            client.set_terminated(self._run_id, status=status)
        except Exception as error:  # of the server; the run itself has ended as it has
            logger.warning("MLflow: the last metrics were not sent: %s", error)


def _name_there(name: str) -> str:
    """A metric's name as MLflow takes it, with one slash at most."""
    part, slash, rest = _UNKNOWN.sub("_", name).partition("/")
    return f"{part}{slash}{rest.replace('/', '.')}"
