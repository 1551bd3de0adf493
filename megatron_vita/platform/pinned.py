"""Pinned host memory, asynchronous copies to the device, and the free memory of the host."""

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vita.errors import PlatformError

_THREADS = 8  # to touch new pages: one thread clears only a few GiB/s
# Version 1 of control groups writes "no limit" as a number close to 2^63.
_UNLIMITED = 1 << 60
_PAGE = mmap.PAGESIZE
_HUGE_PAGE = 2 << 20
# Advice of Linux.
_DONTFORK = 10
_DOFORK = 11
_HUGEPAGE = 14
_pinned: dict[int, int] = {}  # sizes of the buffers pinned here, by address


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device` without waiting for work queued there.

    A copy from pageable memory would wait, so the tensor is pinned first.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def available_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes this process may still allocate, by the host and its control group's limit.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    fields = dict(
        line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if line
    )
    free = int(fields["MemAvailable"].split()[0]) << 10
    group = root / "sys/fs/cgroup"
    # Versions 2 and 1 of control groups. Page cache counts as used there, but is reclaimed before
    # the limit kills anything.
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
    if not path.is_file():
        return _UNLIMITED
    text = path.read_text().strip()
    if text == "max":
        return _UNLIMITED
    return int(text)


def _inactive_files(path: Path) -> int:
    """Return the bytes of page cache that count as used but are reclaimed on demand."""
    lines = path.read_text().splitlines() if path.is_file() else []
    values = dict(line.split() for line in lines)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def host_buffers(sizes: Sequence[int]) -> list[Tensor]:
    """Allocate byte buffers [size], pinned where there is CUDA, of exactly these sizes.

    torch's own pinned allocator rounds sizes up to powers of two.

    Raises:
        PlatformError: the memory cannot be allocated or pinned.
    """
    try:
        buffers = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
    except RuntimeError as error:
        raise _refusal(sum(sizes), str(error)) from error
    # CUDA registers memory page by page, so that few large pages take less time.
    for buffer in buffers:
        _advise(buffer.data_ptr(), len(buffer), _HUGEPAGE, page=_HUGE_PAGE)
    if torch.cuda.is_available():
        # Registration would touch all pages from one thread: let several do it before.
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(Tensor.zero_, buffers))
        for buffer in buffers:
            _pin(buffer, total=sum(sizes))
    return buffers


def _advise(address: int, size: int, advice: int, *, page: int) -> None:
    """Advise the kernel about the whole pages of a buffer; it may decline."""
    start = -(-address // page) * page
    end = (address + size) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _pin(buffer: Tensor, *, total: int) -> None:
    runtime = torch.cuda.cudart()
    address = buffer.data_ptr()
    code = int(runtime.cudaHostRegister(address, len(buffer), 0))
    if code != 0:
        raise _refusal(total, f"cudaHostRegister gave error {code}")
    _pinned[address] = len(buffer)
    # A fork, such as the writer of a checkpoint, would get a copy at once: pinned pages are not
    # shared.
    _advise(address, len(buffer), _DONTFORK, page=_PAGE)
    # Not at exit: CUDA may be shut down by then, and the end of the process unpins anyway.
    weakref.finalize(buffer, _unpin, runtime, address).atexit = False


def _unpin(runtime: Any, address: int) -> None:
    runtime.cudaHostUnregister(address)
    # The memory goes back to the process's heap, which forks need.
    _advise(address, _pinned.pop(address), _DOFORK, page=_PAGE)


def pinned_bytes() -> int:
    """Return the bytes pinned by `host_buffers`, which torch's statistics do not include."""
    return sum(_pinned.values())


def _refusal(size: int, reason: str) -> PlatformError:
    return PlatformError(
        f"{size / 2**30:.1f} GiB of pinned host memory cannot be had ({reason}): lower "
        "training.activation_offload_fraction, or give the job more host memory"
    )
