"""Log of a run: a line for each logged step and validation, and a progress bar on a terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_vita.training.callbacks.recording import is_logged
from megatron_vita.training.metrics.metrics import DATA_SECONDS, StepMetrics
from megatron_vita.training.metrics.pace import Pace, clock
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run

STEP_LINE = "step_line"
"""Attribute of the log records of steps, which a progress bar replaces on a terminal."""
_BAR = "{percentage:3.0f}% {bar} step {n_fmt}/{total_fmt} | {postfix[0]}"
logger = logging.getLogger(__name__)


class LogCallback(Callback):
    """Log line every `log_interval` steps, with the remaining time, and after each validation.

    On a terminal a progress bar replaces the lines of steps.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._bar: tqdm[Any] | None = None
        self._brief = ["first step"]  # content that the bar shows
        self._stack = ExitStack()

    def on_start(self, run: Run) -> None:
        """Show a progress bar if the output is a terminal."""
        self._pace.mark("rest")
        if dist.get_rank() != 0 or not sys.stderr.isatty():
            return
        self._bar = tqdm(
            total=run.recipe.training.train_iters,
            initial=run.step,
            bar_format=_BAR,
            dynamic_ncols=True,
            postfix=self._brief,  # type: ignore[call-overload]
        )
        self._stack.enter_context(logging_redirect_tqdm())
        for handler in logging.getLogger().handlers:
            if getattr(handler, "stream", None) is sys.stderr:
                handler.addFilter(_is_no_step)

    def before_step(self, run: Run) -> None:
        """Begin to measure the step."""
        self._pace.mark("rest")

    def on_rollback(self, run: Run, step: int) -> None:
        """Leave the rollback and its faulty step out of the time of the next step."""
        self._pace.restart()

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        """Log the step or the validation."""
        if metrics.held_out:
            logger.info("%s", _describe_validation(metrics))
            return
        self._pace.mark("step")
        if not is_logged(run, metrics):
            return
        left = clock(self._pace.left(run.step))
        logger.info("%s", _describe_step(run, metrics, left=left), extra={STEP_LINE: True})
        if self._bar is not None:
            self._bar.n = run.step
            self._brief[0] = _describe_briefly(metrics, left=left)
            self._bar.refresh()

    def on_validation(self, run: Run, metrics: StepMetrics) -> None:
        """Measure the validation, which has just ended."""
        self._pace.mark("validation")

    def on_save(self, run: Run, path: Path) -> None:
        """Measure the saving, which has just ended."""
        self._pace.mark("save")

    def on_end(self, run: Run) -> None:
        """Close the progress bar."""
        self._stack.close()
        if self._bar is not None:
            self._bar.close()


def _is_no_step(record: logging.LogRecord) -> bool:
    return not hasattr(record, STEP_LINE)


def _describe_briefly(metrics: StepMetrics, *, left: str) -> str:
    return (
        f"loss {metrics.loss:.4f} | {metrics.tokens_per_second / metrics.ranks:.0f} tokens/s/GPU | "
        f"{metrics.seconds:.2f} s | left {left}"
    )


def _describe_validation(metrics: StepMetrics) -> str:
    sources = ", ".join(f"{name} {loss:.6f}" for name, loss in metrics.source_losses.items())
    return f"validation at step {metrics.step} | loss {metrics.loss:.6f} | {sources}"


def _describe_step(run: Run, metrics: StepMetrics, *, left: str) -> str:
    parts = (
        f"step {run.step}/{run.recipe.training.train_iters}",
        f"loss {metrics.loss:.6f}",
        f"grad norm {metrics.grad_norm:.4f}",
        *_reaction(metrics),
        f"lr {metrics.lr:.3e}",
        f"{metrics.tokens_per_second / metrics.ranks:.0f} tokens/s/GPU",
        f"{metrics.tiles_per_second / metrics.ranks:.1f} tiles/s/GPU",
        _arithmetic(metrics),
        f"{metrics.loss_tokens} loss tokens",
        f"fill {100 * metrics.fill:.1f} %",
        *_memory(metrics),
        f"data {metrics.values[DATA_SECONDS]:.2f} s",
        f"{metrics.seconds:.2f} s",
        f"left {left}",
        *_damage(metrics),
        *(f"{name} {value:.6g}" for name, value in metrics.recorded.items()),
    )
    return " | ".join(parts)


def _reaction(metrics: StepMetrics) -> Iterator[str]:
    if metrics.skipped:
        yield "skipped"


def _damage(metrics: StepMetrics) -> Iterator[str]:
    if metrics.damaged:
        yield f"{metrics.damaged} damaged samples"
    if metrics.stand_ins:
        yield f"{metrics.stand_ins} repeated frames"


def _arithmetic(metrics: StepMetrics) -> str:
    """Format model TFLOP/s, their fraction of the device's rate, and vision's fraction of them."""
    of_device = ""
    if share := metrics.scalars().get("speed/matmul_share"):
        of_device = f" ({share:.0%})"
    vision = metrics.vision_flops / max(metrics.flops, 1)
    return f"{metrics.tflops_per_gpu:.1f} TFLOP/s/GPU{of_device}, vision {vision:.0%}"


def _memory(metrics: StepMetrics) -> Iterator[str]:
    """Yield the most memory of a rank: of its device where it has one, and of its host."""
    values = metrics.values
    if "memory/peak_gib" in values:
        yield (
            f"memory {values['memory/peak_gib']:.1f} GiB, "
            f"{values['memory/reserved_gib']:.1f} reserved"
        )
    host = f"host {values['memory/host_gib']:.1f} GiB"
    if pinned := values.get("memory/pinned_gib", 0.0):
        host += f", {pinned:.1f} pinned"
    yield host
