"""The tensors of megatron-core's sharded states."""

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """Each tensor of a rank's state with its place in the whole one; gate and up of a fused matrix
    are two.

    What a tensor holds is a view of the model's parameter.
    """
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, ShardedTensorFactory):
        yield from sharded_tensors(state.build())
    elif isinstance(state, dict):
        for value in state.values():
            yield from sharded_tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from sharded_tensors(value)
