"""Objectives of a pack: the gradient of each row's loss, and the sum that a step minimizes."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import PackSlice
from megatron_vita.parallel import groups
from megatron_vita.platform.pinned import to_device
from megatron_vita.training.metrics.metrics import LossSums
from megatron_vita.training.run.faults import PackLoss
from megatron_vita.training.run.hooks import Hooks

RowScale = float | Tensor | Callable[[Tensor], Tensor]
"""Gradient of each row's loss: a number, or [L], or computed from the losses [L]."""
ScheduleLoss = tuple[Tensor, Tensor, dict[str, Any]]
"""A sum of losses, the number of what it is summed over, and nothing: as megatron-core's schedules
take them. They divide the sum over the global batch by the number over it."""


class Objective(Protocol):
    """Loss of one pack, on a rank of the last pipeline stage."""

    @property
    def row_scale(self) -> RowScale:
        """Gradient of each row's loss, as `VitaModel.forward` takes it."""

    def finish(self, losses: Tensor) -> ScheduleLoss:
        """Sum the losses of the rows [L]."""


class TokenObjective:
    """Mean loss of all loss tokens, each multiplied by its sample's weight."""

    def __init__(
        self,
        batch: Batch,
        pack: PackSlice,
        *,
        losses: LossSums,
        packs: list[PackLoss],
        hooks: Hooks | None,
    ) -> None:
        """`losses` and `packs` receive the pack's losses."""
        self._batch = batch
        self._pack = pack
        self._losses = losses
        self._packs = packs
        self._hooks = hooks
        self.row_scale: float | Tensor = 1.0
        if batch.loss_weights is not None:
            self.row_scale = batch.loss_weights[pack.positions[pack.loss_rows]]

    def finish(self, losses: Tensor) -> ScheduleLoss:
        """Return the weighted sum of the losses [L], and their number."""
        scale = self.row_scale
        if isinstance(scale, Tensor):
            scale = to_device(scale, losses.device)
        losses = losses * scale
        self._losses.add(losses, batch=self._batch, pack=self._pack)
        total = losses.sum()
        if groups.tensor_group().rank() == 0:
            self._packs.append(PackLoss(self._batch.pack_id, total.detach(), len(losses)))
        report_losses(losses, batch=self._batch, pack=self._pack, hooks=self._hooks)
        return total, count_tensor(len(losses), losses), {}


def report_losses(losses: Tensor, *, batch: Batch, pack: PackSlice, hooks: Hooks | None) -> None:
    """Call the hooks with the losses [L] of a pack's rows, once for each TP group."""
    if hooks is not None and groups.tensor_group().rank() == 0:
        hooks.call("on_losses", losses.detach(), batch=batch, pack=pack)


def count_tensor(count: int, like: Tensor) -> Tensor:
    """Return a count as megatron-core's schedules take it, on the device of `like`."""
    return torch.full((), count, dtype=torch.int, device=like.device)
