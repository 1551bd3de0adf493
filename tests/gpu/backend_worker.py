"""Run by torchrun on GPUs: Transformer Engine's backend against the torch backend, with the same
weights in bf16.

Arguments: folder, JSON of {name: fields of the recipe}. Writes found-WORLD.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.model.build import build_model
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from tests.functional.document_checks import LENGTHS, Outcome, run_pack
from tests.functional.synthetic import make_pack, tiny_recipe
from tests.gpu.fields import canonical


def run_backend(fields: dict, *, weights: Path | None) -> tuple[VitaModel, Outcome, torch.Tensor]:
    """A model with initial weights or those at `weights`: losses, and all gradients of a pack,
    flat."""
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    if weights is not None:
        store.load_weights([model], store.find_checkpoint(weights))
    length = recipe.data.seq_length
    outcome = run_pack(model, make_pack(LENGTHS[length], seed=5, length=length))
    by_name = {canonical(name): p.grad.float().flatten() for name, p in model.named_parameters()}
    return model, outcome, torch.cat([by_name[name] for name in sorted(by_name)])


def compare(name: str, fields: dict, folder: Path) -> dict[str, float]:
    """Differences between Transformer Engine at a layout and the torch backend at the same."""
    plain = fields | {
        "attention_backend": "torch",
        "cp_comm_type": "p2p",
        "hierarchical_context_parallel_sizes": [],
    }
    reference, expected, gradients = run_backend(plain, weights=None)
    state = {"model": store.model_state([reference])}
    place = store.save_checkpoint(
        folder / name.replace(" ", "_"), step=0, state=state, manifest={}, keep=1
    )
    _, actual, other = run_backend(fields, weights=place)
    rows = max(int((expected.losses != 0).sum()), 1)
    cosine = torch.nn.functional.cosine_similarity(gradients.double(), other.double(), dim=0)
    return {
        "mean loss": expected.losses.sum().item() / rows,
        "mean loss difference": abs(expected.losses.sum() - actual.losses.sum()).item() / rows,
        "largest loss difference": (expected.losses - actual.losses).abs().max().item(),
        "gradient cosine": cosine.item(),
    }


def main() -> None:
    """Compares every layout."""
    folder = Path(sys.argv[1])
    cases = json.loads(sys.argv[2])
    platform.initialize_process()
    found = {name: compare(name, fields, folder) for name, fields in cases.items()}
    if dist.get_rank() == 0:
        (folder / f"found-{dist.get_world_size()}.json").write_text(json.dumps(found))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
