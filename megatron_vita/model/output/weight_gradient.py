"""Accumulation of the weight gradient that the output layer computes in its forward pass.

Where megatron-core has given the weight an fp32 `main_grad`, chunks are added to it at once, as
megatron-core's own fused layers do in backward. This is correct only for a forward pass whose
backward follows. So a forward in evaluation, or while an earlier one still awaits its backward
(activation recomputation runs a layer twice), holds its gradient until its own backward; and one
that was dropped without a backward is refused by the next.
"""

import weakref

import torch
from torch import Tensor

from megatron_vita.errors import VitaError

_BLOCK_ROWS = 4096


class WeightGradient:
    """Weight gradient of one forward pass; its backward must call `finalize`."""

    def __init__(self, weight: Tensor, *, direct: bool) -> None:
        self.weight = weight
        self.direct = direct
        self._total: Tensor | None = getattr(weight, "main_grad", None) if direct else None

    def add(self, grad_logits: Tensor, rows: Tensor) -> None:
        """Add the gradient of a chunk: grad_logits [r, v], rows [r, H]."""
        if self._total is None:
            self._total = torch.mm(grad_logits.t(), rows)
        else:
            add_product(self._total, grad_logits.t(), rows)

    def finalize(self) -> Tensor | None:
        """Return the weight's gradient for autograd; None where it is in `main_grad`."""
        total = self._total
        self._total = None
        if not hasattr(self.weight, "main_grad"):
            if total is None:
                return torch.zeros_like(self.weight)
            return total
        if not self.direct and total is not None:
            self.weight.main_grad.add_(total)
        _mark_as_added(self.weight)
        return None


def _mark_as_added(weight: Tensor) -> None:
    """Tell megatron-core's hook that `main_grad` is complete.

    Under overlapped reduction the hook expects some `.grad`. megatron-core's layers allocate one of
    full size; a single zero, expanded, is enough, unless another layer shares the weight
    (`zero_out_wgrad`) and will add its own.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return
    weight.grad_added_to_main_grad = True
    if weight.grad is None and not getattr(weight, "zero_out_wgrad", False):
        weight.grad = weight.new_zeros(()).expand_as(weight)


class GradientTracker:
    """Record of the last forward pass that added to `main_grad` directly."""

    def __init__(self) -> None:
        self._last: weakref.ref[WeightGradient] | None = None

    def open(self, weight: Tensor, *, training: bool) -> WeightGradient:
        """Begin the weight gradient of a new forward pass.

        Raises:
            VitaError: the last pass's backward never ran, so that its gradient is left in
                `main_grad`.
        """
        # In evaluation, and while an earlier pass awaits its backward, it is not known whether this
        # pass will have one: then its gradient must not be in `main_grad` yet.
        direct = (
            training and hasattr(weight, "main_grad") and not self._is_awaiting_backward(weight)
        )
        gradient = WeightGradient(weight, direct=direct)
        if direct:
            # Weak: a forward pass that is dropped takes its gradient with it, which tells that no
            # backward will come.
            self._last = weakref.ref(gradient)
            if hasattr(weight, "grad_added_to_main_grad"):
                # megatron-core's zero_grad_buffer resets it: `_is_awaiting_backward` reads from it
                # whether gradients were zeroed since.
                weight.grad_added_to_main_grad = True
        return gradient

    def close(self, gradient: WeightGradient) -> None:
        """Record that the gradient's backward has run."""
        if gradient.direct:
            self._last = None

    def _is_awaiting_backward(self, weight: Tensor) -> bool:
        if self._last is None:
            return False
        if self._last() is not None:
            return True
        if getattr(weight, "grad_added_to_main_grad", True):
            raise VitaError(
                "a forward of the output layer in training mode was dropped without its backward, but its weight "
                "gradient is in main_grad already; evaluate under torch.no_grad() or in eval mode, and zero the "
                "gradients before going on"
            )
        # Gradients were zeroed since: what the dropped pass added is gone.
        self._last = None
        return False


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total [v, H] += left [v, r] @ right [r, H] without a temporary of `total`'s size."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        # cuBLAS multiplies bf16 and adds to fp32 in one call.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        # On CPU both must be fp32: convert a block of rows at a time.
        right = right.to(total.dtype)
        for part, block in zip(total.split(_BLOCK_ROWS), left.split(_BLOCK_ROWS), strict=True):
            part.addmm_(block.to(total.dtype), right)
