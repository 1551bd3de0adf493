"""Tensors that a source offers, before any of them is read."""

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
    """What is known of a tensor without reading it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What there is."""

    def read(self, name: str) -> Tensor:
        """A tensor, on the host; it may be a view of the file."""

    def release(self, name: str) -> None:
        """Gives memory that `read` took for a file's pages back to the system."""


def check_finite(tensor: Tensor, *, name: str, file: Path) -> None:
    """CheckpointError if a tensor has a value that is no number."""
    if tensor.numel() == 0:
        return
    least, most = torch.aminmax(tensor)
    if not bool(torch.isfinite(least) & torch.isfinite(most)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{file}: tensor {name} has {bad} values of {tensor.numel()} that are NaN or infinite, not numbers"
        )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, so that -0 and 0 differ."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))
