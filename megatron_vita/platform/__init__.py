"""The door to the machine: device, backend, logging.

Importing it on a machine without CUDA makes megatron-core run there. Every room that imports
megatron-core imports this one first, in its `__init__`.
"""

import datetime
import logging
import os
import warnings

import torch

from megatron_vita.errors import PlatformError
from megatron_vita.platform.machine import (
    MemoryUse,
    device_memory,
    device_name,
    measure_matmul,
    memory_use,
    synchronize,
)
from megatron_vita.platform.packages import (
    has_flash_attention_4,
    has_transformer_engine,
    refuse_unrelated_apex,
)
from megatron_vita.platform.pinned import available_host_memory

refuse_unrelated_apex()
# Its warnings speak of its own deprecations and of packages that are optional here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
# of CUDA, where there is none
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
if not torch.cuda.is_available():
    from megatron_vita.platform.cpu import adapt_to_cpu

    undo_adaptation = adapt_to_cpu()

__all__ = [
    "MemoryUse",
    "available_host_memory",
    "device",
    "device_memory",
    "device_name",
    "has_flash_attention_4",
    "has_transformer_engine",
    "initialize_process",
    "leave_process",
    "measure_matmul",
    "memory_use",
    "on_cuda",
    "set_up_logging",
    "synchronize",
]


def on_cuda() -> bool:
    """Whether this machine computes on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: one GPU of the machine, or the CPU."""
    if on_cuda():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def initialize_process(timeout_minutes: float = 30) -> None:
    """Joins the process group that torchrun describes (NCCL on CUDA, gloo on CPU), or a world of
    one.

    PlatformError for one of several processes that no launcher has told its rank: each would be a
    world of one.
    """
    if torch.distributed.is_initialized():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_cuda():
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        )
    store = None
    if "RANK" not in os.environ:
        _refuse_many()
        store = torch.distributed.HashStore()
    torch.distributed.init_process_group(
        "nccl" if on_cuda() else "gloo",
        store=store,
        rank=0 if store else -1,
        world_size=1 if store else -1,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        device_id=torch.device("cuda", local_rank) if on_cuda() else None,
    )


def _refuse_many() -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(os.environ.get(name) or "1") > 1:
            raise PlatformError(
                f"this is one of {os.environ[name]} processes ({name}), but RANK is not set, so that each would train "
                "by itself: start them with torchrun (examples/launch)"
            )


def leave_process() -> None:
    """Leaves the process group, if it was joined: a process does so before it ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_up_logging(rank: int) -> None:
    """Rank 0 logs everything from INFO up; other ranks only warnings and errors, prefixed with
    their rank."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("megatron.core", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
