"""Interface of tensor sources, and checks of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_vita.errors import CheckpointError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """File, type and shape of a tensor, known without reading it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""

    def read(self, name: str) -> Tensor:
        """Read a tensor to the host; it may be a view of the file."""

    def release(self, name: str) -> None:
        """Return the page memory that `read` used to the system."""


def check_finite(tensor: Tensor, *, name: str, file: Path) -> None:
    """Raise CheckpointError if a tensor has a NaN or infinite value."""
    if tensor.numel() == 0:
        return
    # A NaN or infinity shows in the extremes, which takes one pass without a mask in memory.
    least, most = torch.aminmax(tensor)
    if not bool(torch.isfinite(least) & torch.isfinite(most)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{file}: tensor {name} has {bad} values of {tensor.numel()} that are NaN or infinite, not numbers"
        )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare two tensors bit by bit: -0 differs from 0, and a NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # Compared as integers: as floats, NaN differs from itself and -0 equals 0.
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))
