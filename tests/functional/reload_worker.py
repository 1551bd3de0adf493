"""Run by torchrun: a step at each layout, saved; then the next step at each layout from what others
saved.

Arguments: folder, JSON of {name: fields of the recipe}, JSON of [saved by, taken up by] pairs.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint.store import find_checkpoint, load_weights
from megatron_vita.parallel import groups
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import Run, assemble_run
from megatron_vita.training.run.run_state import restore, save_run
from megatron_vita.training.step.step import train_step
from tests.functional.layout_worker import my_batches, release, save_tensors, small_buckets
from tests.functional.synthetic import tiny_recipe


def open_run_at(fields: dict, folder: Path, *, start: Path) -> Run:
    """Open a run at a layout that resumes from `folder`, or else starts from the weights at
    `start`."""
    recipe = tiny_recipe(**fields).replaced({"checkpoint.save": str(folder)})
    groups.initialize_groups(recipe.parallel)
    with small_buckets():
        run = assemble_run(recipe)
    if folder.exists():
        restore(run, ResumePoint.find(run.recipe))
    else:
        load_weights(run.unwrapped_models, find_checkpoint(start))
        run.optimizer.reload_model_params()
    return run


def first_step(fields: dict, folder: Path, *, start: Path) -> None:
    """Run a step from the start, and save it with the optimizer's state."""
    run = open_run_at(fields, folder, start=start)
    train_step(run, iter(my_batches(run, 0)))
    save_run(run)
    release(run)


def second_step(fields: dict, folder: Path, *, weights: Path) -> tuple[float, float]:
    """Run the step after the one in `folder`; return loss and gradient norm, and write the weights."""
    run = open_run_at(fields, folder, start=folder)
    assert run.step == 1
    metrics = train_step(run, iter(my_batches(run, 1)))
    save_tensors(run, weights)
    release(run)
    return metrics.loss, metrics.grad_norm


def main() -> None:
    """Save at each layout, then resume each pair."""
    folder = Path(sys.argv[1])
    layouts = json.loads(sys.argv[2])
    pairs = json.loads(sys.argv[3])
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    for name, fields in layouts.items():
        first_step(fields, folder / name, start=folder / "start")
    found = {}
    for saved_by, taken_up_by in pairs:
        key = f"{saved_by} to {taken_up_by}"
        found[key] = second_step(
            layouts[taken_up_by], folder / saved_by, weights=folder / "weights" / key
        )
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
