"""Weights of 4 bits (NF4, by bitsandbytes), the same at every tensor-parallel layout.

Each row is quantized in blocks of consecutive elements, with the largest magnitude of a block as
its scale. No block crosses rows or ranks (recipes are refused otherwise): so a shard has the codes
and scales of the whole weight, and joint maps (query, key and value) those of the single ones.

Double quantization keeps the scales in 8 bits. The mean over the whole map is subtracted first; the
rest is quantized in blocks of 256 consecutive scales, which do cross rows and ranks. Scales are
therefore gathered over TP while a weight is packed, and quantized as those of whole single maps;
each rank keeps its own codes, and the second scales of all, which are few.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vita.config import LinearMap
from megatron_vita.config.groups.lora import SCALES_AT_ONCE
from megatron_vita.model.lora import row_owners


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Quantization of a linear map's weight."""

    linear: LinearMap
    block_size: int
    double_quant: bool
    group: ProcessGroup  # tensor-parallel ranks


class Scales(Protocol):
    """Scales of a shard's blocks."""

    def values(self) -> Tensor:
        """Return the scales in fp32 [rows, blocks of a row]."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by name."""


@dataclass(frozen=True, kw_only=True)
class PlainScales:
    """Scales in fp32 [rows, blocks of a row]."""

    scales: Tensor

    def values(self) -> Tensor:
        """Return the scales."""
        return self.scales

    def tensors(self) -> dict[str, Tensor]:
        """Return the scales, by name."""
        return {"scales": self.scales}


@dataclass(frozen=True, kw_only=True)
class QuantizedScales:
    """Scales in 8 bits: levels[code] * second scale + mean."""

    codes: Tensor  # [rows, blocks of a row] in uint8
    levels: Tensor  # [256]
    second: Tensor  # of all single maps, one after another
    first: Tensor  # [rows] place of a row's first scale, in units of 1 / 256 of a second scale
    means: Tensor  # [rows]

    def values(self) -> Tensor:
        """Compute the scales [rows, blocks of a row], in the order of bitsandbytes' operations."""
        columns = torch.arange(self.codes.shape[1], dtype=torch.int32, device=self.codes.device)
        places = (self.first[:, None] + columns) // SCALES_AT_ONCE
        scaled = self.levels[self.codes.int()].mul_(self.second[places])
        return scaled.add_(self.means[:, None])

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by name."""
        return {
            "scale_codes": self.codes,
            "second_scales": self.second,
            "scale_places": self.first,
            "scale_means": self.means,
        }


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight [out, in] on this rank in 4 bits."""

    codes: Tensor  # two elements a byte
    scales: Scales
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Compute the weight in its type."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            absmax=self.scales.values().flatten(),
            shape=self.shape,
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=self.dtype,
        )
        weight: Tensor = dequantize_4bit(self.codes, state)
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by name."""
        return {"codes": self.codes} | self.scales.tensors()


@torch.no_grad()
def pack(weight: Tensor, packing: Packing) -> PackedWeight:
    """Quantize a weight [out, in] on this rank. Collective with `double_quant`."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=packing.block_size, quant_type="nf4")
    plain = state.absmax.view(len(weight), -1)
    scales: Scales = PlainScales(scales=plain)
    if packing.double_quant:
        scales = _quantize_scales(plain, packing)
    return PackedWeight(
        codes=codes,
        scales=scales,
        shape=weight.shape,
        dtype=weight.dtype,
        block_size=packing.block_size,
    )


def _quantize_scales(scales: Tensor, packing: Packing) -> QuantizedScales:
    """Quantize the scales [rows, blocks] of a shard as those of whole single maps. Collective."""
    from bitsandbytes.functional import quantize_blockwise

    owners = row_owners(packing.linear).to(scales.device)  # [stack, rows] of the whole map
    whole = _gather(scales.view(len(owners), -1, scales.shape[1]), packing)
    codes = torch.empty_like(whole, dtype=torch.uint8)
    first = torch.empty_like(owners, dtype=torch.int32)
    means = whole.new_empty(owners.shape)
    second: list[Tensor] = []
    for number in range(len(packing.linear.pieces)):
        mine = owners == number
        of_piece = whole[mine]  # [rows, blocks]
        means[mine] = of_piece.mean()
        centred = (of_piece - of_piece.mean()).flatten()
        quantized, state = quantize_blockwise(centred, blocksize=SCALES_AT_ONCE)
        codes[mine] = quantized.view_as(of_piece)
        beginnings = torch.arange(0, len(centred), of_piece.shape[1], device=scales.device)
        first[mine] = (beginnings + SCALES_AT_ONCE * sum(map(len, second))).int()
        second.append(state.absmax)
    return _own_part(
        QuantizedScales(
            codes=codes, levels=state.code, second=torch.cat(second), first=first, means=means
        ),
        packing,
    )


def _gather(scales: Tensor, packing: Packing) -> Tensor:
    """Gather the scales [stack, rows, blocks] of a whole map from its shards. Collective."""
    group = packing.group
    if group.size() == 1:
        return scales
    shards = [torch.empty_like(scales) for _ in range(group.size())]
    dist.all_gather(shards, scales.contiguous(), group=group)
    return torch.cat(shards, dim=_split_axis(packing))


def _own_part(whole: QuantizedScales, packing: Packing) -> QuantizedScales:
    """Return this rank's part of a whole map's scales [stack, rows, blocks], by its rows."""
    size = packing.group.size()
    rank = packing.group.rank()
    codes = whole.codes.chunk(size, dim=_split_axis(packing))[rank]
    first = whole.first
    means = whole.means
    if packing.linear.split == "row":
        first = first + rank * codes.shape[-1]
    else:
        first = first.chunk(size, dim=1)[rank]
        means = means.chunk(size, dim=1)[rank]
    # Copies: views would keep all of the whole map.
    return QuantizedScales(
        codes=codes.flatten(0, 1).clone(),
        levels=whole.levels,
        second=whole.second,
        first=first.flatten().clone(),
        means=means.flatten().clone(),
    )


def _split_axis(packing: Packing) -> int:
    return 2 if packing.linear.split == "row" else 1
