"""Ranks of an engine: the layouts it runs in, steps sent to its workers, and reports of lost ranks."""

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_vita.config import ParallelConfig
from megatron_vita.errors import ConfigError, EngineError
from megatron_vita.inference.engine.channel import StepChannel
from megatron_vita.inference.engine.rank_monitor import RankMonitor, lost_rank_as_engine_error
from megatron_vita.inference.requests.scheduler_output import SchedulerOutput


def check_layout(parallel: ParallelConfig) -> None:
    """Check that the processes of this job are one replica that can serve.

    Raises:
        ConfigError: naming the field, its value and what would be right.
    """
    stages = parallel.pipeline_model_parallel_size
    if stages > 1:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size is {stages}: serving splits a model over "
            "tensor_model_parallel_size and context_parallel_size alone; checkpoints of any "
            "layout can be read"
        )
    if parallel.sequence_parallel:
        raise ConfigError("parallel.sequence_parallel is true: serving does without; leave it out")
    world = dist.get_world_size()
    if parallel.replica_size != world:
        raise ConfigError(
            f"there are {world} processes, and tensor_model_parallel_size "
            f"{parallel.tensor_model_parallel_size} x context_parallel_size "
            f"{parallel.context_parallel_size} is {parallel.replica_size}: they must be equal"
        )


class EngineRanks:
    """The ranks of an engine, which rank 0 sends its steps to. Collective.

    Args:
        group: gloo group of all ranks; None for an engine of one rank, which sends nothing.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        # The monitor's thread may report a loss before `on_loss` sets a callback.
        self._lost: list[EngineError] = []
        self._report: Callable[[EngineError], None] = self._lost.append
        self._channel: StepChannel | None = None
        self._monitor: RankMonitor | None = None
        if group is not None:
            self._channel = StepChannel(group)
            self._monitor = RankMonitor(group, on_loss=self._on_loss)

    def send(self, step: SchedulerOutput) -> None:
        """Send a step to the workers; called by rank 0."""
        if self._channel is not None:
            self._channel.send(step)

    def receive(self) -> SchedulerOutput:
        """Receive rank 0's next step; called by the workers.

        Raises:
            EngineError: rank 0 is gone.
        """
        assert self._channel is not None, "an engine of one rank has no workers"
        with lost_rank_as_engine_error():
            return self._channel.receive()

    def on_loss(self, callback: Callable[[EngineError], None]) -> None:
        """Have `callback` called when another rank is gone, by the monitor's thread."""
        self._report = callback
        for error in self._lost:  # lost before there was a callback
            callback(error)

    def close(self) -> None:
        """Leave in order: no rank reports this one as lost."""
        if self._monitor is not None:
            self._monitor.close()

    def _on_loss(self, rank: int) -> None:
        self._report(EngineError(f"the engine cannot go on: a rank is gone: rank {rank}"))
