"""The output layer for training and serving: it projects only the rows that are needed."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vita.config import OutputConfig
from megatron_vita.errors import VitaError
from megatron_vita.model.output.row_losses import LossInputs, compute_losses
from megatron_vita.model.output.row_selection import SelectedRows, locate_rows, select_rows
from megatron_vita.model.output.softmax import LossForm, Shard
from megatron_vita.model.output.weight_gradient import GradientTracker
from megatron_vita.platform.pinned import to_device
from megatron_vita.rounding import round_up


def padded_vocabulary(vocab_size: int, tensor_parallel_size: int) -> int:
    """Return the vocabulary's rows over all TP ranks: rounded up to a multiple of their number."""
    return round_up(vocab_size, tensor_parallel_size)


class OutputLayer(ColumnParallelLinear):
    """Projection onto a vocabulary shard, with the loss.

    Call it, and do not read `.weight` from outside: hooks on its forward wait for weights that are
    still being gathered (megatron-core's `overlap_param_gather`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        options: OutputConfig,
        owns_weight: bool,
    ) -> None:
        super().__init__(
            config.hidden_size,
            padded_vocabulary(vocab_size, config.tensor_model_parallel_size),
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=not owns_weight,
        )
        # The projection is given whole rows, gathered before it, also under sequence parallelism.
        self.sequence_parallel = False
        self.allreduce_dgrad = config.tensor_model_parallel_size > 1
        self.full_logits = options.full_logits
        self.chunk_bytes = options.chunk_mib << 20
        self.form = LossForm(
            vocab_size=vocab_size, label_smoothing=options.label_smoothing, z_loss=options.z_loss
        )
        width = self.output_size_per_partition
        start = self.tp_group.rank() * width
        columns = min(max(vocab_size - start, 0), width)
        self.shard = Shard(start=start, columns=columns, group=self.tp_group)
        self.tracker = GradientTracker()

    def forward(
        self,
        hidden: Tensor,
        *,
        rows: Tensor,
        labels: Tensor | None = None,
        row_scale: float | Tensor = 1.0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Compute losses [L] in fp32 where `labels` are given, else logits [L, V] on every TP rank.

        Args:
            hidden: [t / TP, 1, H] under sequence parallelism, else [t, 1, H].
            rows: rows of the slice [L], ascending, on the host.
            labels: their target tokens [L], on the host.
            row_scale: the gradient that backward will bring to each loss, one number or [L].
                Gradients are computed for it in the forward pass, so it must include any loss
                scale. Backward checks it.
            weight: the word embedding, where the layer has no weight of its own.

        Raises:
            VitaError: a label is no token of the vocabulary.
        """
        if weight is None:
            weight = self.weight
        hidden = hidden.squeeze(1)
        selected = locate_rows(
            rows,
            hidden=hidden,
            sequence_parallel=self.config.sequence_parallel,
            group=self.tp_group,
        )
        if labels is None:
            return self._row_logits(hidden, rows=rows, selected=selected, weight=weight)
        self._check_labels(labels)
        if self.full_logits:
            return self._losses_of_full_logits(hidden, rows=rows, labels=labels, weight=weight)
        inputs = LossInputs(
            rows=selected,
            targets=to_device(labels - self.shard.start, hidden.device),
            scale=_scale_of_rows(row_scale, hidden.device),
            form=self.form,
            shard=self.shard,
            chunk_bytes=self.chunk_bytes,
            tracker=self.tracker,
            training=self.training,
        )
        return compute_losses(hidden, weight, inputs)

    def _check_labels(self, labels: Tensor) -> None:
        # A label of padding or of no column at all would silently give a loss without a target.
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.form.vocab_size):
            raise VitaError(
                f"labels go from {labels.min()} to {labels.max()}, but tokens from 0 to {self.form.vocab_size - 1}"
            )

    def project(self, rows: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Compute logits [L, V] on every TP rank from rows [L, H] that all of them have.

        `weight` as in `forward`.
        """
        if weight is None:
            weight = self.weight
        logits = self._project(rows, weight)
        return gather_from_tensor_model_parallel_region(logits, group=self.tp_group)[
            :, : self.form.vocab_size
        ]

    def _project(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Project rows [L, H], the same on all TP ranks, to logits of this shard [L, v]."""
        return super().forward(rows, weight=weight)[0]

    def _all_rows(self, hidden: Tensor) -> Tensor:
        """Gather the whole slice [t, H] on every TP rank."""
        ranks = self.tp_group.size() if self.config.sequence_parallel else 1
        every = locate_rows(
            torch.arange(len(hidden) * ranks),
            hidden=hidden,
            sequence_parallel=self.config.sequence_parallel,
            group=self.tp_group,
        )
        return select_rows(hidden, rows=every)

    def _row_logits(
        self, hidden: Tensor, *, rows: Tensor, selected: SelectedRows, weight: Tensor
    ) -> Tensor:
        if not self.full_logits:
            return self.project(select_rows(hidden, rows=selected), weight=weight)
        logits = self.project(self._all_rows(hidden), weight=weight)
        return logits[rows.to(logits.device)]

    def _losses_of_full_logits(
        self, hidden: Tensor, *, rows: Tensor, labels: Tensor, weight: Tensor
    ) -> Tensor:
        """Compute the reference losses: fp32 logits of every position, megatron-core's cross
        entropy."""
        columns = self.shard.columns
        group = self.tp_group
        logits = self._project(self._all_rows(hidden), weight).float()  # [t, v]
        # Token 0 stands for the rows without a label, whose losses are dropped at the end.
        targets = (
            torch.zeros(len(logits), dtype=labels.dtype)
            .index_copy(0, rows, labels)
            .to(logits.device)
        )
        here = (targets >= self.shard.start) & (targets < self.shard.start + columns)
        column = (targets - self.shard.start).where(here, 0)
        target = logits.gather(1, column[:, None]).squeeze(1).where(here, 0.0)
        target = reduce_from_tensor_model_parallel_region(target, group=group)
        total = reduce_from_tensor_model_parallel_region(logits[:, :columns].sum(1), group=group)
        padding = torch.arange(logits.shape[1], device=logits.device) >= columns
        # Padding must not enter the softmax. The result is a copy, which cross entropy may
        # overwrite.
        logits = logits.masked_fill(padding, -torch.inf)
        entropy = vocab_parallel_cross_entropy(
            logits[:, None], targets[:, None], tp_group=group
        ).squeeze(1)
        log_sum = entropy + target
        smoothing = self.form.label_smoothing
        losses = (1 - smoothing) * entropy + smoothing * (log_sum - total / self.form.vocab_size)
        losses = losses + self.form.z_loss * log_sum.square()
        return losses[rows.to(losses.device)]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the parent's state, but with a number of padding rows that may differ when
        loaded."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.weight is not None:
            state[f"{prefix}weight"].allow_shape_mismatch = True
        return state


def _scale_of_rows(scale: float | Tensor, device: torch.device) -> Tensor:
    """Return one number [1], or [L], in fp32 on `device`, without waiting for the device."""
    if not isinstance(scale, Tensor):
        return torch.full((1,), scale, dtype=torch.float32, device=device)
    scale = scale.float().view(-1)
    if scale.device == device:
        return scale
    return to_device(scale, device)
