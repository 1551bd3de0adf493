"""State of a distributed optimizer in checkpoints, written and read by the rank that owns it.

megatron-core gathers all of it on every rank, twelve bytes a parameter in host memory. Here each
rank writes its own range of each parameter, as rectangles of the parameter's tensor, under the same
keys, so that either can load what the other has written.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_vita.checkpoint.rectangles import cover
from megatron_vita.parallel.sharded_state import sharded_tensors

MOST = 1 << 24
"""Elements of a rectangle, 64 MiB in fp32: what a writer holds on the host at a time, and what
a rank of another layout reads beyond its own range."""
WEIGHTS = "param"


@contextmanager
def owned_shards(optimizer: DistributedOptimizer) -> Iterator[None]:
    """Let an optimizer's state be written and loaded by ranges, instead of gathered.

    megatron-core has no setting for it; its methods for the format are replaced meanwhile.
    """
    own: Any = optimizer
    own.sharded_param_state_fully_reshardable = lambda model, is_loading=False, metadata=None: (
        _sharded_state(optimizer, model, is_loading=is_loading)
    )
    own.load_parameter_state_from_fully_reshardable = lambda state: _fill(optimizer, state)
    try:
        yield
    finally:
        del own.sharded_param_state_fully_reshardable
        del own.load_parameter_state_from_fully_reshardable


def own_states(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter
) -> dict[str, torch.Tensor]:
    """Return weights and moments of this rank's range of a parameter, each flat, in fp32."""
    states = optimizer._get_main_param_and_optimizer_states(parameter)
    # Computed from other types, all of them at once would take as much memory of the device again.
    computed = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    return {
        key: (states[key].detach().cpu() if computed else states[key].detach()).float().view(-1)
        for key in (WEIGHTS, *optimizer.optimizer_state_keys)
    }


def _sharded_state(
    optimizer: DistributedOptimizer, model: dict[str, Any], *, is_loading: bool
) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """Return the rectangles of this rank, by number of the parameter, state and place.

    model: the model's sharded state, which has the place of each parameter in its tensor.
    """
    of_model, _ = extract_sharded_tensors_and_factories(model)
    in_model = {id(entry.data): entry for entry in nested_values(of_model)}
    state = {}
    for number, parameter, owned in _owned(optimizer):
        if is_loading:
            keys = (WEIGHTS, *optimizer.optimizer_state_keys)
            values = {key: torch.empty(owned.stop - owned.start) for key in keys}
        else:
            values = own_states(optimizer, parameter)
        entry = in_model[id(parameter)]
        state[number] = {
            key: dict(enumerate(_rectangles(entry, value, key=key, owned=owned)))
            for key, value in values.items()
        }
    return state


def _owned(
    optimizer: DistributedOptimizer,
) -> Iterator[tuple[int, torch.nn.Parameter, slice]]:
    """Yield the parameters of which this rank owns a range: number among all, and the range."""
    numbered = enumerate(p for buffer in optimizer.buffers for p in buffer.param_index_map)
    ours = {
        parameter
        for of_buffer in optimizer.gbuf_ranges
        for of_buckets in of_buffer.values()
        for of_bucket in of_buckets
        for parameter in of_bucket["param_map"]
    }
    for number, parameter in numbered:
        if parameter in ours:
            found = optimizer._get_model_param_range_map(parameter)["param"]
            yield number, parameter, slice(found.start, found.end)


def _rectangles(
    entry: ShardedTensor | ShardedTensorFactory, values: torch.Tensor, *, key: str, owned: slice
) -> Iterator[ShardedTensor]:
    """Yield the rectangles of an owned range, whose elements are `values`, in order."""
    # Gate and up of a fused matrix are two parts; their places show in tensors without data.
    shape = torch.empty_like(entry.data, device="meta", dtype=values.dtype)
    described = replace(entry, data=shape, **_type_of(entry, values.dtype))
    for part in sharded_tensors(described):
        assert part.data is not None
        assert part.data.is_contiguous(), f"{part.key} is not consecutive in its parameter"
        first = part.data.storage_offset()
        start = max(owned.start - first, 0)
        stop = min(owned.stop - first, part.data.numel())
        for rectangle in cover(tuple(part.local_shape), start, stop, most=MOST):
            place = first + rectangle.start - owned.start
            data = values[place : place + math.prod(rectangle.sizes)]
            yield _shard(part, data, key=key, offsets=rectangle.offsets, sizes=rectangle.sizes)


def _type_of(entry: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Field for the type, which a factory does not have."""
    if isinstance(entry, ShardedTensor):
        return {"dtype": dtype}
    return {}


def _shard(
    part: ShardedTensor,
    data: torch.Tensor,
    *,
    key: str,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> ShardedTensor:
    # Layers that are stacked in checkpoints have an axis more there.
    stacked = part.prepend_axis_num
    sizes = (*(1,) * stacked, *sizes)
    offsets = (*(0,) * stacked, *offsets)
    return ShardedTensor(
        key=f"optimizer.state.{key}.{part.key}",
        data=data.view(sizes),
        dtype=data.dtype,
        local_shape=sizes,
        global_shape=part.global_shape,
        global_offset=tuple(a + b for a, b in zip(part.global_offset, offsets, strict=True)),
        axis_fragmentations=None,  # no regular grid
        replica_id=_without_data_parallel(part.replica_id),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )


def _without_data_parallel(replica: ReplicaId) -> ReplicaId:
    """Return which copy a shard is, of those in other than data-parallel ranks.

    megatron-core counts data-parallel copies last; of a range there is one.
    """
    if isinstance(replica, int):
        return 0
    return (*replica[:-1], 0)


def _fill(
    optimizer: DistributedOptimizer, state: dict[int, dict[str, dict[int, torch.Tensor]]]
) -> None:
    """Set this rank's ranges from loaded rectangles."""
    for number, parameter, owned in _owned(optimizer):
        values = {}
        for key, rectangles in state[number].items():
            ordered = [rectangles[place].reshape(-1) for place in sorted(rectangles)]
            values[key] = torch.cat(ordered)
            assert len(values[key]) == owned.stop - owned.start, (number, key)
        optimizer._set_main_param_and_optimizer_states(parameter, values)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()
