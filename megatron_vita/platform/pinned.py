"""Memory of the host that a GPU copies to and from at full speed, and how much there is."""

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vita.errors import PlatformError

_THREADS = 8  # that touch new memory for the first time
_UNLIMITED = 1 << 60
_pinned: dict[int, int] = {}  # sizes of buffers that are pinned here, by address


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for the work that the device still has, as
    copies of ordinary memory do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the host has, or its control group's limit
    allows. `root` is where /proc and /sys are."""
    fields = dict(
        line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if line
    )
    free = int(fields["MemAvailable"].split()[0]) << 10
    group = root / "sys/fs/cgroup"
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        most = _number(group / limit)
        if most < _UNLIMITED:
            cached = _inactive_files(group / stat)
            free = min(free, most - _number(group / used) + cached)
    return max(free, 0)


def _number(path: Path) -> int:
    text = path.read_text().strip() if path.is_file() else "max"
    if text == "max":
        return _UNLIMITED
    return int(text)


def _inactive_files(path: Path) -> int:
    """Bytes of cached files that count as used and are given up when memory is asked for."""
    lines = path.read_text().splitlines() if path.is_file() else []
    values = dict(line.split() for line in lines)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def host_buffers(sizes: Sequence[int]) -> list[Tensor]:
    """Buffers [size] of bytes, pinned where there is CUDA, to the byte: torch's own pinned memory
    is rounded up to powers of two.

    Raises:
        PlatformError: the memory cannot be had or pinned.
    """
    try:
        buffers = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
    except RuntimeError as error:
        raise _refusal(sum(sizes), str(error)) from error
    if torch.cuda.is_available():
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(Tensor.zero_, buffers))  # pages are there before they are pinned
        for buffer in buffers:
            _pin(buffer, total=sum(sizes))
    return buffers


def _pin(buffer: Tensor, *, total: int) -> None:
    runtime = torch.cuda.cudart()
    address = buffer.data_ptr()
    code = int(runtime.cudaHostRegister(address, len(buffer), 0))
    if code != 0:
        raise _refusal(total, f"cudaHostRegister gave error {code}")
    _pinned[address] = len(buffer)
    weakref.finalize(buffer, _unpin, runtime, address).atexit = False


def _unpin(runtime: Any, address: int) -> None:
    runtime.cudaHostUnregister(address)
    del _pinned[address]


def pinned_bytes() -> int:
    """Bytes that `host_buffers` has pinned, which torch does not count."""
    return sum(_pinned.values())


def _refusal(size: int, reason: str) -> PlatformError:
    return PlatformError(
        f"{size / 2**30:.1f} GiB of pinned host memory cannot be had ({reason}): lower "
        "training.activation_offload_fraction, or give the job more host memory"
    )
