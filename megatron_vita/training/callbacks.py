"""Side features of the loop: logging, TensorBoard, validation, saving. Each runs on every rank."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_vita.errors import VitaError
from megatron_vita.training.batches import validation_batches
from megatron_vita.training.callback import Callback
from megatron_vita.training.metrics import DATA_SECONDS, StepMetrics
from megatron_vita.training.profiling import ProfileCallback
from megatron_vita.training.run import Run, save_run
from megatron_vita.training.step import validate

FEW_DOCUMENTS = 1000  # a share of fewer says little
LISTED = 20
logger = logging.getLogger(__name__)


class LogCallback(Callback):
    """One line every `log_interval` steps, with the time that is left."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Log the step."""
        training = run.recipe.training
        if run.step % training.log_interval and run.step != training.train_iters:
            return
        left = (training.train_iters - run.step) * metrics.seconds
        parts = (
            f"step {run.step}/{training.train_iters}",
            f"loss {metrics.loss:.6f}",
            f"grad norm {metrics.grad_norm:.4f}",
            f"lr {metrics.lr:.3e}",
            f"{metrics.tokens_per_second / metrics.ranks:.0f} tokens/s/GPU",
            f"{metrics.tiles_per_second / metrics.ranks:.1f} tiles/s/GPU",
            _arithmetic(metrics),
            f"{metrics.loss_rows} loss rows",
            f"fill {100 * metrics.fill:.1f} %",
            *_memory(metrics),
            f"data {metrics.values[DATA_SECONDS]:.2f} s",
            f"{metrics.seconds:.2f} s",
            f"left {_clock(left)}",
        )
        logger.info("%s", " | ".join([*parts, *_damage(metrics)]))


def _damage(metrics: StepMetrics) -> Iterator[str]:
    if metrics.damaged:
        yield f"{metrics.damaged} damaged samples"
    if metrics.stand_ins:
        yield f"{metrics.stand_ins} repeated frames"


def _arithmetic(metrics: StepMetrics) -> str:
    """Speed of the model's arithmetic, its share of the device's, and vision's share of it."""
    share = metrics.scalars().get("speed/matmul_share")
    of_device = f" ({share:.0%})" if share else ""
    vision = metrics.vision_flops / max(metrics.flops, 1)
    return f"{metrics.tflops_per_gpu:.1f} TFLOP/s/GPU{of_device}, vision {vision:.0%}"


def _memory(metrics: StepMetrics) -> Iterator[str]:
    """Most memory of a rank: of its device where it has one, of its host."""
    values = metrics.values
    if "memory/peak_gib" in values:
        yield (
            f"memory {values['memory/peak_gib']:.1f} GiB, "
            f"{values['memory/reserved_gib']:.1f} reserved"
        )
    pinned = values.get("memory/pinned_gib", 0.0)
    of_it = f", {pinned:.1f} pinned" if pinned else ""
    yield f"host {values['memory/host_gib']:.1f} GiB{of_it}"


class TensorBoardCallback(Callback):
    """Scalars of each step, and the loss of each source. Those that a killed run wrote after its
    checkpoint go."""

    def __init__(self, folder: str, *, step: int) -> None:
        """`step`: where the run stands."""
        self.writer = SummaryWriter(folder, purge_step=step + 1) if dist.get_rank() == 0 else None

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Write on rank 0."""
        if self.writer is None:
            return
        for name, value in metrics.scalars().items():
            self.writer.add_scalar(name, value, run.step)
        self.writer.flush()

    def add_validation(self, metrics: StepMetrics) -> None:
        """Write the held-out loss, and that of each source."""
        if self.writer is not None:
            self.writer.add_scalar("validation/loss", metrics.loss, metrics.step)
            for source, loss in metrics.source_losses.items():
                self.writer.add_scalar(f"validation/loss/{source}", loss, metrics.step)
            self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()


class DamageCallback(Callback):
    """Stops a run that meets more damaged samples than `data.max_damaged` allows."""

    def __init__(self, run: Run) -> None:
        assert run.train_stream is not None
        self.documents = run.train_stream.plan.documents_before(run.consumed_packs)
        self.damaged = sum(damage.pack < run.consumed_packs for damage in run.read_damage())

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """VitaError with a list, on all ranks, once too many are damaged."""
        self.documents += metrics.documents
        self.damaged += metrics.damaged
        allowed = run.recipe.data.max_damaged * max(self.documents, FEW_DOCUMENTS)
        if not metrics.damaged or self.damaged <= allowed:
            return
        listed = [f"{damage.shard} {damage.key} ({damage.reason})" for damage in run.read_damage()]
        raise VitaError(
            f"step {run.step}: {self.damaged} of {self.documents} samples are damaged, more than data.max_damaged "
            f"{run.recipe.data.max_damaged:g} allows: mend or remove them, or raise it. {'; '.join(listed[:LISTED])}"
            + (f"; all {len(listed)} are in {run.ledger_folder}" if run.ledger_folder else "")
        )


class ValidationCallback(Callback):
    """Loss on held-out packs every `eval_interval` steps and after the last, unless the run is to
    stop."""

    def __init__(self, tensorboard: TensorBoardCallback | None) -> None:
        self.tensorboard = tensorboard

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Validates and logs."""
        training = run.recipe.training
        is_last = run.step == training.train_iters
        if not is_last and (metrics.stops or run.step % training.eval_interval):
            return
        batches, count = validation_batches(run)
        try:
            result = validate(run, batches, num_microbatches=count)
        finally:
            batches.close()
        sources = ", ".join(f"{name} {loss:.6f}" for name, loss in result.source_losses.items())
        logger.info("validation at step %d | loss %.6f | %s", run.step, result.loss, sources)
        if self.tensorboard is not None:
            self.tensorboard.add_validation(result)


class SaveCallback(Callback):
    """A checkpoint every `save_interval` steps, after the last, and where the run is to stop."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Saves on all ranks."""
        last = metrics.stops or run.step == run.recipe.training.train_iters
        if run.step % run.recipe.checkpoint.save_interval and not last:
            return
        path: Path = save_run(run)
        logger.info("saved %s", path)


def build_callbacks(run: Run) -> list[Callback]:
    """The callbacks that a recipe asks for, in the order in which they run: what can fail comes
    after saving."""
    recipe = run.recipe
    callbacks: list[Callback] = [LogCallback(), DamageCallback(run)]
    if recipe.training.profile_step_start:
        callbacks.append(ProfileCallback(recipe.training))
    if recipe.checkpoint.save:
        callbacks.append(SaveCallback())
    folder = recipe.training.tensorboard_dir
    tensorboard = TensorBoardCallback(folder, step=run.step) if folder else None
    if tensorboard is not None:
        callbacks.append(tensorboard)
    if run.validation_stream is not None:
        callbacks.append(ValidationCallback(tensorboard))
    return callbacks


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
