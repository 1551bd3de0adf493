"""Context parallelism's split: each document is cut into 2*CP equal chunks, and rank r holds chunks
r and 2*CP-1-r.

Causal attention makes late chunks dearer than early ones; pairing them gives every rank the same
work.
"""

import torch
from torch import Tensor


def owners(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """The CP rank that holds each position of a pack: [T] int64.

    `cu_seqlens` [D+1] are the documents' bounds; every length must be a multiple of 2*CP (1 at CP
    1).
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    if cp_size == 1:
        return torch.zeros(int(lengths.sum()), dtype=torch.int64)
    assert not (lengths % (2 * cp_size)).any(), (
        f"document lengths {lengths.tolist()} at context parallel {cp_size}"
    )
    offset = offsets_in_document(cu_seqlens)
    chunk = offset // (lengths // (2 * cp_size)).clamp(min=1).repeat_interleave(lengths)
    return torch.minimum(chunk, 2 * cp_size - 1 - chunk)


def offsets_in_document(cu_seqlens: Tensor) -> Tensor:
    """Distance of each position from its document's start, which is its rotary position: [T]
    int64."""
    lengths = cu_seqlens.diff().to(torch.int64)
    starts = cu_seqlens[:-1].to(torch.int64).repeat_interleave(lengths)
    return torch.arange(len(starts)) - starts


def positions_of_rank(cu_seqlens: Tensor, *, cp_size: int, cp_rank: int) -> Tensor:
    """Positions of the pack that `cp_rank` holds, in the order in which it holds them: [t] int64, t
    = T / CP."""
    return (owners(cu_seqlens, cp_size) == cp_rank).nonzero().squeeze(1)
