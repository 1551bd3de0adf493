"""Run by torchrun: the `fa4` backend around a plain kernel, at layouts that fill the world, beside the
torch backend.

Arguments: a file for what was found, JSON of {name: fields of the recipe}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.data.batch import Batch
from megatron_vita.model.backends.backends import AttentionBackend, TorchBackend
from megatron_vita.model.build import build_model
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from tests.functional.document_checks import LENGTHS, exact_rows, poison, run_pack
from tests.functional.stand_in import StandIn
from tests.functional.synthetic import make_pack, tiny_recipe


def losses_and_gradients(model: VitaModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses of the whole pack, and gradients of this rank's parameters before any reduction."""
    outcome = run_pack(model, batch)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": outcome.losses, "inputs": outcome.input_gradients, **gradients}


def largest_differences(recipe: Recipe, batch: Batch) -> dict[str, float]:
    """Largest differences between the backends on any rank, for losses, input gradients and
    parameter gradients, relative to each tensor's largest value."""
    backends: list[AttentionBackend] = [TorchBackend(), StandIn()]
    plain, flash = (
        losses_and_gradients(build_model(recipe, backend=backend), batch) for backend in backends
    )
    assert plain.keys() == flash.keys()
    found = {"losses": 0.0, "inputs": 0.0, "parameters": 0.0}
    for name, value in plain.items():
        kind = name if name in found else "parameters"
        difference = (value - flash[name]).abs().max() / value.abs().max().clamp(min=1e-6)
        found[kind] = max(found[kind], difference.item())
    everywhere = torch.tensor(list(found.values()))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return dict(zip(found, everywhere.tolist(), strict=True))


def kept_by_autograd(batch: Batch) -> list[int]:
    """Elements of the tensors that one attention keeps for backward: ours with this rank's rows, 4 query
    heads and 2 of key and value, slices of a joint projection."""
    sequences, _ = StandIn().attention_metadata(batch.cu_seqlens, inverse_frequencies=torch.ones(4))
    rows = len(batch.input_ids) // groups.rank_layout().cp_size
    joint = torch.randn(rows, 8, 8, requires_grad=True)
    query, key, value = joint.split([4, 2, 2], dim=1)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sequences.attend(query.contiguous(), key, value)
    return sorted(size // rows for size in kept.values())


def check(fields: dict) -> dict[str, Any]:
    """Compare everything at one layout."""
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    length = recipe.data.seq_length
    joined = not recipe.data.isolate_documents
    batch = make_pack(LENGTHS[length], seed=3, length=length, joined=joined)
    model = build_model(recipe, backend=StandIn())
    found: dict[str, Any] = {"differences": largest_differences(recipe, batch)}
    found["kept"] = kept_by_autograd(batch)
    if recipe.training.recompute_granularity == "selective":
        found["poison"] = poison(model, batch)
    if recipe.parallel.tensor_model_parallel_size == 1:  # plain PyTorch, whole weights
        found["exact_rows"] = exact_rows(model, joined=joined)
    return found


def main() -> None:
    """Checks every layout."""
    platform.initialize_process()
    found = {name: check(fields) for name, fields in json.loads(sys.argv[2]).items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
