"""Host memory for offloaded activations: checked and allocated before the first step."""

import logging
import socket

import torch.distributed as dist

from megatron_vita.config import Recipe
from megatron_vita.costs.memory.offload import offload_buffers
from megatron_vita.errors import ConfigError
from megatron_vita.model.offload import ActivationStore
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.platform.pinned import available_host_memory

logger = logging.getLogger(__name__)
GIB = 1 << 30


def open_activation_store(models: list[VitaModel], recipe: Recipe) -> ActivationStore | None:
    """Give this rank's layers a store on the host, with all buffers of a step. Collective.

    Returns:
        The store; None if nothing is offloaded.

    Raises:
        ConfigError: the recipe's limit, or the host's memory, is too small.
        PlatformError: the memory cannot be pinned.
    """
    if recipe.training.activation_offload_fraction == 0:
        return None
    buffers = offload_buffers(
        recipe, groups.pipeline_rank(), data_parallel=groups.data_parallel_group().size()
    )
    _check_room(sum(size * count for size, count in buffers.items()), recipe)
    store = ActivationStore()
    store.buffers.reserve(buffers)
    for model in models:
        for layer in model.language_model.decoder.layers:
            layer.store = store
    return store


def _check_room(needed: int, recipe: Recipe) -> None:
    """Check the memory needed by all ranks of this host before any of them allocates.
    Collective."""
    # By host name and not by LOCAL_WORLD_SIZE: launchers other than torchrun do not set it.
    host = socket.gethostname()
    free = available_host_memory()
    # The gather is also a barrier: no rank has allocated yet when any measures what is free.
    ranks: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(ranks, (host, needed))
    most = int(recipe.training.activation_offload_gib * GIB)
    advice = "lower training.activation_offload_fraction"
    if most and needed > most:
        raise ConfigError(
            f"training.activation_offload_gib is {most / GIB:g}, but this rank's activations need "
            f"{needed / GIB:.2f} GiB of host memory: raise it, or {advice}"
        )
    of_host = sum(size for name, size in ranks if name == host)
    if of_host > free:
        raise ConfigError(
            f"activations of the ranks of {host} need {of_host / GIB:.2f} GiB of host memory "
            f"(training.activation_offload_fraction {recipe.training.activation_offload_fraction:g}), and "
            f"{free / GIB:.2f} GiB are available: {advice}"
        )
    logger.info("activations wait in %.2f GiB of host memory a rank", needed / GIB)
