"""Rates of devices as reached in training steps; the only table of them.

H200: from steps of a 7B model on 2 x H200 (torch 2.11.0+cu130, Transformer Engine 2.20.2,
megatron-core 0.19.2, 2026-11-28). At TP2 (commit 040bccf) kernels were summed by kind: 1,339 ms of
matrix products (711 TFLOP/s of the 790 of a product of 8192 x 8192 x 8192), 334 ms of attention,
253 ms of NCCL, 285 ms of elementwise kernels and copies of 2,208. Without the pauses of tensor
parallelism, matrix products are slower: 655 TFLOP/s fit the steps at CP2 (commits 040bccf and
0889605).

H100: the same chip (778 to 798 TFLOP/s for that product) with 3.0 in place of 4.3 TB/s of copy
bandwidth; no steps were measured yet.

Attention in documents, forward and backward, in executed TFLOP/s (5 products backward): cuDNN in
THD layout, FlashAttention-4's kernels in one call for a pack
(benchmarks/results/2026-11-28-training.md), whose split between both passes is that on an H100.

Rates between nodes are nominal: no run over several nodes was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[int, float, float]
"""Tokens of a document, FLOP/s of attention forward, and backward."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU and its rates in FLOP/s and bytes/s."""

    name: str
    memory_gib: float
    matmul: float  # matrix products of layers, at some thousand rows, under tensor parallelism
    matmul_alone: float  # the same without tensor parallelism
    fp8_gain: dict[str, float]  # of layers' products, with roundings, by training.fp8_recipe
    bandwidth: float  # bytes that elementwise kernels and copies read and write
    link: float  # bytes that a rank receives in a collective inside a node
    network: float  # the same between nodes
    host_copy: float  # to pinned host memory, each way
    tile_attention: float  # attention of vision towers
    attention: dict[str, Sequence[Point]]  # by backend

    def attention_rates(self, backend: str, length: int) -> tuple[float, float]:
        """Return FLOP/s of attention, forward and backward, in documents of `length` tokens.

        Interpolated over the logarithm of the length; constant beyond the measured lengths.
        """
        points = self.attention.get(backend) or self.attention["te"]
        shorter = [point for point in points if point[0] <= length]
        longer = [point for point in points if point[0] > length]
        if not shorter:
            return longer[0][1:]
        if not longer:
            return shorter[-1][1:]
        low = shorter[-1]
        high = longer[0]
        share = math.log(length / low[0]) / math.log(high[0] / low[0])
        return (
            low[1] + share * (high[1] - low[1]),
            low[2] + share * (high[2] - low[2]),
        )


_T = 1e12
_FUSED: Sequence[Point] = (
    (2 << 10, 322 * _T, 316 * _T),
    (8 << 10, 480 * _T, 430 * _T),
    (16 << 10, 567 * _T, 490 * _T),
    (128 << 10, 528 * _T, 515 * _T),
)
_FLASH_4: Sequence[Point] = (
    (512, 166 * _T, 166 * _T),
    (8 << 10, 547 * _T, 520 * _T),
    (32 << 10, 700 * _T, 630 * _T),
    (128 << 10, 637 * _T, 603 * _T),
)
# From whole steps of 32K tokens at TP2, beside those of bf16.
_FP8_GAIN = {"none": 1.0, "tensorwise": 1.69, "blockwise": 1.4}
H200 = Device(
    name="H200",
    memory_gib=139.8,
    matmul=711 * _T,
    matmul_alone=655 * _T,
    fp8_gain=_FP8_GAIN,
    bandwidth=3.2e12,
    link=189e9,
    network=40e9,
    host_copy=50e9,
    tile_attention=300 * _T,
    attention={"te": _FUSED, "fa4": _FLASH_4},
)
H100 = Device(
    name="H100",
    memory_gib=79.2,
    matmul=711 * _T,
    matmul_alone=655 * _T,
    fp8_gain=_FP8_GAIN,
    bandwidth=2.2e12,
    link=189e9,
    network=40e9,
    host_copy=50e9,
    tile_attention=300 * _T,
    attention={"te": _FUSED, "fa4": _FLASH_4},
)
DEVICES = (H100, H200)


def find_device(name: str) -> Device | None:
    """Return the device whose name is part of `name`, such as NVIDIA H200; None if unknown."""
    matching = [device for device in DEVICES if device.name.lower() in name.lower()]
    if matching:
        return matching[0]
    return None
