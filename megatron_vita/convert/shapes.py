"""Shapes of a model's tensors in checkpoints, from the model itself, built on the meta device."""

import torch

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import ModelConfig, Recipe
from megatron_vita.model.build import build_on_meta
from megatron_vita.parallel import groups
from megatron_vita.parallel.sharded_state import sharded_tensors


def stored_shapes(model: ModelConfig, *, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes by key in a distributed checkpoint, with the decoder's layers stacked, of the given
    parts of a model."""
    # megatron-core's layers ask for process groups even on the meta device.
    platform.initialize_process()
    recipe = Recipe(model=model)
    groups.initialize_groups(recipe.parallel)
    state = store.model_state(build_on_meta(recipe))
    with torch.device("meta"):
        shapes = {tensor.key: tuple(tensor.global_shape) for tensor in sharded_tensors(state)}
    return {
        key: shape
        for key, shape in shapes.items()
        if key.startswith(tuple(f"{part}." for part in parts))
    }
