"""The `torch` attention backend's place in megatron-core. What is attended to is the business of
`documents.py`."""

from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class DocumentAttention(nn.Module):
    """megatron-core's `core_attention` slot (transformer/attention.py names the contract)."""

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__()
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
        """query [t, 1, heads, d], key and value [t, 1, groups, d] -> [t, 1, heads * d]."""
        rows = packed_seq_params.attend(self.layer_number, query[:, 0], key[:, 0], value[:, 0])
        return rows.flatten(1).unsqueeze(1)
