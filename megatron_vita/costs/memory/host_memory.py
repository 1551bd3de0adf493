"""Host memory of one rank, in bytes, from a recipe."""

from dataclasses import dataclass, fields

from megatron_vita.config import Recipe
from megatron_vita.costs.memory.checkpoint_size import written_state_bytes
from megatron_vita.costs.memory.layer_memory import value_bytes
from megatron_vita.costs.memory.memory import GIB, PackLoad
from megatron_vita.costs.memory.offload import offload_buffers
from megatron_vita.costs.memory.optimizer_memory import optimizer_bytes, optimizer_shards
from megatron_vita.costs.memory.parameters import stage_parameters
from megatron_vita.costs.memory.vision_memory import tiles_of_rank

TRAINER = int(3.5 * GIB)
"""Python, torch, and what CUDA and NCCL hold on the host: 2.8 to 3.9 GiB a rank in the steps of
benchmarks/results/2026-11-28-training.md."""
LOADER_PROCESS = 300 << 20
"""163 MB before it reads, and 94 to 112 beside the tiles of a pack: the table of a million tokens
in benchmarks/results/2026-11-25-loader.md."""
PACKS_FINISHED = 2
"""The pack in use, and the one that `FinalBatches` holds ready."""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Host memory in bytes, by part."""

    process: int
    loader: int  # loader processes, and packs read ahead
    activations: int  # that wait for their backward
    optimizer: int  # of optimizer_cpu_offload
    saving: int  # while a checkpoint is written

    @property
    def training(self) -> int:
        """Bytes while no checkpoint is being written."""
        return self.process + self.loader + self.activations + self.optimizer

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))


def host_memory(recipe: Recipe, stage: int, *, data_parallel: int, load: PackLoad) -> HostMemory:
    """Estimate host memory for a rank of pipeline stage `stage`, for packs like `load`."""
    saving = 0
    if recipe.checkpoint.save:
        saving = saving_memory(recipe, stage, data_parallel=data_parallel)
    trained = stage_parameters(recipe, stage).trainable(recipe)
    buffers = offload_buffers(recipe, stage, data_parallel=data_parallel)
    shards = optimizer_shards(recipe, data_parallel)
    return HostMemory(
        process=TRAINER,
        loader=_loader(recipe, stage, load.tiles, data_parallel=data_parallel),
        activations=sum(size * count for size, count in buffers.items()),
        optimizer=int(trained * optimizer_bytes(recipe).host) // shards,
        saving=saving,
    )


def saving_memory(recipe: Recipe, stage: int, *, data_parallel: int) -> int:
    """Estimate the bytes that a rank of pipeline stage `stage` needs to write a checkpoint.

    A rank copies what it writes: its ranges of the optimizer's state, fp32 weights and two moments,
    and its part of the weights, or with adapters of what is trained. Blocks that torch pins and
    rounds up on GPUs are not counted; with `checkpoint.async_save: false`, GPUs copy one tensor at
    a time, which is less.
    """
    parameters = stage_parameters(recipe, stage)
    trained = parameters.trainable(recipe)
    written = trained if recipe.lora.rank else parameters.total
    size = trained * written_state_bytes(recipe) + written * value_bytes(recipe)
    return size // (data_parallel * recipe.parallel.context_parallel_size)


def _loader(recipe: Recipe, stage: int, tiles: int, *, data_parallel: int) -> int:
    """Estimate loader processes and the uint8 tiles that they read ahead.

    The first stage's ranks decode tiles: (prefetch + 2) x tiles of the rank x 3 S^2. Packs of pairs
    (`dpo.beta`) all wait for the reference.
    """
    data = recipe.data
    vision = recipe.model.vision
    processes = data.num_workers * LOADER_PROCESS
    if stage > 0 or recipe.model.text_only:
        return processes
    packs = PACKS_FINISHED
    if data.num_workers:
        packs += data.prefetch
    if recipe.dpo.beta:
        packs += max(recipe.training.global_batch_size // data_parallel, 1) - 1
    return processes + packs * tiles_of_rank(recipe, tiles) * 3 * vision.image_size**2
