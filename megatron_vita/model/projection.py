"""A linear projection with a backward pass but without a forward product.

A recomputed MLP needs only what its backward pass reads: the input of its last projection, not the
output. So the product, and under tensor parallelism its sum over the ranks, are skipped.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vita.model.nf4 import PackedWeight
from megatron_vita.model.output.weight_gradient import add_product
from megatron_vita.model.quantized import QuantizedLinear
from megatron_vita.parallel.collectives import concatenate_rows


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | PackedWeight,
        linear: Any,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.packed = None
        if isinstance(weight, PackedWeight):
            ctx.packed = weight
        else:
            ctx.save_for_backward(rows, weight)
        ctx.linear = linear
        ctx.group = group
        count = len(rows)
        if group is not None:
            count //= group.size()
        # One element, expanded: autograd needs an output's shape, not its memory.
        return rows.new_empty(()).expand(count, *rows.shape[1:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        group = ctx.group
        if group is not None:
            grad = concatenate_rows(grad, counts=[len(grad)] * group.size(), group=group)
        if ctx.packed is not None:
            return torch.matmul(grad, ctx.packed.dense()), None, None, None
        rows, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad.flatten(0, -2), rows.flatten(0, -2), ctx.linear)
        return torch.matmul(grad, weight), grad_weight, None, None


def _weight_gradient(grad: Tensor, rows: Tensor, linear: Any) -> Tensor:
    """Return the gradient of `linear.weight`, or a placeholder if it was added to `main_grad`.

    The latter is Transformer Engine's `fuse_wgrad_accumulation`.
    """
    weight = linear.weight
    if not getattr(linear, "fuse_wgrad_accumulation", False):
        return torch.mm(grad.t(), rows)
    add_product(weight.main_grad, grad.t(), rows)
    weight.grad_added_to_main_grad = True
    stand_in: Tensor = weight.new_zeros(()).expand_as(weight)
    return stand_in


def without_output(rows: Tensor, linear: Any, *, group: ProcessGroup | None) -> Tensor:
    """Return a tensor without contents in the place of `linear(rows)`, with its backward pass.

    Args:
        rows: input of a row-parallel linear layer without bias, [t, ..., F / TP].
        linear: the layer.
        group: tensor-parallel ranks, where the output is scattered along the rows, [t / TP, ...,
            H]; None where each rank has all of it.
    """
    weight = linear.packed if isinstance(linear, QuantizedLinear) else linear.weight
    result: Tensor = _Backward.apply(rows, weight, linear, group)
    return result
