"""Counts of a pack's positions by rank."""

import torch
from torch import Tensor

from megatron_vita.layout.zigzag import owners


def count_by_rank(selected: Tensor, cu_seqlens: Tensor, *, tp_size: int, cp_size: int) -> Tensor:
    """Count selected positions by sequence slice: `selected` [T] bool -> counts [CP, TP]."""
    owner = owners(cu_seqlens, cp_size)
    slices = torch.stack([selected[owner == rank] for rank in range(cp_size)])  # [CP, t]
    # Sequence parallelism splits a CP rank's slice into equal, contiguous parts in TP rank order.
    return slices.unflatten(1, (tp_size, -1)).sum(2)
