"""The lines that a run begins with: versions, devices, layout, parameters, memory, levers."""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import fields

import torch
import torch.distributed as dist

import megatron_vita
from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.costs.host_memory import host_memory
from megatron_vita.costs.memory import GIB, full_pack, rank_memory
from megatron_vita.costs.parameters import model_parameters, stage_parameters, trained_parameters
from megatron_vita.training.run import Run

NOT_LEVERS = {
    "training": {
        "train_iters", "global_batch_size", "seed", "eval_interval", "eval_iters", "log_interval",
        "tensorboard_dir", "profile_step_start", "profile_step_end", "profile_ranks", "profile_dir",
        "freeze_vision_model", "freeze_projector", "freeze_language_model",
    },
    "optimizer": {
        "lr", "min_lr", "lr_warmup_fraction", "vision_lr_mult", "vision_lr_decay", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_eps", "clip_grad",
    },
}  # fmt: skip
"""Fields of these groups that do not trade time or precision for memory; all others do."""


def describe_run(run: Run) -> Iterator[str]:
    """The lines, the same on every rank."""
    recipe, world_size = run.recipe, dist.get_world_size()
    yield _versions()
    yield _devices(world_size, run.matmul_rate)
    yield describe_layout(recipe, world_size=world_size)
    yield _parameters(recipe)
    yield _memory(recipe, world_size=world_size)
    yield f"levers: {describe_levers(recipe)}"


def describe_layout(recipe: Recipe, *, world_size: int) -> str:
    """Sizes and kinds of parallelism in one line."""
    parallel = recipe.parallel
    data_parallel = world_size // parallel.replica_size
    parts = [
        f"TP {parallel.tensor_model_parallel_size} x CP {parallel.context_parallel_size} x "
        f"DP {data_parallel} x PP {parallel.pipeline_model_parallel_size}"
    ]
    if parallel.virtual_size is not None:
        parts.append(f"{parallel.virtual_size} chunks a stage")
    if parallel.sequence_parallel:
        parts.append("sequence parallel")
    if parallel.context_parallel_size > 1:
        parts.append(f"CP by {parallel.cp_comm_type}")
    if parallel.use_distributed_optimizer:
        parts.append("distributed optimizer")
    return f"layout of {world_size} ranks: {', '.join(parts)}"


def describe_levers(recipe: Recipe) -> str:
    """The fields that trade time or precision for memory where they differ from their defaults."""
    default = Recipe()
    changed = []
    for group, others in NOT_LEVERS.items():
        ours, theirs = getattr(recipe, group), getattr(default, group)
        names = [field.name for field in fields(ours) if field.name not in others]
        changed += [
            f"{name} {getattr(ours, name)}"
            for name in names
            if getattr(ours, name) != getattr(theirs, name)
        ]
    return ", ".join(changed) or "none"


def count(number: int) -> str:
    """A number of parameters for reading: 1.54 B, 304.01 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _versions() -> str:
    found = [f"megatron_vita {megatron_vita.__version__}", f"torch {torch.__version__}"]
    for package in ("megatron-core", "transformer-engine", "flash-attn-4"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _devices(world_size: int, matmul_rate: float) -> str:
    devices = f"{world_size} x {platform.device_name()}"
    if not platform.on_cuda():
        return devices
    return (
        f"{devices} ({platform.device_memory() / GIB:.1f} GiB), matrix products at "
        f"{matmul_rate / 1e12:.0f} TFLOP/s on the slowest; host {platform.host_memory() / GIB:.0f} GiB"
    )


def _parameters(recipe: Recipe) -> str:
    whole, trained = model_parameters(recipe.model), trained_parameters(recipe)
    stages = range(recipe.parallel.pipeline_model_parallel_size)
    most = max(stage_parameters(recipe, stage).total for stage in stages)
    return (
        f"parameters: {count(whole)}, trained {count(trained)}, frozen {count(whole - trained)}; "
        f"at most {count(most)} on a rank"
    )


def _memory(recipe: Recipe, *, world_size: int) -> str:
    """Estimates for packs full of tiles."""
    data_parallel, load = world_size // recipe.parallel.replica_size, full_pack(recipe)
    stages = range(recipe.parallel.pipeline_model_parallel_size)
    devices = [
        rank_memory(recipe, stage, data_parallel=data_parallel, load=load) for stage in stages
    ]
    hosts = [host_memory(recipe, stage, data_parallel=data_parallel, load=load) for stage in stages]
    memory = max(devices, key=lambda memory: memory.device)
    return (
        f"estimated memory of a rank: peak {memory.peak / GIB:.1f} GiB (with libraries "
        f"{memory.device / GIB:.1f}), host {max(host.total for host in hosts) / GIB:.1f} GiB"
    )
