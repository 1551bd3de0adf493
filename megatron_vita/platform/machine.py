"""Properties of this process's machine: device, memory, and the current use of memory."""

from dataclasses import dataclass

import psutil
import torch

from megatron_vita.platform.pinned import pinned_bytes

# Products of this size reach a GPU's best rate; the first runs also initialize cuBLAS.
_SIZE = 8192
_WARM_UP = 3
_REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory in use, in bytes; the device's are 0 without CUDA."""

    peak: int  # most that torch has allocated since the start
    reserved: int  # most that torch has reserved since the start
    host: int  # resident memory of this process
    pinned: int  # of the host, that this process has pinned


def device_name() -> str:
    """Return the name of the GPU, or "CPU"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU"


def device_memory() -> int:
    """Return the memory of the GPU in bytes; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def memory_use() -> MemoryUse:
    """Measure the memory in use now; takes about 0.1 ms."""
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
    """Wait until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_matmul() -> float:
    """Measure the achieved FLOP/s of 8192^3 bf16 matrix products on this GPU; 0 without one.

    Takes about 50 ms and 0.4 GiB, and resets torch's peak memory statistics.
    """
    if not torch.cuda.is_available():
        return 0.0
    # Random values: products of zeros draw less power, so that a GPU runs them at higher clocks.
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
    # The measurement must not show in the peak that a run reports.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return 2 * _SIZE**3 * _REPEATS / seconds
