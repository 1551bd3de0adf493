"""Keys and values of the documents that are being answered, and attention over them.

A forward pass is told by its backend what attention sees: the prompts themselves, which fill the cache, or one new
token for each document, over the cache.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vita.model.backends import TorchBackend, rotary_angles
from megatron_vita.model.documents import PackedDocuments


@dataclass
class KeyValueCache:
    """Room for `capacity` tokens of each of B documents, layer by layer."""

    lengths: Tensor  # [B] tokens that each document holds
    capacity: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # keys, values [B, capacity, groups, d]

    def write(self, layer: int, key: Tensor, value: Tensor, *, document: Tensor, offset: Tensor) -> None:
        """Stores rows [n, groups, d] at (document, offset), each [n]."""
        if layer not in self.layers:
            shape = (len(self.lengths), self.capacity, *key.shape[1:])
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[document, offset], values[document, offset] = key, value


@dataclass(frozen=True)
class Prefill:
    """Attention inside whole prompts, which are remembered."""

    documents: PackedDocuments
    cache: KeyValueCache
    qkv_format: str = "documents"

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [t, heads, d]; key, value [t, groups, d] -> [t, heads, d]."""
        lengths = self.cache.lengths
        document = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        offset = torch.arange(len(key), device=key.device) - (lengths.cumsum(0) - lengths)[document]
        self.cache.write(layer, key, value, document=document, offset=offset)
        return self.documents.attend(layer, query, key, value)


@dataclass(frozen=True)
class Decode:
    """Attention of one new token of each document over all that the document holds."""

    cache: KeyValueCache
    qkv_format: str = "documents"

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, heads, d]; key, value [B, groups, d] -> [B, heads, d]."""
        lengths = self.cache.lengths
        document = torch.arange(len(lengths), device=lengths.device)
        self.cache.write(layer, key, value, document=document, offset=lengths)
        used = int(lengths.max()) + 1
        repeats = query.shape[1] // key.shape[1]
        keys, values = (
            x[:, :used].repeat_interleave(repeats, dim=2).transpose(1, 2) for x in self.cache.layers[layer]
        )  # [B, heads, used, d]
        seen = torch.arange(used, device=lengths.device) <= lengths[:, None]
        out = F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, attn_mask=seen[:, None, None])
        return out.squeeze(2)


class CachingBackend(TorchBackend):
    """The `torch` backend with a cache. `cache` None: an ordinary forward; else prefill when it is empty, or decode."""

    cache: KeyValueCache | None = None

    def describe(self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor) -> tuple[Any, Tensor]:
        """What attention sees, and the rotary angles of the rows."""
        if self.cache is None or not self.cache.layers:
            documents, angles = super().describe(cu_seqlens, inverse_frequencies=inverse_frequencies)
            return (documents if self.cache is None else Prefill(documents, self.cache)), angles
        return Decode(self.cache), rotary_angles(self.cache.lengths, inverse_frequencies)
