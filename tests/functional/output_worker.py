"""Run by torchrun on two ranks: the output layer over vocabulary shards, in every layout, and under
overlapped DDP.

Writes {check: {case: error}}, and reduced gradients as checkpoints.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import load_weights
from megatron_vita.config import Recipe
from megatron_vita.model.build import build_model
from megatron_vita.model.output import output
from megatron_vita.model.output.row_losses import LossInputs, compute_losses
from megatron_vita.parallel import groups
from megatron_vita.training.optimizer.optimizer import build_optimizer
from megatron_vita.training.run.run import Run, assemble_run
from megatron_vita.training.step.step import train_step
from tests.functional.layout_worker import (
    my_batches,
    release,
    save_tensors,
    small_buckets,
    whole_gradients,
)
from tests.functional.shard_checks import vocabulary_shards
from tests.functional.synthetic import tiny_recipe

TIED = {"language": {"untie_embeddings_and_output_weights": False}}


def tiny_recipe_of(case: dict) -> Recipe:
    """`case` has fields of `parallel`, `model.language`, `model.output` and `training`."""
    recipe = tiny_recipe(**case.get("parallel", {}))
    parts = {"language": "model.language", "output": "model.output", "training": "training"}
    return recipe.replaced(
        {
            f"{group}.{name}": value
            for part, group in parts.items()
            for name, value in case.get(part, {}).items()
        }
    )


def open_case(case: dict, start: Path | None) -> Run:
    """A run with the weights at `start`, or with initial weights."""
    recipe = tiny_recipe_of(case)
    groups.initialize_groups(recipe.parallel)
    with small_buckets():
        run = assemble_run(recipe)
    if start is not None:
        load_weights(run.unwrapped_models, store.find_checkpoint(start))
        run.optimizer.reload_model_params()
    return run


def step_of_case(case: dict, folder: Path, *, start: Path) -> float:
    """Run one step and write its reduced gradients to `folder`; returns the loss."""
    run = open_case(case, start)
    head = getattr(run.unwrapped_model.language_model, "output_layer", None)
    if head is not None:
        head.chunk_bytes = 5 * 4 * head.output_size_per_partition
    metrics = train_step(run, iter(my_batches(run, 0)))
    save_tensors(run, folder, whole_gradients(run))
    release(run)
    return metrics.loss


def overlapped_run(recipe: Recipe, start: Path) -> Run:
    """Gradients are reduced while backward runs; weights are gathered while the next forward
    runs."""
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    load_weights([model], store.find_checkpoint(start))
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True,
        bucket_size=3000,
    )  # fmt: skip
    wrapped = DistributedDataParallel(model.config, config, model)
    optimizer, schedule = build_optimizer([wrapped], recipe)
    model.config.no_sync_func = wrapped.no_sync
    optimizer.config.overlap_param_gather = True
    return Run(
        recipe=recipe, chunks=[wrapped], optimizer=optimizer, schedule=schedule, microbatches=2
    )


def overlap(start: Path, case: dict) -> dict[str, float]:
    """Difference of losses and weights over 3 steps between overlapped and plain communication, on
    DP2."""
    found = {"weights that were used while on their way": 0.0}
    plain = open_case(case, start)
    overlapped = overlapped_run(tiny_recipe_of(case), start)

    def watched(hidden: Tensor, weight: Tensor, inputs: LossInputs) -> Tensor:
        group = overlapped.chunks[0].param_to_bucket_group.get(weight)
        if group is not None and (
            group.param_gather_handle is not None or not group.param_gather_dispatched
        ):
            found["weights that were used while on their way"] += 1
        return compute_losses(hidden, weight, inputs)

    output.compute_losses = watched
    for step in range(3):
        losses = [train_step(run, iter(my_batches(run, step))).loss for run in (plain, overlapped)]
        found[f"loss of step {step}"] = abs(losses[1] - losses[0]) / losses[0]
    output.compute_losses = compute_losses
    overlapped.chunks[0].start_param_sync(force_sync=True)
    for (name, expected), actual in zip(
        plain.unwrapped_model.named_parameters(),
        overlapped.unwrapped_model.parameters(),
        strict=True,
    ):
        found[name] = (actual - expected).abs().max().item()
    return found


def main() -> None:
    """Arguments: folder, JSON of {name: (shape, case)}; weights to start from are in the folder, by
    shape."""
    folder = Path(sys.argv[1])
    cases = json.loads(sys.argv[2])
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    found = {"shards": vocabulary_shards(), "losses": {}}
    for name, (shape, case) in cases.items():
        found["losses"][name] = step_of_case(case, folder / name, start=folder / shape / "start")
    found["overlap"] = overlap(folder / "untied" / "start", {})
    found["overlap, tied"] = overlap(folder / "tied" / "start", TIED)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
