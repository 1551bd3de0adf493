"""Selection of rows of the last hidden state for the output layer, across TP ranks.

Rows come from labels or bounds on the host, so that counts are known without waiting for the
device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vita.parallel.collectives import concatenate_rows, gather_rows
from megatron_vita.platform.pinned import to_device


@dataclass(frozen=True, kw_only=True)
class SelectedRows:
    """`L` selected rows of a CP rank's slice, as seen by one of its TP ranks."""

    mine: Tensor  # [counts[rank]] rows of this rank's hidden state, ascending, on its device
    length: int  # rows of this rank's hidden state
    # Rows on each TP rank under sequence parallelism; None where each rank has them all.
    counts: list[int] | None
    group: ProcessGroup

    @property
    def is_whole(self) -> bool:
        """True if the selection is this rank's whole hidden state."""
        return self.counts is None and len(self.mine) == self.length

    def gather(self, hidden: Tensor) -> Tensor:
        """Gather the rows [L, H] of `hidden` [length, H] on every TP rank, without autograd.

        Returns `hidden` itself, not a copy, where it is whole.
        """
        if self.is_whole:
            return hidden
        picked = hidden.index_select(0, self.mine)
        if self.counts is None:
            return picked
        return concatenate_rows(picked, counts=self.counts, group=self.group)

    def spread(self, rows: Tensor) -> Tensor:
        """Scatter the gradient of the rows [L, H], the same on all TP ranks, into that of
        `hidden`."""
        if self.is_whole:
            return rows
        # The gradient is summed over TP already: each rank takes the rows that lie on it.
        if self.counts is not None:
            rows = rows.split(self.counts)[self.group.rank()]
        return rows.new_zeros(self.length, *rows.shape[1:]).index_copy_(0, self.mine, rows)


def locate_rows(
    rows: Tensor, *, hidden: Tensor, sequence_parallel: bool, group: ProcessGroup
) -> SelectedRows:
    """Locate selected rows of the slice on the TP ranks.

    Args:
        rows: [L], ascending, on the host.
        hidden: this rank's part of the slice [t / TP, ...] under sequence parallelism, else all of
            it [t, ...].
        sequence_parallel: whether the slice is split over `group`.
        group: tensor-parallel ranks.
    """
    length = len(hidden)
    counts = None
    mine = rows
    if sequence_parallel:
        holder = rows // length
        counts = torch.bincount(holder, minlength=group.size()).tolist()
        mine = rows[holder == group.rank()] % length
    return SelectedRows(
        mine=to_device(mine, hidden.device), length=length, counts=counts, group=group
    )


def select_rows(hidden: Tensor, *, rows: SelectedRows) -> Tensor:
    """Gather selected rows as `SelectedRows.gather`, with autograd: hidden [length, H] -> [L,
    H]."""
    if rows.is_whole:
        return hidden
    picked = hidden[rows.mine]
    if rows.counts is None:
        return picked
    return gather_rows(picked, counts=rows.counts, group=rows.group)
