"""Run by torchrun: logits and gradients of converted checkpoints at several layouts.

Arguments: folder, JSON list of [case, layout] pairs, JSON of {layout: fields of `parallel`}.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import DataConfig, ParallelConfig, recipe_from_dict
from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.parallel import groups
from megatron_vita.training.run.run import Run, assemble_run
from tests.functional.layout_worker import release, save_tensors, small_buckets, whole_gradients

Outputs = list[Tensor]


def open_converted(checkpoint: Path, fields: dict, *, length: int) -> Run:
    """Open a run at a layout, with the weights of a converted checkpoint."""
    recipe = recipe_from_dict(store.read_manifest(checkpoint)["recipe"])
    parallel = ParallelConfig(**fields)
    data = DataConfig(seq_length=length)
    recipe = recipe.replaced({"parallel": parallel, "data": data, "training.bf16": False})
    groups.initialize_groups(recipe.parallel)
    with small_buckets():
        run = assemble_run(recipe)
    store.load_weights(run.unwrapped_models, checkpoint)
    return run


def weigh(logits: Tensor, *, target: Tensor, seen: Outputs) -> tuple[Tensor, Tensor, dict]:
    """Weighted sum of logits [T, V], whose gradient is compared."""
    seen.append(logits.detach())
    return (logits * target).sum(), torch.tensor(1, dtype=torch.int), {}


def forward_step(inputs: dict, model: Any, *, seen: Outputs) -> tuple[Tensor, partial]:
    """Run one document through this stage."""
    ids = inputs["ids"]
    frames = torch.zeros(len(inputs["placements"]), dtype=torch.bool)
    layout = groups.rank_layout()
    pack = slice_pack(
        ids,
        labels=ids.roll(-1),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        placements=inputs["placements"],
        frames=frames,
        rows_per_tile=model.module.shapes.vision.image_token_length,
        layout=layout,
    )
    tiles = inputs["tiles"][assign_tiles(frames, layout.tile_ranks)[layout.tile_rank]]
    return model(tiles, pack, wanted_rows=torch.arange(len(ids))), partial(
        weigh, target=inputs["target"], seen=seen
    )


def run_case(folder: Path, name: str, fields: dict) -> None:
    """Write gradients as a checkpoint, and the logits beside it."""
    inputs = torch.load(folder / "inputs.pt")
    run = open_converted(folder / "ours", fields, length=len(inputs["ids"]))
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    seen: Outputs = []
    get_forward_backward_func()(
        forward_step_func=partial(forward_step, seen=seen),
        data_iterator=inputs,
        model=run.chunks,
        num_microbatches=1,
        seq_length=len(inputs["ids"]),
        micro_batch_size=1,
        forward_only=False,
    )
    save_tensors(run, folder / name, whole_gradients(run))
    if groups.is_reporting_rank():
        torch.save(seen[0], folder / name / "logits.pt")
    dist.barrier()
    release(run)


def main() -> None:
    """Arguments: see above."""
    folder = Path(sys.argv[1])
    pairs = json.loads(sys.argv[2])
    layouts = json.loads(sys.argv[3])
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    # Those with the same groups together.
    for case, name in sorted(pairs, key=lambda pair: pair[1]):
        run_case(folder / case, name, layouts[name])
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
