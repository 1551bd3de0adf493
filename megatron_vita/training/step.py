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
from megatron_vita.parallel import groups
from megatron_vita.platform.pinned import to_device
from megatron_vita.training.callbacks.hooks import Hooks
from megatron_vita.training.faults import PackLoss, report_fault
from megatron_vita.training.guard import Action, Fault
from megatron_vita.training.meter import Meter
from megatron_vita.training.metrics import (
    DATA_SECONDS,
    LossSums,
    StepMetrics,
    collect,
    count_batch,
    measure_memory,
    reduce_numbers,
)
from megatron_vita.training.run import Run

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
    _run_schedule(context, batches, num_microbatches=run.microbatches, forward_only=False)
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
        action = _react(context, fault)
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


def _react(context: "StepContext", fault: Fault) -> Action:
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
    report = report_fault(context.run, fault, context.pack_losses)
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
    _run_schedule(context, batches, num_microbatches=num_microbatches, forward_only=True)
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

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next pack, and measure the time waited for it."""
        number = next(self.numbers)
        self.run.enter("loading", micro_batch=number)
        with self.meter.timing(DATA_SECONDS) as wait:
            batch = next(batches)
        self.run.data_seconds += wait.seconds
        self.run.enter("forward", micro_batch=number, keys=batch.sample_keys)
        return batch


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
    scale: float | Tensor = 1.0
    if batch.loss_weights is not None:
        scale = batch.loss_weights[pack.positions[pack.loss_rows]]
    # Of interleaved chunks only the first encodes: the others need no copy of the tiles.
    tiles = batch.tiles
    if not model.module.encodes:
        tiles = tiles[:0]
    on_device = replace(pack, input_ids=to_device(pack.input_ids, platform.device()))
    output = model(prepare_tiles(tiles, context.run), on_device, row_scale=scale)
    # Until the next pack is asked for; the schedule has no hook between the two.
    context.run.enter("backward")
    return output, partial(sum_losses, scale=scale, batch=batch, pack=pack, context=context)


def prepare_tiles(tiles: Tensor, run: Run) -> Tensor:
    """Normalize tiles [n, 3, S, S] uint8, in the model's precision on its device."""
    dtype = torch.bfloat16 if run.recipe.training.bf16 else torch.float32
    pixels = to_device(tiles, platform.device())
    return normalize(pixels, run.recipe.media.normalization, dtype=dtype)


def sum_losses(
    losses: Tensor, *, scale: float | Tensor, batch: Batch, pack: PackSlice, context: StepContext
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the weighted sum of the losses [L], and their number.

    megatron-core divides the sum over the global batch by the number over it.
    """
    if isinstance(scale, Tensor):
        scale = to_device(scale, losses.device)
    losses = losses * scale
    context.losses.add(losses, batch=batch, pack=pack)
    total = losses.sum()
    if groups.tensor_group().rank() == 0:
        context.pack_losses.append(PackLoss(batch.pack_id, total.detach(), len(losses)))
        if context.hooks is not None:
            context.hooks.call("on_losses", losses.detach(), batch=batch, pack=pack)
    rows = torch.full((), len(losses), dtype=torch.int, device=losses.device)
    return total, rows, {}
