"""Entry point to the machine: device, communication backend, logging.

Importing it on a machine without CUDA adapts megatron-core to the CPU. Every package that imports
megatron-core imports this one first, in its `__init__`.
"""

import datetime
import logging
import os
import warnings
from typing import Any

import torch

from megatron_vita.errors import PlatformError
from megatron_vita.platform.flight_recorder import pending_collectives
from megatron_vita.platform.machine import (
    MemoryUse,
    device_memory,
    device_name,
    measure_matmul,
    memory_use,
    synchronize,
)
from megatron_vita.platform.packages import (
    has_bitsandbytes,
    has_flash_attention_4,
    has_transformer_engine,
    refuse_unrelated_apex,
)
from megatron_vita.platform.pinned import available_host_memory
from megatron_vita.platform.store_sync import (
    agree_on_keys,
    broadcast_from_first,
    set_key,
    store_barrier,
    wait_for_key,
)

refuse_unrelated_apex()
# They announce megatron-core's own deprecations and packages that are optional here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
# It warns of a missing CUDA toolkit on machines without CUDA.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
if not torch.cuda.is_available():
    from megatron_vita.platform.cpu import adapt_to_cpu

    adapt_to_cpu()

__all__ = [
    "MemoryUse",
    "available_host_memory",
    "broadcast_from_first",
    "destroy_process_group",
    "device",
    "device_memory",
    "device_name",
    "has_bitsandbytes",
    "has_flash_attention_4",
    "has_transformer_engine",
    "initialize_process",
    "measure_matmul",
    "memory_use",
    "on_cuda",
    "pending_collectives",
    "set_key",
    "set_up_logging",
    "store_barrier",
    "synchronize",
    "wait_for_key",
]


def on_cuda() -> bool:
    """Tell whether this machine computes on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this process: its GPU, or the CPU."""
    if on_cuda():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def initialize_process(timeout_minutes: float = 30) -> None:
    """Join the process group described by torchrun's variables (NCCL on CUDA, gloo on CPU), or a
    world of one.

    Raises:
        PlatformError: the launcher started several processes but set no RANK, so that each would be
            a world of one.
    """
    if torch.distributed.is_initialized():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_cuda():
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each rank of a host would start as many threads as the host has cores.
        ranks_of_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_of_host))
    world: dict[str, Any] = {}
    if "RANK" not in os.environ:
        _refuse_unlaunched_ranks()
        # A store in this process: a world of one rank needs no rendezvous.
        store = torch.distributed.HashStore()
        world = {"store": store, "rank": 0, "world_size": 1}
    if on_cuda():
        # Named, so that barriers need not guess this rank's device.
        world["device_id"] = torch.device("cuda", local_rank)
    torch.distributed.init_process_group(
        "nccl" if on_cuda() else "gloo",
        timeout=datetime.timedelta(minutes=timeout_minutes),
        **world,
    )
    agree_on_keys()


def _refuse_unlaunched_ranks() -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(os.environ.get(name) or "1") > 1:
            raise PlatformError(
                f"this is one of {os.environ[name]} processes ({name}), but RANK is not set, so that each would train "
                "by itself: start them with torchrun (examples/launch)"
            )


def destroy_process_group() -> None:
    """Destroy the process group if there is one; to be called before the process exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_up_logging(rank: int) -> None:
    """Log from INFO on rank 0; warnings and errors on the others, prefixed with the rank."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    # `force`: imported libraries may have set up the root logger before.
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("megatron.core", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
