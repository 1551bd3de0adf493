"""Zigzag split of context parallelism: rank r holds chunks r and 2*CP-1-r of 2*CP equal chunks of
each document.

Causal attention makes late chunks costlier than early ones; pairing them gives every rank the same
work.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def owners(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """CP rank that holds each position of a pack: [T] int64.

    `cu_seqlens` [D+1] are the bounds of the documents, whose lengths must be multiples of 2*CP
    unless CP is 1.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    if cp_size == 1:
        return torch.zeros(int(lengths.sum()), dtype=torch.int64)
    assert not (lengths % (2 * cp_size)).any(), (
        f"document lengths {lengths.tolist()} at context parallel {cp_size}"
    )
    offset = offsets_in_document(cu_seqlens)
    # The clamp keeps empty documents, which have no position, from dividing by zero.
    chunk = offset // (lengths // (2 * cp_size)).clamp(min=1).repeat_interleave(lengths)
    return torch.minimum(chunk, 2 * cp_size - 1 - chunk)


def offsets_in_document(cu_seqlens: Tensor) -> Tensor:
    """Offset of each position in its document, which is its rotary position: [T] int64."""
    lengths = cu_seqlens.diff().to(torch.int64)
    starts = cu_seqlens[:-1].to(torch.int64).repeat_interleave(lengths)
    return torch.arange(len(starts)) - starts


def positions_of_rank(cu_seqlens: Tensor, *, cp_size: int, cp_rank: int) -> Tensor:
    """Positions of the pack that `cp_rank` holds, in its local order: int64 [t], t = T / CP."""
    return (owners(cu_seqlens, cp_size) == cp_rank).nonzero().squeeze(1)


def gathered_rows(cu_seqlens: Tensor, *, cp_size: int) -> Tensor:
    """Row of each pack position after an all-gather of the ranks' rows in rank order: [T] int64."""
    order = owners(cu_seqlens, cp_size).argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order))
    return rows


class RankChunks(NamedTuple):
    """Chunks of a rank in its local order, with the keys that each attends to.

    A chunk attends to its prefix: its document's keys from the first to the chunk's own last.
    """

    query_lengths: Tensor  # [chunks] int64
    key_lengths: Tensor  # [chunks] int64, of the prefixes
    key_rows: Tensor  # [sum of key_lengths] int64, in the rows of `gathered_rows`


def rank_chunks(cu_seqlens: Tensor, *, cp_size: int, cp_rank: int) -> RankChunks:
    """Chunks of `cp_rank`: the early and the late one of each document that is not empty."""
    bounds = cu_seqlens.to(torch.int64)
    lengths = bounds.diff()
    starts = bounds[:-1][lengths > 0]
    lengths = lengths[lengths > 0]
    chunks = (lengths // (2 * cp_size)).repeat_interleave(2)
    # Both prefixes together have 2*CP + 1 chunks on every rank, so that all ranks attend to equally
    # many keys.
    ends = torch.tensor([cp_rank + 1, 2 * cp_size - cp_rank])  # in chunks
    key_lengths = chunks * ends.repeat(len(lengths))
    rows = gathered_rows(cu_seqlens, cp_size=cp_size)
    prefixes = zip(starts.repeat_interleave(2).tolist(), key_lengths.tolist(), strict=True)
    key_rows = torch.cat([rows[start : start + length] for start, length in prefixes])
    return RankChunks(chunks, key_lengths, key_rows)
