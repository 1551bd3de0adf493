"""Work done piece by piece, whose weights still receive one gradient.

megatron-core counts how often each weight's gradient arrives and begins to reduce it over the ranks
when the last one has: so the pieces' gradients are summed here first.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PieceFunction = Callable[[Tensor], Tensor]


def split_evenly(rows: Tensor, *, at_most: int) -> tuple[Tensor, ...]:
    """`rows` [n, ...] in as few pieces of at most `at_most` as must be, of nearly equal size; no
    rows are one piece."""
    pieces = max(1, -(-len(rows) // at_most))
    return rows.split(max(1, -(-len(rows) // pieces)))


class PieceGradients:
    """Sums of the gradients of weights over pieces of work, in fp32.

    A gradient that a layer has already added to megatron-core's `main_grad` (it says so by
    `grad_added_to_main_grad`) is not summed; what the layer returns in its place is passed on.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = [weight for weight in weights if weight.requires_grad]
        self._sums: list[Tensor] = []

    def backward(self, result: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Goes back through one piece, whose `result` received `grad`; the gradients of its
        inputs."""
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
        return total.float() + part

    def take(self) -> list[Tensor]:
        """The sums, in the types of their weights."""
        sums = self._sums
        self._sums = []
        return [total.to(w.dtype) for w, total in zip(self.weights, sums, strict=True)]

    def deliver(self) -> None:
        """Gives the weights their gradients, as autograd does at the end of a backward pass."""
        if self.weights:
            torch.autograd.backward(self.weights, self.take())


class _CheckpointedPieces(torch.autograd.Function):
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
    """Pieces with the number of their first row."""
    first = 0
    for piece in split_evenly(rows, at_most=at_most):
        yield first, piece
        first += len(piece)


def checkpoint_pieces(
    function: PieceFunction, rows: Tensor, *, at_most: int, weights: Sequence[nn.Parameter]
) -> Tensor:
    """`function` of `rows` [n, ...], row by row, a piece at a time; backward runs each piece
    again, so that one piece's intermediates live at a time and `rows` alone are kept.

    weights: the trained weights that `function` uses, at least one. `rows` receive no gradient.
    """
    return _CheckpointedPieces.apply(function, rows, at_most, *weights)
