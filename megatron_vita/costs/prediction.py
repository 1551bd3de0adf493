"""Predicted costs of a run: device and host memory, step time."""

from dataclasses import dataclass

from megatron_vita.config import Recipe
from megatron_vita.costs.devices import find_device
from megatron_vita.costs.flops import training_flops
from megatron_vita.costs.memory.host_memory import host_memory
from megatron_vita.costs.memory.memory import GIB, PackLoad, rank_memory
from megatron_vita.costs.step_time import RANKS_PER_NODE, StepTime, step_time


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Costs of the fullest rank and the slowest stage, for packs that are all alike."""

    peak_gib: float  # torch's `max_memory_allocated` from the second step on
    device_gib: float  # including allocator overhead and libraries
    host_gib: float  # of one rank, while it writes a checkpoint if the recipe saves any
    flops: float  # model FLOPs of a step, over all ranks
    tokens: int  # positions of a step, over all ranks
    ranks: int
    time: StepTime | None  # None for a device whose rates are not known

    @property
    def seconds(self) -> float | None:
        """Step time in seconds; None if unknown."""
        if self.time is None:
            return None
        return self.time.total

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput; 0 where the time is unknown."""
        if self.seconds:
            return self.tokens / self.seconds / self.ranks
        return 0.0

    @property
    def tflops_per_gpu(self) -> float:
        """Model TFLOP/s; 0 where the time is unknown."""
        if self.seconds:
            return self.flops / self.seconds / self.ranks / 1e12
        return 0.0


def predict(
    recipe: Recipe,
    load: PackLoad,
    *,
    world_size: int,
    device: str,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Prediction:
    """Predict the costs for `world_size` ranks on a device, named as by CUDA.

    Raises:
        ConfigError: the world size or the global batch does not divide.
    """
    data_parallel = recipe.data_parallel_size(world_size)
    stages = range(recipe.parallel.pipeline_model_parallel_size)
    devices = [rank_memory(recipe, s, data_parallel=data_parallel, load=load) for s in stages]
    hosts = [host_memory(recipe, s, data_parallel=data_parallel, load=load) for s in stages]
    known = find_device(device)
    packs = recipe.training.global_batch_size
    time = None
    if known is not None:
        time = step_time(
            recipe, known, data_parallel=data_parallel, load=load, ranks_per_node=ranks_per_node
        )
    lengths = load.lengths or (recipe.data.seq_length,)
    flops = training_flops(recipe, lengths, tiles=load.tiles, loss_tokens=load.loss_tokens)
    return Prediction(
        peak_gib=max(memory.peak for memory in devices) / GIB,
        device_gib=max(memory.device for memory in devices) / GIB,
        host_gib=max(host.total for host in hosts) / GIB,
        flops=packs * flops.total,
        tokens=packs * recipe.data.seq_length,
        ranks=world_size,
        time=time,
    )
