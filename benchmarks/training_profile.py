"""A step's kernels by kind, and how often it waits for the device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_vita import platform

KINDS: dict[str, tuple[str, ...]] = {
    # the first kind of which a word is in a kernel's name
    "communication": ("nccl", "gloo", "c10d"),
    "attention": ("flash", "fmha", "attn", "attention", "sdpa", "cudnn_generated"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "wgrad", "cublas", "::mm", "addmm", "bmm"),
    "memcpy": ("memcpy", "memset"),
    "adam": ("adam",),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
LARGEST = 15


def kind_of(kernel: str) -> str:
    """The kind of a kernel (or, on the CPU, of an operator) by its name."""
    name = kernel.lower()
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "elementwise"


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    """Run `step` once under torch's profiler; returns this rank's milliseconds by kind and of the
    largest kernels, and counts of launches and waits."""
    activities = [ProfilerActivity.CPU]
    if platform.on_cuda():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    return summarise(profiler.key_averages(), on_device=platform.on_cuda())


def summarise(averages: Any, *, on_device: bool) -> dict[str, Any]:
    """Sums over the profiler's entries, each of all calls of one kernel or operator."""
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for entry in averages:
        is_kernel = (entry.device_type == DeviceType.CUDA) == on_device
        if is_kernel:
            spent = entry.self_device_time_total if on_device else entry.self_cpu_time_total
            kinds[kind_of(entry.key)] += spent
            kernels[entry.key[:120]] += spent
            counts["launches"] += entry.count
        if entry.key in WAITS:
            counts[entry.key] += entry.count
    return {
        "milliseconds": {kind: round(us / 1000, 1) for kind, us in kinds.most_common()},
        "largest": {name: round(us / 1000, 1) for name, us in kernels.most_common(LARGEST)},
        "counts": dict(counts),
    }
