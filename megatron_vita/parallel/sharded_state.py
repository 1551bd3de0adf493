"""Traversal of megatron-core's sharded state dictionaries."""

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """Yield every ShardedTensor of a rank's state; gate and up of a fused matrix are two.

    The data of each is a view of the model's parameter, so writing to it sets the weights.
    """
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, ShardedTensorFactory):
        # megatron-core's form for a parameter that checkpoints hold as several tensors
        yield from sharded_tensors(state.build())
    elif isinstance(state, dict):
        for value in state.values():
            yield from sharded_tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from sharded_tensors(value)
