"""Differentiable collectives over rows whose counts per rank differ and are known on the host."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.send = send
        ctx.receive = receive
        ctx.group = group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def exchange_rows(
    rows: Tensor, *, send_counts: list[int], receive_counts: list[int], group: ProcessGroup
) -> Tensor:
    """Send consecutive runs of `rows` [n, ...] to the ranks of a group (all-to-all) and return
    those received.

    The first `send_counts[0]` rows go to rank 0, the next to rank 1, and so on. Received rows [m,
    ...] are ordered by source rank. Gradients travel back the same way.
    """
    if group.size() == 1:
        return rows
    return _ExchangeRows.apply(rows, send_counts, receive_counts, group)


def concatenate_rows(rows: Tensor, *, counts: list[int], group: ProcessGroup) -> Tensor:
    """Gather all ranks' `rows` [counts[rank], ...] in rank order on every rank, without a second
    copy.

    Not differentiable: see `gather_rows`.
    """
    gathered = rows.new_empty(sum(counts), *rows.shape[1:])
    # A gather of uneven counts would pad them or need a buffer for each rank. Broadcasts write
    # every rank's rows where they belong.
    if len(set(counts)) == 1:
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered
    parts = gathered.split(counts)
    parts[group.rank()].copy_(rows)
    works = [
        dist.broadcast(part, group=group, group_src=rank, async_op=True)
        for rank, part in enumerate(parts)
        if len(part)
    ]
    for work in works:
        work.wait()
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
        ctx.start = sum(counts[: group.rank()])
        ctx.count = len(rows)
        return concatenate_rows(rows, counts=counts, group=group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0][ctx.start : ctx.start + ctx.count].contiguous(), None, None


def gather_rows(rows: Tensor, *, counts: list[int], group: ProcessGroup) -> Tensor:
    """Gather all ranks' `rows` [counts[rank], ...] in rank order on every rank; differentiable.

    The arriving gradient must be the same on all ranks: each rank takes its own rows of it.
    """
    # All ranks know all counts, so that all of them skip the collective or none does.
    if group.size() == 1 or max(counts) == 0:
        return rows
    return _GatherRows.apply(rows, counts, group)


class _GatherContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(len(rows) * group.size(), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        mine = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad, group=ctx.group)
        return mine, None


def gather_context(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Gather equal numbers of rows [t, ...] of all ranks: [ranks * t, ...]; gradients are summed
    over the ranks."""
    if group.size() == 1:
        return rows
    return _GatherContext.apply(rows, group)
