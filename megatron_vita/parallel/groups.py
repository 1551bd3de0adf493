"""Process groups of megatron-core, created from a recipe."""

import copy
from typing import Literal, get_args

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _world

from megatron_vita.config import ParallelConfig
from megatron_vita.layout.slicing import RankLayout
from megatron_vita.supervise.hang import READING_AHEAD

_GROUP_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "hierarchical_context_parallel_sizes",
)
HostPurpose = Literal["main", "validation"]
_host_groups: dict[str, ProcessGroup] = {}  # of this rank's replica, by purpose
# The sizes for which the groups were created. megatron-core keeps the groups in global state too,
# but not whether the vision tower is split over TP.
_current = ParallelConfig()
_created: list[ProcessGroup] = []


def initialize_groups(parallel: ParallelConfig, *, with_gloo: bool = True) -> None:
    """Create the groups of `parallel`, replacing any created before. torch's process group must
    exist.

    Args:
        parallel: sizes of the parallel dimensions.
        with_gloo: also create the gloo groups between hosts, which saving checkpoints needs.
    """
    global _current
    previous = _current
    _current = copy.deepcopy(parallel)
    if parallel_state.is_initialized():
        if all(getattr(previous, name) == getattr(parallel, name) for name in _GROUP_FIELDS):
            return
        _destroy_groups()
    existing = set(_world.pg_map)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_size,
        context_parallel_size=parallel.context_parallel_size,
        hierarchical_context_parallel_sizes=parallel.hierarchical_context_parallel_sizes or None,
        create_gloo_process_groups=with_gloo,
    )
    _make_host_groups(parallel, with_gloo=with_gloo)
    _created[:] = [group for group in _world.pg_map if group not in existing]
    assert tile_group().rank() == rank_layout().tile_rank, "tile ranks count TP fastest, then CP"


def _destroy_groups() -> None:
    """Destroy the groups that were created last, after all ranks have stopped using them."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    _host_groups.clear()
    for group in _created:
        # megatron-core destroys some of its groups and forgets the others. A gloo group keeps
        # several threads until it is destroyed: after ten layouts a process would have hundreds.
        if group in _world.pg_map and dist.get_backend(group) == "gloo":
            dist.destroy_process_group(group)
    _created.clear()


def _make_host_groups(parallel: ParallelConfig, *, with_gloo: bool) -> None:
    _host_groups.clear()
    if not with_gloo or parallel.replica_size == 1:
        return
    ranks = parallel_state.RankGenerator(
        tp=parallel.tensor_model_parallel_size,
        ep=1,
        dp=dist.get_world_size() // parallel.replica_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        order="tp-cp-ep-dp-pp",  # megatron-core's own
    )
    # One group for each purpose: training and validation agree on batches in threads of their own,
    # whose messages must not mix.
    for purpose in get_args(HostPurpose):
        # `new_group` is collective: every rank creates the groups of all replicas, in one order.
        for replica in ranks.get_ranks("tp-cp-pp"):
            group = dist.new_group(replica, backend="gloo", group_desc=READING_AHEAD)
            if dist.get_rank() in replica:
                _host_groups[purpose] = group


def host_group(purpose: HostPurpose) -> ProcessGroup | None:
    """Return the gloo group of this replica's ranks; None if the replica is one rank."""
    return _host_groups.get(purpose)


def is_first_of_replica() -> bool:
    """Tell whether this rank is the first of its replica."""
    group = _host_groups.get("main")
    return group is None or group.rank() == 0


def rank_layout() -> RankLayout:
    """Return this rank's coordinates in its replica."""
    return RankLayout(
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        vision_tensor_parallel=_current.vision_tensor_parallel,
    )


def tile_group() -> ProcessGroup:
    """Return the ranks of a pipeline stage that share a pack's tiles.

    TP x CP, or CP alone where the TP ranks encode the same tiles together.
    """
    if _current.vision_tensor_parallel:
        return context_group()
    return parallel_state.get_tensor_and_context_parallel_group()


def tensor_group() -> ProcessGroup:
    """Return the TP ranks of this stage."""
    return parallel_state.get_tensor_model_parallel_group()


def context_group() -> ProcessGroup:
    """Return the CP ranks of this stage."""
    return parallel_state.get_context_parallel_group()


def data_parallel_group(*, with_context_parallel: bool = False) -> ProcessGroup:
    """Return the ranks that hold the same shard of the model."""
    return parallel_state.get_data_parallel_group(with_context_parallel=with_context_parallel)


def is_first_stage(chunk: int = 0) -> bool:
    """Tell whether `chunk` of this rank's layers is the pipeline's first, which encodes tiles."""
    return parallel_state.is_pipeline_first_stage() and chunk == 0


def is_last_stage() -> bool:
    """Tell whether this rank is on the last pipeline stage, which computes the losses."""
    return parallel_state.is_pipeline_last_stage()


def pipeline_rank() -> int:
    """Return this rank's pipeline stage, from 0."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_reporting_rank() -> bool:
    """Tell whether this rank reports metrics for its replica: TP rank 0, CP rank 0, last stage."""
    layout = rank_layout()
    return is_last_stage() and layout.tp_rank == 0 and layout.cp_rank == 0
