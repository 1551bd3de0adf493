"""How many positions of a pack fall on each rank."""

import torch
from torch import Tensor

from megatron_vita.layout.zigzag import owners


def count_by_rank(selected: Tensor, cu_seqlens: Tensor, *, tp_size: int, cp_size: int) -> Tensor:
    """Selected positions in the sequence share of each rank: `selected` [T] bool -> [CP, TP]."""
    owner = owners(cu_seqlens, cp_size)
    slices = torch.stack([selected[owner == rank] for rank in range(cp_size)])  # [CP, t]
    return slices.unflatten(1, (tp_size, -1)).sum(2)
