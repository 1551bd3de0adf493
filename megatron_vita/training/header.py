"""First log lines of a run: versions, devices, layout, parameters, memory, levers."""

import importlib.metadata
from collections.abc import Iterator

import torch
import torch.distributed as dist

import megatron_vita
from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.costs.host_memory import host_memory
from megatron_vita.costs.memory import GIB, full_pack, rank_memory
from megatron_vita.costs.parameters import model_parameters, stage_parameters, trained_parameters
from megatron_vita.training.run import Run
from megatron_vita.training.wording import count, describe_layout, describe_levers


def describe_run(run: Run) -> Iterator[str]:
    """Yield the lines, the same on every rank."""
    recipe = run.recipe
    world_size = dist.get_world_size()
    yield _versions()
    yield _devices(world_size, run.matmul_rate)
    yield describe_layout(recipe, world_size=world_size)
    yield _parameters(recipe)
    yield _memory(recipe, world_size=world_size)
    yield f"levers: {describe_levers(recipe)}"


def _versions() -> str:
    found = [f"megatron_vita {megatron_vita.__version__}", f"torch {torch.__version__}"]
    for package in ("megatron-core", "transformer-engine", "flash-attn-4"):
        # Optional packages are left out where they are not installed.
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
        f"{matmul_rate / 1e12:.0f} TFLOP/s on the slowest; {platform.available_host_memory() / GIB:.0f} GiB "
        "of the host are free"
    )


def _parameters(recipe: Recipe) -> str:
    whole = model_parameters(recipe.model)
    trained = trained_parameters(recipe)
    stages = range(recipe.parallel.pipeline_model_parallel_size)
    most = max(stage_parameters(recipe, stage).total for stage in stages)
    return (
        f"parameters: {count(whole)}, trained {count(trained)}, frozen {count(whole - trained)}; "
        f"at most {count(most)} on a rank"
    )


def _memory(recipe: Recipe, *, world_size: int) -> str:
    """Format estimates for packs full of tiles."""
    data_parallel = world_size // recipe.parallel.replica_size
    load = full_pack(recipe)
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
