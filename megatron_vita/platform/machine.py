"""Facts about this process's machine: its device, its memory, what is in use of both."""

from dataclasses import dataclass

import psutil
import torch

from megatron_vita.platform.pinned import pinned_bytes

_SIZE = 8192
_WARM_UP = 3
_REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes; those of the device are 0 without CUDA."""

    peak: int  # most that torch has allocated since the start
    reserved: int  # most that torch has reserved since the start
    host: int  # resident memory of this process
    pinned: int  # of the host, that this process has pinned


def device_name() -> str:
    """Name of the GPU, or CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU"


def device_memory() -> int:
    """Bytes of the GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def memory_use() -> MemoryUse:
    """What is in use now; takes a tenth of a millisecond."""
    host = psutil.Process().memory_info().rss
    if not torch.cuda.is_available():
        return MemoryUse(peak=0, reserved=0, host=host, pinned=0)
    return MemoryUse(
        peak=torch.cuda.max_memory_allocated(),
        reserved=torch.cuda.max_memory_reserved(),
        host=host,
        pinned=torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) + pinned_bytes(),
    )


def synchronize() -> None:
    """Wait for all work of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_matmul() -> float:
    """FLOP/s of bf16 matrix products of 8192 x 8192 x 8192 on this GPU, its peak in practice; 0
    without one. Takes about 50 ms and 0.4 GiB."""
    if not torch.cuda.is_available():
        return 0.0
    left, right = torch.randn(2, _SIZE, _SIZE, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(left)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(_WARM_UP + _REPEATS):
        if i == _WARM_UP:
            first.record()
        torch.mm(left, right, out=product)
    last.record()
    last.synchronize()
    seconds = first.elapsed_time(last) / 1000
    del left, right, product
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return 2 * _SIZE**3 * _REPEATS / seconds
