"""Adapters with trained norms (DoRA): (m + d) / ||W + scale B A|| times (W + scale B A), row by row.

m is the norm of a row of W over its whole input, and d, 0 at first, is trained: a new adapter
changes nothing, whatever the precision of d. The norm of the sum gets no gradient, as in the paper
(Liu et al. 2024, section 4.3). It is computed without the sum of the matrices:

||W + sBA||^2 = ||W||^2 + 2s (W A^T) . B + s^2 (B A A^T) . B

A row-parallel map has a part of each row, so that squares are summed over TP.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from megatron_vita.model.lora import Adapter

_ROWS_AT_ONCE = 1 << 12


class DoraAdapter(Adapter):
    """Low-rank update of one linear map on this rank, with a trained norm for each row."""

    needs_output = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.d = nn.Parameter(torch.zeros(self.choice.shape[:2]))
        if self.split == "column":
            set_tensor_model_parallel_attributes(self.d, True, 1, 1)
        elif self.split == "row":
            # Its gradient is of this rank's rows of the sequence alone.
            self.d.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self._linear: tuple[nn.Module, ...] = ()

    def bind(self, linear: nn.Module) -> None:
        """Set the linear map; it is no submodule of its adapter."""
        self._linear = (linear,)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Change the map's output as `Adapter.forward`; a bias stays as it is."""
        if not self.enabled:
            return output
        (linear,) = self._linear
        weight = linear.get_parameter("weight").detach()
        gain = self.gain_above_one(weight.view(-1, weight.shape[-1]))
        updated = super().forward(x, output)
        scaled = updated
        bias = getattr(linear, "bias", None)
        # Transformer Engine's layers have an empty one where others have none.
        if bias is not None and bias.numel():
            scaled = updated - bias.flatten()
        # Exact where the gain is 0, unlike a bias that is taken off and added again.
        return torch.addcmul(updated, scaled, gain.to(updated.dtype))

    def gain_above_one(self, weight: Tensor) -> Tensor:
        """Compute what multiplies the rows of W + scale B A, minus 1 [out], 0 without an adapter.

        Args:
            weight: W on this rank [out, in]. Collective for a row-parallel map.
        """
        before, after = self.norms(weight)
        gain = (before + self.d.flatten().float()) / after - 1
        return torch.where(self.choice.flatten(0, 1).any(1), gain, 0.0)

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """Compute the norms of the rows of W and of W + scale B A in fp32 [2, out]."""
        a = self.a.float()
        b = self.output_weight().float() * self.scale  # [out, pieces * r]
        squares = squared_norms(weight, a, b)
        if self.split == "row" and self.group.size() > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt()


def squared_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the squared norms of the rows of W and of W + B A in fp32 [2, out].

    Args:
        weight: W [out, in] in any precision.
        a: A [k, in] in fp32.
        b: B [out, k] in fp32, with the scale.
    """
    products = a @ a.t()
    squares = b.new_empty(2, len(b))
    # In pieces: a copy of the weight in fp32 would be large.
    for start in range(0, len(b), _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        rows = weight[here].float()
        plain = rows.square().sum(1)
        added = (2 * (rows @ a.t()) + b[here] @ products) * b[here]
        squares[0, here] = plain
        squares[1, here] = plain + added.sum(1)
    # Rounding may take the sum below zero where the update cancels a row.
    return squares.clamp_min(torch.finfo(torch.float32).tiny)
