"""The tensors that a model has in checkpoints, from the model itself, built without memory for
weights."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import ModelConfig, Recipe
from megatron_vita.model.build import build_on_meta
from megatron_vita.parallel import groups


def stored_shapes(model: ModelConfig, *, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes by key in a distributed checkpoint, the decoder's layers stacked, of the given parts
    of a model."""
    platform.initialize_process()
    recipe = Recipe(model=model)
    groups.initialize_groups(recipe.parallel)
    state = store.model_state(build_on_meta(recipe))
    shapes = {tensor.key: tuple(tensor.global_shape) for tensor in _tensors(state)}
    return {
        key: shape
        for key, shape in shapes.items()
        if key.startswith(tuple(f"{part}." for part in parts))
    }


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, ShardedTensorFactory):
        with torch.device("meta"):
            yield from _tensors(state.build())
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
