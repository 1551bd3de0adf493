"""Rotary positions of the rows of a step: cosines and sines are computed once for all layers, in
fp32."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.config import LanguageConfig


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosines and sines [t, d / 2] of each row's angles, with YaRN's attention scaling."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(
        cls, positions: Tensor, *, inverse_frequencies: Tensor, shape: LanguageConfig
    ) -> "Rotation":
        """The rotation of rows at `positions` [t]."""
        angles = positions[:, None].float() * inverse_frequencies
        factor = shape.rope_scaling.attention_factor
        return cls(cos=angles.cos() * factor, sin=angles.sin() * factor)

    def rotate(self, rows: Tensor) -> Tensor:
        """Rotate queries or keys [t, heads, d], in which dimension i pairs with i + d / 2."""
        if rows.is_cuda:
            from megatron_vita.inference.runner.kernels import rotate_on_cuda

            return rotate_on_cuda(rows, self.cos, self.sin)
        cos = self.cos[:, None]
        sin = self.sin[:, None]
        first, second = rows.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
            rows.dtype
        )
