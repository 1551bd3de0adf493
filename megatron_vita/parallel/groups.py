"""megatron-core's process groups, made from a recipe."""

from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_vita.config import ParallelConfig
from megatron_vita.layout.slicing import RankLayout


def initialize_groups(parallel: ParallelConfig) -> None:
    """Makes the groups of `parallel`, replacing others made before. The process group must exist."""
    if parallel_state.is_initialized():
        if _are_current(parallel):
            return  # each group costs threads that outlive it
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    layout = rank_layout()
    assert exchange_group().rank() == layout.exchange_rank, "exchange ranks count TP fastest, then CP"


def _are_current(parallel: ParallelConfig) -> bool:
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )
    return found == (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.virtual_size,
    )


def rank_layout() -> RankLayout:
    """Where this rank stands in its replica."""
    return RankLayout(
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
    )


def exchange_group() -> ProcessGroup:
    """The TP x CP ranks of a pipeline stage, which share its tiles."""
    return parallel_state.get_tensor_and_context_parallel_group()


def tensor_group() -> ProcessGroup:
    """The TP ranks of this stage."""
    return parallel_state.get_tensor_model_parallel_group()


def context_group() -> ProcessGroup:
    """The CP ranks of this stage."""
    return parallel_state.get_context_parallel_group()


def data_parallel_group(*, with_context_parallel: bool = False) -> ProcessGroup:
    """The ranks with the same share of the model."""
    return parallel_state.get_data_parallel_group(with_context_parallel=with_context_parallel)


def is_first_stage(chunk: int = 0) -> bool:
    """Whether `chunk` of this rank's layers is the first of the pipeline, which encodes tiles."""
    return parallel_state.is_pipeline_first_stage() and chunk == 0


def is_last_stage() -> bool:
    """Whether this rank is on the last pipeline stage, whose last chunk of layers computes losses."""
    return parallel_state.is_pipeline_last_stage()


def pipeline_rank() -> int:
    """This rank's pipeline stage, from 0."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_reporting_rank() -> bool:
    """Whether this rank speaks for its replica: the first of TP and CP on the last stage."""
    layout = rank_layout()
    return is_last_stage() and layout.tp_rank == 0 and layout.cp_rank == 0
