"""Log of a run: one line for each logged step and each validation."""

import logging
from collections.abc import Iterator

from megatron_vita.training.callbacks.callback import Callback
from megatron_vita.training.callbacks.recording import is_logged
from megatron_vita.training.metrics import DATA_SECONDS, StepMetrics
from megatron_vita.training.run import Run

logger = logging.getLogger(__name__)


class LogCallback(Callback):
    """Log of one line every `log_interval` steps, with the time left, and one per validation."""

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        """Log the step or the validation."""
        if metrics.held_out:
            logger.info("%s", _describe_validation(metrics))
        elif is_logged(run, metrics):
            logger.info("%s", _describe_step(run, metrics))


def _describe_validation(metrics: StepMetrics) -> str:
    sources = ", ".join(f"{name} {loss:.6f}" for name, loss in metrics.source_losses.items())
    return f"validation at step {metrics.step} | loss {metrics.loss:.6f} | {sources}"


def _describe_step(run: Run, metrics: StepMetrics) -> str:
    training = run.recipe.training
    left = (training.train_iters - run.step) * metrics.seconds
    parts = (
        f"step {run.step}/{training.train_iters}",
        f"loss {metrics.loss:.6f}",
        f"grad norm {metrics.grad_norm:.4f}",
        f"lr {metrics.lr:.3e}",
        f"{metrics.tokens_per_second / metrics.ranks:.0f} tokens/s/GPU",
        f"{metrics.tiles_per_second / metrics.ranks:.1f} tiles/s/GPU",
        _arithmetic(metrics),
        f"{metrics.loss_tokens} loss tokens",
        f"fill {100 * metrics.fill:.1f} %",
        *_memory(metrics),
        f"data {metrics.values[DATA_SECONDS]:.2f} s",
        f"{metrics.seconds:.2f} s",
        f"left {_clock(left)}",
        *_damage(metrics),
        *(f"{name} {value:.6g}" for name, value in metrics.recorded.items()),
    )
    return " | ".join(parts)


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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
