"""Computation in pieces, with one gradient for each weight.

megatron-core counts how often each weight's gradient arrives and starts its reduction over the
ranks after the last: so the gradients of the pieces are summed here first.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vita.rounding import ceil_div

PieceFunction = Callable[[Tensor], Tensor]


def split_evenly(rows: Tensor, *, at_most: int) -> tuple[Tensor, ...]:
    """Split `rows` [n, ...] into the fewest nearly equal pieces of at most `at_most` rows.

    No rows are one piece.
    """
    pieces = max(1, ceil_div(len(rows), at_most))
    return rows.split(max(1, ceil_div(len(rows), pieces)))


class PieceGradients:
    """Sums of weight gradients over pieces, in fp32.

    A gradient that a layer has already added to megatron-core's `main_grad` (marked by
    `grad_added_to_main_grad`) is not summed; the placeholder returned in its place is passed on.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = [weight for weight in weights if weight.requires_grad]
        self._sums: list[Tensor] = []

    def backward(self, result: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Backpropagate `grad` through one piece's `result`; return the gradients of its inputs."""
        # `grad` instead of `backward`: the latter would report every piece's gradient of a weight
        # to megatron-core's hooks.
        found = torch.autograd.grad(result, [*inputs, *self.weights], grad)
        parts = list(found[len(inputs) :])
        if self._sums:
            parts = list(map(self._add, self.weights, self._sums, parts))
        self._sums = parts
        return found[: len(inputs)]

    @staticmethod
    def _add(weight: nn.Parameter, total: Tensor, part: Tensor) -> Tensor:
        if getattr(weight, "grad_added_to_main_grad", False):
            return total
        # In fp32 from the second piece on: a single piece needs no copy.
        return total.float() + part

    def take(self) -> list[Tensor]:
        """Return the sums in the weights' types, and reset them."""
        sums = self._sums
        self._sums = []
        return [total.to(w.dtype) for w, total in zip(self.weights, sums, strict=True)]

    def deliver(self) -> None:
        """Pass the sums to the weights as autograd does at the end of a backward pass."""
        if self.weights:
            torch.autograd.backward(self.weights, self.take())


class _CheckpointedPieces(torch.autograd.Function):
    # `weights` are inputs so that autograd takes their gradients from here; `function` uses them
    # without being given them.

    @staticmethod
    def forward(
        ctx: Any, function: PieceFunction, rows: Tensor, at_most: int, *weights: nn.Parameter
    ) -> Tensor:
        ctx.function = function
        ctx.rows = rows
        ctx.at_most = at_most
        ctx.weights = weights
        result: Tensor | None = None
        for first, piece in _numbered(rows, at_most):
            part = function(piece)
            if result is None:
                result = part.new_empty(len(rows), *part.shape[1:])
            result[first : first + len(part)] = part
        assert result is not None
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = PieceGradients(ctx.weights)
        for first, piece in _numbered(ctx.rows, ctx.at_most):
            with torch.enable_grad():
                part = ctx.function(piece)
            gradients.backward(part, grads[0][first : first + len(part)])
        return None, None, None, *gradients.take()


def _numbered(rows: Tensor, at_most: int) -> Iterator[tuple[int, Tensor]]:
    """Yield pieces with the index of their first row."""
    first = 0
    for piece in split_evenly(rows, at_most=at_most):
        yield first, piece
        first += len(piece)


def checkpoint_pieces(
    function: PieceFunction, rows: Tensor, *, at_most: int, weights: Sequence[nn.Parameter]
) -> Tensor:
    """Apply a row-wise `function` to `rows` [n, ...] a piece at a time, recomputed in backward.

    Only `rows` are kept, and one piece's intermediate values exist at a time.

    Args:
        function: maps rows [r, ...] to rows.
        rows: input; receives no gradient.
        at_most: rows of a piece.
        weights: the trained weights that `function` uses, at least one.
    """
    return _CheckpointedPieces.apply(function, rows, at_most, *weights)
