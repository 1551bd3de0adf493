"""Run on several ranks: writes the initial weights of each layout as a checkpoint.

Arguments: folder, JSON of {name: fields of the recipe}.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.model import initial_weights
from megatron_vita.model.build import build_chunks
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from tests.functional.synthetic import tiny_recipe

BLOCK = 300
"""Numbers drawn together: matrices of the tiny model are of several blocks, whose bounds are not those of shards."""


def build(fields: dict) -> list[VitaModel]:
    """Build this rank's chunks of the tiny model at a layout."""
    initial_weights.BLOCK = BLOCK
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    return build_chunks(recipe)


def main() -> None:
    """Arguments: see above."""
    folder = Path(sys.argv[1])
    layouts = json.loads(sys.argv[2])
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    for name, fields in layouts.items():
        state = {"model": store.model_state(build(fields))}
        store.save_checkpoint(folder / name, step=0, state=state, manifest={}, keep=1)


if __name__ == "__main__":
    main()
