"""Steps of a run done again from its nearest checkpoint, and compared with what it logged."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vita.config import NumericsConfig, Recipe
from megatron_vita.config.run_files import LEDGERS
from megatron_vita.data.loading.ledger import Ledger, read_ledgers
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.guard import Fault, Guard
from megatron_vita.training.run.run import Run, open_run
from megatron_vita.training.step.batches import train_batches
from megatron_vita.training.step.step import train_step

NOT_DONE = {
    "checkpoint.save": "",
    "checkpoint.mirror": "",
    "checkpoint.keep_best": 0,
    "checkpoint.keep_every": 0,
    "numerics": NumericsConfig(),
    "training.eval_interval": 0,
}
"""Values of fields with which a run writes nothing; its rules are replaced by what it logged."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """Numbers that a run logged of a step; None for those that were not finite."""

    loss: float | None
    grad_norm: float | None
    is_skipped: bool = False


class LoggedGuard(Guard):
    """Judge that repeats what a run decided, whatever the numbers are now."""

    def __init__(self, skipped: Collection[int], *, step: int) -> None:
        """skipped: steps that the run has skipped; step: the last one that is done."""
        super().__init__(NumericsConfig())
        self._skipped = skipped
        self._step = step

    @property
    def may_skip(self) -> bool:
        """True if the run has skipped a step."""
        return bool(self._skipped)

    def judge(self, loss: float, grad_norm: float) -> Fault | None:
        """Return the decision on the next step."""
        self._step += 1
        if self._step in self._skipped:
            return Fault(reason="skipped in the log", action="skip")
        return None


def open_replay(recipe: Recipe, folder: Path, *, step: int) -> Run:
    """Open a run as it stood at its newest whole checkpoint before `step`, or at its start.
    Collective.

    recipe: of the run at that step.
    folder: of its checkpoints, where nothing is written.
    """
    run = open_run(recipe.replaced(NOT_DONE), folder=folder, up_to=step - 1)
    # Samples that could not be read then are masked again, even if they can be read now.
    run.ledger = Ledger([*run.ledger.events(), *read_ledgers(folder / LEDGERS)])
    return run


def replay(run: Run, logged: Mapping[int, LoggedStep], *, step: int) -> list[int]:
    """Train up to `step`, and return the steps whose numbers are not those logged. Collective."""
    run.guard = LoggedGuard(
        {number for number, numbers in logged.items() if numbers.is_skipped}, step=run.step
    )
    differing = []
    batches = train_batches(run)
    try:
        while run.step < step:
            metrics = train_step(run, batches)
            if not _compare(metrics, logged.get(run.step)):
                differing.append(run.step)
        # Packs that were read ahead wait for the agreement of all ranks.
        batches.close_together()
    finally:
        batches.close()
    return differing


def _compare(metrics: StepMetrics, logged: LoggedStep | None) -> bool:
    """Tell whether a step is as logged, in the log too; one that is not in the log is."""
    line = f"step {metrics.step}: loss {metrics.loss!r}, gradient norm {metrics.grad_norm!r}"
    if logged is None:
        logger.info("%s: not in the log", line)
        return True
    if _is_logged(metrics.loss, logged.loss) and _is_logged(metrics.grad_norm, logged.grad_norm):
        logger.info("%s: as logged", line)
        return True
    logger.warning("%s: logged were %r and %r", line, logged.loss, logged.grad_norm)
    return False


def _is_logged(value: float, logged: float | None) -> bool:
    if logged is None:
        return not math.isfinite(value)
    # Earlier versions logged seven digits.
    return logged in (value, float(f"{value:.7g}"))
