"""Losses of selected rows in chunks, with gradients computed in the same pass.

No logits are kept for backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita.errors import VitaError
from megatron_vita.model.output.row_selection import SelectedRows
from megatron_vita.model.output.softmax import LossForm, Shard, summarize, write_gradient
from megatron_vita.model.output.weight_gradient import GradientTracker, WeightGradient
from megatron_vita.rounding import ceil_div, round_up

# Rows of a chunk are a multiple of this: matrix units compute in tiles and waste part of the last.
_ROW_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Inputs of one forward pass that autograd does not track."""

    rows: SelectedRows
    targets: Tensor  # [L], counted from the shard's first column
    scale: Tensor  # [L] or [1], fp32: the gradient that will arrive for each loss
    form: LossForm
    shard: Shard
    chunk_bytes: int
    tracker: GradientTracker
    training: bool


def compute_losses(hidden: Tensor, weight: Tensor, inputs: LossInputs) -> Tensor:
    """Compute losses [L] in fp32: hidden [length, H], weight [v, H]. Collective over the shards."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _RowLosses.apply(hidden, weight, inputs)
    chunks = _Chunks(inputs.rows.gather(hidden), weight, inputs)
    return chunks.run(weight_gradient=None, row_gradients=None)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, inputs: LossInputs) -> Tensor:
        ctx.inputs = inputs
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        rows = inputs.rows.gather(hidden)
        ctx.row_gradients = None
        if wants_hidden:
            # A copy of the selected rows is ours: their gradients overwrite it, chunk after chunk.
            ctx.row_gradients = rows if rows is not hidden else torch.empty_like(rows)
        ctx.weight_gradient = None
        if wants_weight:
            ctx.weight_gradient = inputs.tracker.open(weight, training=inputs.training)
        chunks = _Chunks(rows, weight, inputs)
        return chunks.run(weight_gradient=ctx.weight_gradient, row_gradients=ctx.row_gradients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.inputs
        _check_arriving(grads[0], inputs.scale)
        # `ctx` outlives this call: without these references, both are freed after their last use.
        rows = ctx.row_gradients
        ctx.row_gradients = None
        gradient = ctx.weight_gradient
        ctx.weight_gradient = None
        grad_weight = None
        if gradient is not None:
            grad_weight = gradient.finalize()
            inputs.tracker.close(gradient)
        grad_hidden = None
        if rows is not None:
            grad_hidden = inputs.rows.spread(rows)
        return grad_hidden, grad_weight, None


def _check_arriving(grad: Tensor, scale: Tensor) -> None:
    """Check that the gradient of each loss is the one that the forward pass assumed.

    Raises:
        VitaError: it is not; on CUDA an assertion on the device fails instead.
    """
    # NaN is a scale of its own where it is computed from losses: `numerics` judges the step.
    right = torch.isclose(grad, scale, rtol=1e-5, atol=0.0, equal_nan=True).all()
    message = (
        "a gradient other than row_scale arrived at the output layer, which made its gradients for "
        "row_scale"
    )
    if grad.is_cuda:
        # Reading the result would make the host wait for the device in every step.
        torch._assert_async(right, message)
    elif not right:
        raise VitaError(f"{message}: {grad.tolist()[:4]} ... for {scale.tolist()[:4]} ...")


class _Chunks:
    """The rows [L, H] of one forward pass, processed in chunks through one buffer of logits."""

    def __init__(self, rows: Tensor, weight: Tensor, inputs: LossInputs) -> None:
        self.rows = rows
        self.weight = weight
        self.inputs = inputs
        self.scale = inputs.scale.expand(len(rows))

    def run(
        self, *, weight_gradient: WeightGradient | None, row_gradients: Tensor | None
    ) -> Tensor:
        """Compute losses [L] and, where asked, gradients.

        Args:
            weight_gradient: accumulates the weight's gradient.
            row_gradients: receives the rows' gradients [L, H]; may be the rows themselves.
        """
        losses = self.rows.new_empty(len(self.rows), dtype=torch.float32)
        reductions = []
        for chunk, logits in self._logits():
            part = self.rows[chunk]
            targets = self.inputs.targets[chunk]
            summary = summarize(logits, targets=targets, shard=self.inputs.shard)
            losses[chunk] = self.inputs.form.losses(summary)
            if weight_gradient is None and row_gradients is None:
                continue
            write_gradient(
                logits,
                targets=targets,
                shard=self.inputs.shard,
                summary=summary,
                scale=self.scale[chunk],
                form=self.inputs.form,
            )
            if weight_gradient is not None:
                weight_gradient.add(logits, part)
            if row_gradients is not None:
                # Last: `row_gradients` may be `rows` itself, so that this overwrites `part`.
                torch.mm(logits, self.weight, out=row_gradients[chunk])
                reductions.append(self._reduce(row_gradients[chunk]))
        for reduction in reductions:
            if reduction is not None:
                reduction.wait()
        return losses

    def _logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each chunk with its logits [r, v], which the next chunk overwrites."""
        total = len(self.rows)
        width = len(self.weight)
        # All ranks of the shards have the same rows, so that none waits in a collective for a chunk
        # that another does not have.
        if total == 0:
            return
        most = max(1, self.inputs.chunk_bytes // (width * self.rows.element_size()))
        # The fewest chunks that fit, of nearly equal size: a small last one would use a GPU badly.
        size = ceil_div(total, ceil_div(total, most))
        size = min(most, round_up(size, _ROW_MULTIPLE), total)
        buffer = self.rows.new_empty(size, width)
        for start in range(0, total, size):
            chunk = slice(start, min(start + size, total))
            logits = buffer[: chunk.stop - start]
            torch.mm(self.rows[chunk], self.weight.t(), out=logits)
            yield chunk, logits

    def _reduce(self, gradients: Tensor) -> dist.Work | None:
        """Start summing a chunk's row gradients over the vocabulary shards, beside the next
        chunk."""
        group = self.inputs.shard.group
        if group.size() > 1:
            return dist.all_reduce(gradients, group=group, async_op=True)
        return None
