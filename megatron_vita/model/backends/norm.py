"""RMSNorm for the `torch` backend."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm that supports sequence parallelism, which megatron-core's own torch norm refuses.

    It marks its weight, whose gradient each TP rank then has for its own rows only.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: [..., H] -> [..., H]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
