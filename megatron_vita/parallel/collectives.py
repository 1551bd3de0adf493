"""Differentiable collectives over rows of uneven counts, which the host knows beforehand."""

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
    """Sends the first `send_counts[0]` of `rows` [n, ...] to rank 0, the next to rank 1, ...;
    returns those received.

    Received rows [m, ...] are ordered by source rank. Gradients return the same way.
    """
    if group.size() == 1:
        return rows
    return _ExchangeRows.apply(rows, send_counts, receive_counts, group)


def concatenate_rows(rows: Tensor, *, counts: list[int], group: ProcessGroup) -> Tensor:
    """All ranks' `rows` [counts[rank], ...] one after another, on every rank, with no second copy.
    Not recorded."""
    gathered = rows.new_empty(sum(counts), *rows.shape[1:])
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
    """All ranks' `rows` [counts[rank], ...] one after another, on every rank.

    The gradient that arrives must be the same on all ranks; each takes its own rows of it.
    """
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
    """All ranks' `rows` [t, ...] one after another: [ranks * t, ...]. Gradients are summed over the
    ranks."""
    if group.size() == 1:
        return rows
    return _GatherContext.apply(rows, group)
