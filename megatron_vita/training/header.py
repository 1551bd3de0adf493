"""The lines that a run begins with, from versions to where it logs."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.config.run_files import run_folder
from megatron_vita.costs.memory.adapters import whole_adapters
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.costs.memory.host_memory import host_memory
from megatron_vita.costs.memory.memory import GIB, full_pack, rank_memory
from megatron_vita.costs.memory.parameters import (
    model_parameters,
    stage_parameters,
    trained_parameters,
)
from megatron_vita.data.planning.plan import PackPlan
from megatron_vita.sizes import readable_bytes
from megatron_vita.training.metrics.environment import describe_environment
from megatron_vita.training.metrics.wording import (
    count,
    describe_layout,
    describe_levers,
    describe_quantization,
)
from megatron_vita.training.run.run import Run


def describe_run(run: Run) -> Iterator[str]:
    """Yield the lines that a run logs at its start; called on one rank."""
    recipe = run.recipe
    world_size = dist.get_world_size()
    yield _versions(describe_environment())
    yield _devices(world_size, run.matmul_rate)
    yield describe_layout(recipe, world_size=world_size)
    yield _parameters(recipe)
    yield _memory(recipe, world_size=world_size)
    yield f"levers: {describe_levers(recipe)}"
    if run.train_stream is not None:
        yield _plan(run, run.train_stream.plan)
    if recipe.checkpoint.save:
        yield _checkpoints(recipe)
    yield _places(recipe)


def _versions(environment: dict[str, Any]) -> str:
    found = [f"megatron_vita {environment['version']}"]
    found += [f"{package} {version}" for package, version in environment["packages"].items()]
    if environment["commit"]:
        found.append(f"commit {environment['commit']}")
    return ", ".join(found)


def _plan(run: Run, plan: PackPlan) -> str:
    """Packs of the plan, and those that the steps ahead take."""
    data = run.recipe.data
    training = run.recipe.training
    steps = training.train_iters - run.step
    size = training.global_batch_size
    last = run.skipped.consumed_after(run.consumed_packs, steps=steps, size=size)
    return (
        f"plan: {plan.num_packs:,} packs of {data.seq_length:,} tokens in {data.epochs} epochs; steps {run.step + 1} "
        f"to {training.train_iters} take packs {run.next_pack + 1:,} to {last:,}, up to epoch "
        f"{data.epochs * last / plan.num_packs:.2f}"
    )


def _checkpoints(recipe: Recipe) -> str:
    """Bytes on disk, and how often."""
    settings = recipe.checkpoint
    return (
        f"checkpoints: about {readable_bytes(checkpoint_bytes(recipe))} each, every {settings.save_interval} steps; "
        f"{settings.keep} are kept"
    )


def _places(recipe: Recipe) -> str:
    """Everything that logs."""
    training = recipe.training
    places = {
        "folder": str(run_folder(recipe) or ""),
        "TensorBoard": training.tensorboard_dir,
        "W&B": training.wandb_project,
        "MLflow": training.mlflow_experiment,
        "profile": training.profile_dir,
    }
    named = [f"{name} {place}" for name, place in places.items() if place]
    return f"logs: {', '.join(named) or 'here alone: set checkpoint.save or training.run_dir'}"


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
    whole = model_parameters(recipe.model) + whole_adapters(recipe)
    trained = trained_parameters(recipe)
    stages = range(recipe.parallel.pipeline_model_parallel_size)
    most = max(stage_parameters(recipe, stage).total for stage in stages)
    frozen = count(whole - trained)
    if quantized := describe_quantization(recipe):
        frozen += f" with {quantized}"
    return (
        f"parameters: {count(whole)}, trained {count(trained)}, frozen {frozen}; at most "
        f"{count(most)} on a rank"
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
