"""Core attention of the `torch` backend; the computation itself is in `documents.py`."""

from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class DocumentAttention(nn.Module):
    """Module for megatron-core's `core_attention` slot (contract: its transformer/attention.py)."""

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__()
        # Serving's metadata finds the layer's part of the key-value cache by it.
        self.layer_number = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: Any,
        **_: Any,
    ) -> Tensor:
        """Attend: query [t, 1, heads, d], key and value [t, 1, groups, d] -> [t, 1, heads * d]."""
        rows = packed_seq_params.attend(self.layer_number, query[:, 0], key[:, 0], value[:, 0])
        return rows.flatten(1).unsqueeze(1)
