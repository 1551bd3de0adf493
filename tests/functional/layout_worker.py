"""Run by torchrun: three steps at each layout; gradients and weights go to checkpoints that any
layout reads.

Arguments: folder, JSON list of layouts' values, JSON of fields that layouts have beside their own,
by layout's name.
"""

import gc
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import load_weights
from megatron_vita.parallel import groups
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.optimizer import optimizer
from megatron_vita.training.run.run import Run, assemble_run
from megatron_vita.training.run.run_state import finish_param_gather
from megatron_vita.training.step.step import train_step
from tests.functional.layouts import Layout
from tests.functional.synthetic import make_step, share_of, tiny_recipe

STEPS = 3
BUCKET = 5000
"""Gradients that are reduced, and gathered for a checkpoint, together: as many buckets as a real model has."""


def my_batches(run: Run, step: int) -> list:
    """This rank's packs of a step."""
    first = groups.data_parallel_group().rank() * run.microbatches
    packs = make_step(step, run.recipe)[first : first + run.microbatches]
    return [
        share_of(pack, groups.rank_layout(), first_stage=groups.is_first_stage()) for pack in packs
    ]


def whole_gradients(run: Run) -> dict[str, torch.Tensor]:
    """Reduced gradients of this rank's parameters, zeros for frozen ones; optimizer shards are
    gathered."""
    group = groups.data_parallel_group(with_context_parallel=True)
    if run.recipe.parallel.use_distributed_optimizer and group.size() > 1:
        for buffer in (buffer for chunk in run.chunks for buffer in chunk.buffers):
            for bucket in buffer.buckets:
                mine = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    return {
        name: p.main_grad.clone() if p.requires_grad else torch.zeros_like(p)
        for name, p in named_parameters(run)
    }


def named_parameters(run: Run) -> list[tuple[str, Any]]:
    """Parameters of all model chunks, with the chunk in their names; they have gradients of Megatron's."""
    return [
        (f"{i}.{name}", p)
        for i, core in enumerate(run.unwrapped_models)
        for name, p in core.named_parameters()
    ]


def save_tensors(run: Run, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write the model's weights, or `tensors` in their place."""
    finish_param_gather(run)
    with torch.no_grad():
        weights = {name: p.clone() for name, p in named_parameters(run)}
        for name, p in named_parameters(run):
            p.copy_((tensors or weights)[name])
        state = {"model": store.model_state(run.unwrapped_models)}
        store.save_checkpoint(folder, step=0, state=state, manifest={}, keep=1)
        for name, p in named_parameters(run):
            p.copy_(weights[name])


def open_layout(fields: dict, start: Path | None) -> Run:
    """A run at a layout, with the weights at `start` or with initial weights."""
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    with small_buckets():
        run = assemble_run(recipe)
    if recipe.parallel.use_distributed_optimizer:
        check_buckets(run)
    if start is not None:
        load_weights(run.unwrapped_models, store.find_checkpoint(start))
        run.optimizer.reload_model_params()
    return run


def small_buckets() -> AbstractContextManager[object]:
    """Have runs that are assembled meanwhile reduce gradients in buckets of `BUCKET`."""
    return mock.patch.multiple(optimizer, BUCKET_SIZE=BUCKET, BUCKET_SIZE_PER_RANK=0)


def check_buckets(run: Run) -> None:
    """Check on every stage that gradients are reduced early, or not."""
    for buffer in (buffer for chunk in run.chunks for buffer in chunk.buffers):
        for bucket in buffer.buckets:
            assert len(bucket.params) == 1 or bucket.numel_unpadded < BUCKET + max(
                p.numel() for p in bucket.params
            )


def run_steps(layout: Layout, folder: Path, *, fields: dict | None = None) -> list[StepMetrics]:
    """Run optimizer steps at a layout; write gradients of the first and weights after the last.

    `fields` are added to the layout's.
    """
    run = open_layout(layout.fields | (fields or {}), folder / f"start_{layout.start}")
    metrics = [train_step(run, iter(my_batches(run, 0)))]
    save_tensors(run, folder / layout.name / "gradients", whole_gradients(run))
    metrics += [train_step(run, iter(my_batches(run, step))) for step in range(1, STEPS)]
    save_tensors(run, folder / layout.name / "weights")
    release(run)
    return metrics


def release(run: Run) -> None:
    """Let go of a run's models, so that the groups of its layout can end with them.

    megatron-core's hooks of gradients keep their models for ever, and each gloo group wakes a thread
    a hundred times a second.
    """
    for chunk in run.chunks:
        vars(chunk).clear()
    gc.collect()


def write_metrics(metrics: list[StepMetrics], path: Path) -> None:
    """Write the values of each step that are compared."""
    rows = [
        {
            "loss": m.loss,
            "grad_norm": m.grad_norm,
            "rows": m.loss_tokens,
            "tiles": m.tiles,
            "flops": m.flops,
            "preferences": m.preferences,
        }
        for m in metrics
    ]
    path.write_text(json.dumps(rows))


def check_agreement(metrics: list[StepMetrics]) -> None:
    """Check that every rank of every stage reports the same numbers, including times and memory."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [m.scalars() for m in metrics])
    assert all(scalars == gathered[0] for scalars in gathered), gathered


def main() -> None:
    """Arguments: see above."""
    folder = Path(sys.argv[1])
    layouts = [Layout(tuple(values)) for values in json.loads(sys.argv[2])]
    fields = json.loads(sys.argv[3])
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    # those with the same groups together
    for layout in sorted(layouts, key=lambda layout: layout.values[:4]):
        try:
            metrics = run_steps(layout, folder, fields=fields.get(layout.name))
            check_agreement(metrics)
        except Exception as error:
            raise RuntimeError(f"layout {layout.name}") from error
        if dist.get_rank() == 0:
            write_metrics(metrics, folder / f"{layout.name}.json")
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
