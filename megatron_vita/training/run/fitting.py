"""`training.fit_memory`: choice of levers for the memory of this run's devices and hosts."""

import logging
import os

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.costs.devices import DEVICES, Device, find_device
from megatron_vita.costs.fitting import (
    NO_LEVERS,
    Room,
    fit_memory,
    memory_need,
    smallest,
)
from megatron_vita.costs.memory.memory import GIB
from megatron_vita.costs.remedies import find_remedies, name_remedies
from megatron_vita.errors import ConfigError
from megatron_vita.training.metrics.wording import describe_levers

logger = logging.getLogger(__name__)


def choose_levers(recipe: Recipe) -> Recipe:
    """Return the recipe with levers that fit, if `training.fit_memory` asks for it. Collective.

    The choice is the same on every rank, for the rank that has least memory.

    Raises:
        ConfigError: no levers fit; names changes that would.
    """
    if not recipe.training.fit_memory:
        return recipe
    room = _least_room(recipe)
    device = _common_device()
    plain = recipe.replaced(NO_LEVERS)
    replicas = recipe.data_parallel_size(dist.get_world_size())
    # A pure function of values that all ranks share: each computes the same choice for itself.
    fitted = fit_memory(plain, room, data_parallel=replicas, device=device)
    has = f"{room.device / GIB:.1f} GiB of its device and {room.host / GIB:.1f} of its host"
    if fitted is None:
        least = memory_need(smallest(plain), data_parallel=replicas)
        remedies = find_remedies(plain, room, world_size=dist.get_world_size(), device=device)
        raise ConfigError(
            f"training.fit_memory: at the least a rank needs {least.describe()}, and has {has}: try "
            f"{name_remedies(remedies, timed=device is not None)}"
        )
    need = memory_need(fitted, data_parallel=replicas)
    logger.info(
        "training.fit_memory chose: %s; a rank needs about %s, and has %s",
        describe_levers(fitted),
        need.describe(),
        has,
    )
    return fitted


def _common_device() -> Device | None:
    """Return the device of all ranks; None if they differ or its rates are unknown. Collective."""
    device = find_device(platform.device_name())
    index = -1
    if device is not None:
        index = DEVICES.index(device)
    # Least and, by the negated index, largest in one collective: equal if all ranks have the same.
    both = torch.tensor([index, -index], device=platform.device())
    dist.all_reduce(both, op=dist.ReduceOp.MIN)
    if both[0] == -both[1]:
        return device
    return None


def _least_room(recipe: Recipe) -> Room:
    """Return the memory of the rank that has least. Collective.

    The ranks of a host share its memory evenly.
    """
    ranks_of_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = platform.available_host_memory() // ranks_of_host
    # On a CPU, device and host memory are the same.
    sizes = torch.tensor([platform.device_memory() or host, host], dtype=torch.int64)
    sizes = sizes.to(platform.device())
    dist.all_reduce(sizes, op=dist.ReduceOp.MIN)
    device, host = sizes.tolist()
    return Room(device=device, host=host, pinned=int(recipe.training.activation_offload_gib * GIB))
