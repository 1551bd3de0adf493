"""Checkpoints of a run."""

import logging
import time
from functools import partial

import torch.distributed as dist

from megatron_vita.checkpoint.mirror import Uploads
from megatron_vita.checkpoint.saver import by_first
from megatron_vita.checkpoint.store import latest_name
from megatron_vita.errors import CheckpointError, SaveError
from megatron_vita.training.metrics.metrics import SAVING, StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.faults import FaultReport
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.run_state import open_saver, retention_of, start_save

LAST_PAUSES = (1.0, 4.0)
"""Seconds before each further attempt to save the last step, which no later step can retry."""
logger = logging.getLogger(__name__)


class SaveCallback(Callback):
    """Saving every `save_interval` steps, after the last, and when the run stops.

    A save that fails is tried again after `retry_steps`, and when the next one is due.
    """

    collective = True

    def __init__(self, run: Run, hooks: Hooks) -> None:
        self._hooks = hooks
        self._saver = open_saver(
            run.recipe,
            in_background=run.recipe.checkpoint.async_save,
            claim=run.claim,
            on_progress=partial(run.enter, "saving"),
        )
        self._uploads = _open_uploads(run)
        self._retry_at = 0  # step; 0: nothing to try again
        self._started = 0.0
        self._waited = 0.0  # seconds that training waited for the save under way
        self._has_waited_for_uploads = False

    def before_step(self, run: Run) -> None:
        """Report to all ranks whether this one is still writing; start a pending upload."""
        # Not in `after_step`: retention in the store needs the step's scores, noted after it.
        if self._uploads is not None:
            self._uploads.poll(run.step)
        run.meter.add(SAVING, float(self._saver.is_writing), reduce="max")

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Finish the save under way if all ranks have written; begin one if it is due."""
        run.enter("saving")
        if self._saver.is_active and not metrics.saving:
            self._finish(run)
        if _is_last(run, metrics):
            self._save_last(run)
        elif self.is_due(run, metrics):
            self._start(run)
        # No step follows in which it could be finished.
        if self._saver.is_active and self._hooks.knows_failure:
            self._finish(run)

    def is_due(self, run: Run, metrics: StepMetrics) -> bool:
        """Tell, before `after_step`, whether the step is saved. The same on all ranks."""
        is_regular = run.step % run.recipe.checkpoint.save_interval == 0
        return _is_last(run, metrics) or is_regular or run.step == self._retry_at

    def on_fault(self, run: Run, report: FaultReport) -> None:
        """Finish the save under way before a rollback, which looks for checkpoints, or the end."""
        if report.action != "skip" and self._saver.is_active:
            run.enter("saving")
            self._finish(run)

    def on_rollback(self, run: Run, step: int) -> None:
        """Forget the metrics of steps that are done again."""
        self._saver.forget_scores(after=run.step)

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        """Note the metric that `keep_best` compares, for the checkpoint of this step."""
        checkpoint = run.recipe.checkpoint
        if not checkpoint.keep_best:
            return
        value = metrics.scalars().get(checkpoint.best_metric)
        if value is not None:
            self._saver.note_scores({checkpoint.best_metric: value}, step=run.step)

    def on_complete(self, run: Run) -> None:
        """Wait on all ranks for the upload of the last checkpoint.

        Raises:
            SaveError: on all ranks, if it cannot be uploaded.
        """
        self._finish_uploads(run)

    def on_stop(self, run: Run) -> None:
        """Wait on all ranks for the upload of what a run that was told to stop has saved.

        A launcher ends a job whose ranks end before others.
        """
        self._finish_uploads(run)

    def on_error(self, run: Run, error: BaseException) -> None:
        """Upload the last checkpoint of a run whose end has failed, unless that is the error.

        Other ranks may not come here.
        """
        is_last = run.step == run.recipe.training.train_iters
        if is_last and not self._has_waited_for_uploads:
            self._saver.abort()
            run.enter("saving")
            self._finish_own_uploads(run.step)

    def on_end(self, run: Run) -> None:
        """Give up what an error has left under way."""
        self._saver.abort()
        if self._uploads is not None:
            self._uploads.abort()

    def _finish_uploads(self, run: Run) -> None:
        self._has_waited_for_uploads = True
        run.enter("saving")
        if run.recipe.checkpoint.mirror:
            by_first(partial(self._finish_own_uploads, run.step))

    def _finish_own_uploads(self, step: int) -> None:
        if self._uploads is not None:
            self._uploads.finish(step)

    def _start(self, run: Run) -> None:
        if self._saver.is_active:
            self._finish(run)
        self._retry_at = 0
        try:
            self._begin(run)
        except SaveError as error:
            self._put_off(run, error)
            return
        if not run.recipe.checkpoint.async_save:
            self._finish(run)

    def _finish(self, run: Run) -> None:
        try:
            self._complete()
        except SaveError as error:
            self._put_off(run, error)

    def _begin(self, run: Run) -> None:
        run.enter("saving")  # each attempt is progress
        self._started = time.monotonic()
        start_save(run, self._saver)
        self._waited = time.monotonic() - self._started

    def _complete(self) -> None:
        began = time.monotonic()
        path = self._saver.finish()
        now = time.monotonic()
        self._waited += now - began
        seconds = now - self._started
        logger.info("saved %s in %.1f s; training waited %.1f s", path, seconds, self._waited)
        if self._uploads is not None:
            self._uploads.add(path)
        self._hooks.call("on_save", path)

    def _put_off(self, run: Run, error: SaveError) -> None:
        """Warn of a save that failed, and choose the step to try again."""
        self._retry_at = run.step + run.recipe.checkpoint.retry_steps
        logger.warning(
            "step %d: not saved: %s. Training continues; the next attempt is after step %d. %s",
            run.step,
            error,
            self._retry_at,
            _describe_last(run),
        )

    def _save_last(self, run: Run) -> None:
        """Save and wait for it, with some attempts.

        Raises:
            SaveError: on all ranks, if none succeeded.
        """
        if self._saver.is_active:
            self._finish(run)
        for pause in (*LAST_PAUSES, None):
            try:
                self._begin(run)
                self._complete()
                return
            except SaveError as error:
                if pause is None:
                    raise
                logger.warning("step %d: not saved: %s; again in %g s", run.step, error, pause)
                time.sleep(pause)


def _is_last(run: Run, metrics: StepMetrics) -> bool:
    """Tell whether no step follows, whatever the interval: its weights are the result of the run."""
    return metrics.stops or run.step == run.recipe.training.train_iters


def _open_uploads(run: Run) -> Uploads | None:
    """Return the uploads of the first rank, if the recipe asks for them."""
    checkpoint = run.recipe.checkpoint
    if not checkpoint.mirror or dist.get_rank() != 0:
        return None
    return Uploads(
        checkpoint.mirror,
        retention=retention_of(run.recipe),
        retry_steps=checkpoint.retry_steps,
        claim=run.claim,
        on_progress=partial(run.enter, "saving"),
    )


def _describe_last(run: Run) -> str:
    try:
        name = latest_name(run.recipe.checkpoint.save)
    except CheckpointError as error:
        return str(error)
    if name:
        return f"The last checkpoint is {name}"
    return "There is no checkpoint yet"
