"""One optimizer step, and one validation, through megatron-core's schedules."""

import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vita import platform
from megatron_vita.data.batch import Batch
from megatron_vita.errors import VitaError
from megatron_vita.layout.slicing import PackSlice, slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.lora import adapters_off
from megatron_vita.parallel import groups
from megatron_vita.platform.pinned import to_device
from megatron_vita.training.metrics.meter import Meter
from megatron_vita.training.metrics.metrics import (
    DATA_SECONDS,
    LossSums,
    StepMetrics,
    collect,
    count_batch,
    measure_memory,
    reduce_numbers,
)
from megatron_vita.training.run.faults import PackLoss, report_fault
from megatron_vita.training.run.guard import Action, Fault
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run
from megatron_vita.training.step.objective import Objective, TokenObjective
from megatron_vita.training.step.preference import PreferenceObjective, ReferenceObjective

logger = logging.getLogger(__name__)


def train_step(run: Run, batches: Iterator[Batch]) -> StepMetrics:
    """Run one step: forward and backward of a global batch, update, metrics. Collective.

    A step that a rule of `numerics` skips counts, with its packs, but changes neither weights nor
    optimizer. One after which the run is to be rolled back does not count (`rolls_back`).

    Raises:
        VitaError: on all ranks, if a rule stops the run.
    """
    started = time.perf_counter()
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    losses = LossSums(run.train_sources)
    context = StepContext(run=run, meter=run.meter, losses=losses, hooks=run.hooks)
    _run_packs(context, batches, num_microbatches=run.microbatches, forward_only=False)
    run.enter("optimizer")
    fault = _update(run, losses)
    run.enter("metrics")
    run.meter.add("stops", int(bool(run.stop.received or run.stop_reason)))
    run.meter.add("failed", int(run.hooks is not None and run.hooks.has_failed))
    measure_memory(run.meter)
    metrics = collect(run.meter, losses, step=run.step + 1, started=started)
    metrics.lr = get_canonical_lr_for_logging(run.optimizer.param_groups) or 0.0
    metrics.matmul_rate = run.matmul_rate
    if not run.guard.may_skip:
        fault = run.guard.judge(metrics.loss, metrics.grad_norm)
    if fault is not None:
        action = _react(context, fault, metrics)
        metrics.skipped = action == "skip"
        metrics.rolls_back = action == "rollback"
    if metrics.rolls_back:
        return metrics
    run.schedule.step(1)
    run.step += 1
    run.consumed_packs = run.next_pack + run.recipe.training.global_batch_size
    return metrics


def _update(run: Run, losses: LossSums) -> Fault | None:
    """Update the weights, unless a rule skips the step; return what is wrong with it.

    Without such a rule, the step is judged later, by the numbers that it logs: to know them here
    costs a reduction, and waits for the device.
    """
    fault: Fault | None = None

    def may_update(grad_norm: float | Tensor) -> bool:
        nonlocal fault
        fault = run.guard.judge(*reduce_numbers(losses, grad_norm))
        return fault is None

    run.optimizer.may_update = may_update if run.guard.may_skip else None
    _, grad_norm, _ = run.optimizer.step()
    run.meter.add("grad_norm", grad_norm, reduce="mean")
    return fault


def _react(context: "StepContext", fault: Fault, metrics: StepMetrics) -> Action:
    """Report a faulty step to the callbacks and the log. Collective.

    Returns:
        What is to be done.

    Raises:
        VitaError: the run is stopped.
    """
    most = context.run.recipe.numerics.max_rollbacks
    if fault.action == "rollback" and len(context.run.skipped) >= most:
        reason = f"{fault.reason}, after {most} rollbacks (numerics.max_rollbacks)"
        fault = Fault(reason=reason, action="stop")
    report = report_fault(context.run, fault, context.pack_losses, metrics=metrics)
    if context.hooks is not None:
        context.hooks.call("on_fault", report)
    if fault.action == "stop":
        raise VitaError(
            f"{report}: the run diverged there; resume from the last checkpoint with a smaller "
            "optimizer.lr, or with numerics.nonfinite_action and spike_action skip or rollback"
        )
    if dist.get_rank() == 0:
        logger.warning("%s: %s", report, fault.action)
    return fault.action


@torch.no_grad()
def validate(run: Run, batches: Iterator[Batch], *, num_microbatches: int) -> StepMetrics:
    """Compute the loss of `num_microbatches` held-out packs of every replica. Collective."""
    started = time.perf_counter()
    losses = LossSums(run.validation_sources)
    # A meter of its own: the loop's has names that validation never adds to.
    context = StepContext(run=run, meter=Meter(), losses=losses)
    for chunk in run.chunks:
        chunk.eval()
    _run_packs(context, batches, num_microbatches=num_microbatches, forward_only=True)
    for chunk in run.chunks:
        chunk.train()
    return collect(context.meter, losses, step=run.step, started=started, held_out=True)


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """A run, and the sums that measure the packs of one step or validation."""

    run: Run
    meter: Meter
    losses: LossSums
    hooks: Hooks | None = None  # called with the losses of each pack
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # of the packs
    pack_losses: list[PackLoss] = field(default_factory=list)  # of a training step
    # Log-probabilities [D, 2] of a pack's pairs by the reference, by the pack's number.
    references: dict[int, Tensor] = field(default_factory=dict)
    is_reference: bool = False  # the pass that finds them

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next pack, and measure the time waited for it."""
        number = next(self.numbers)
        self.run.enter("loading", micro_batch=number)
        with self.meter.timing(DATA_SECONDS) as wait:
            batch = next(batches)
        self.run.data_seconds += wait.seconds
        self.run.enter("forward", micro_batch=number, keys=batch.sample_keys)
        return batch


def _run_packs(
    context: StepContext, batches: Iterator[Batch], *, num_microbatches: int, forward_only: bool
) -> None:
    """Run the packs of a step or validation through the model; for pairs also through the
    reference, before."""
    if context.run.recipe.dpo.beta:
        taken = [context.next_batch(batches) for _ in range(num_microbatches)]
        _run_reference(context, taken)
        batches = iter(taken)
        context = replace(context, numbers=itertools.count(1))
    _run_schedule(context, batches, num_microbatches=num_microbatches, forward_only=forward_only)


@torch.no_grad()
def _run_reference(context: StepContext, taken: list[Batch]) -> None:
    """Find the reference's log-probabilities of all pairs of some packs.

    All packs at once, so that a pipeline is filled once; they wait on the host meanwhile.
    """
    run = context.run
    # Of its own: the packs are measured in the pass that trains.
    reference = replace(
        context, meter=Meter(), hooks=None, numbers=itertools.count(1), is_reference=True
    )
    was_training = [chunk.training for chunk in run.chunks]
    for chunk in run.chunks:
        chunk.eval()
    with adapters_off(run.unwrapped_models):
        _run_schedule(reference, iter(taken), num_microbatches=len(taken), forward_only=True)
    for chunk, training in zip(run.chunks, was_training, strict=True):
        chunk.train(training)


def _run_schedule(
    context: StepContext, batches: Iterator[Batch], *, num_microbatches: int, forward_only: bool
) -> None:
    run = context.run
    packs = cast(Any, batches)
    # Interleaved chunks ask for the same packs, each at its own time, through an iterator each.
    if len(run.chunks) > 1:
        taken = [context.next_batch(batches) for _ in range(num_microbatches)]
        packs = [iter(taken) for _ in run.chunks]
    get_forward_backward_func()(
        forward_step_func=partial(forward_step, context=context),
        data_iterator=packs,
        model=run.chunks,
        num_microbatches=num_microbatches,
        seq_length=run.recipe.data.seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_step(
    batches: Iterator[Batch], model: Any, *, context: StepContext
) -> tuple[Tensor, Any]:
    """Run one pack through this stage; return its output and the function that sums the losses."""
    batch = context.next_batch(batches)
    if model.module.post_process:
        count_batch(context.meter, batch, context.run.recipe)
    pack = slice_pack(
        batch.input_ids,
        labels=batch.labels,
        cu_seqlens=batch.cu_seqlens,
        placements=batch.placements,
        frames=batch.frames,
        rows_per_tile=context.run.rows_per_tile,
        layout=groups.rank_layout(),
    )
    objective = _objective_of(context, batch, pack)
    # Of interleaved chunks only the first encodes: the others need no copy of the tiles.
    tiles = batch.tiles
    if not model.module.encodes:
        tiles = tiles[:0]
    on_device = replace(pack, input_ids=to_device(pack.input_ids, platform.device()))
    output = model(prepare_tiles(tiles, context.run), on_device, row_scale=objective.row_scale)
    # Until the next pack is asked for; the schedule has no hook between the two.
    context.run.enter("backward")
    return output, objective.finish


def prepare_tiles(tiles: Tensor, run: Run) -> Tensor:
    """Normalize tiles [n, 3, S, S] uint8, in the model's precision on its device."""
    dtype = torch.bfloat16 if run.recipe.training.bf16 else torch.float32
    pixels = to_device(tiles, platform.device())
    return normalize(pixels, run.recipe.media.normalization, dtype=dtype)


def _objective_of(context: StepContext, batch: Batch, pack: PackSlice) -> Objective:
    """Return the loss of a pack.

    Raises:
        DataError: pairs are trained, and a document of the pack is none.
    """
    config = context.run.recipe.dpo
    if not config.beta:
        return TokenObjective(
            batch,
            pack,
            losses=context.losses,
            packs=context.pack_losses,
            hooks=context.hooks,
        )
    if context.is_reference:
        return ReferenceObjective(batch, pack, found=context.references)
    return PreferenceObjective(
        batch,
        pack,
        config=config,
        reference=context.references.get(batch.pack_id),
        meter=context.meter,
        losses=context.losses,
        packs=context.pack_losses,
        hooks=context.hooks,
    )
