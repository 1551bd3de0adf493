"""Transformer Engine's fused attention; falling back to unfused attention is an error here.

Unfused attention materializes all scores. Imported only where Transformer Engine is used.
"""

import os
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_vita import platform
from megatron_vita.errors import PlatformError


class FusedAttention(TEDotProductAttention):
    """megatron-core's wrapper, with unfused attention disabled (`NVTE_UNFUSED_ATTN`)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attend as the parent does.

        Raises:
            PlatformError: no fused kernel supports this run.
        """
        try:
            return super().forward(*args, **kwargs)
        except ValueError as error:
            raise _refusal(error) from error


def check_fused_attention(*, heads: int, query_groups: int, width: int, dtype: torch.dtype) -> None:
    """Run attention once, forward and backward, on two short documents.

    Raises:
        PlatformError: no fused kernel supports it.
    """
    # megatron-core sets it for the layers, but later: the check must see the same choice of
    # kernels.
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    shape = (32, heads, width)
    query = torch.randn(shape, device=platform.device(), dtype=dtype, requires_grad=True)
    key, value = torch.randn(2, 32, query_groups, width, device=platform.device(), dtype=dtype)
    bounds = torch.tensor([0, 16, 32], device=platform.device(), dtype=torch.int32)
    attention = te.DotProductAttention(
        heads, width, num_gqa_groups=query_groups, attention_dropout=0.0, qkv_format="thd"
    )
    lengths: dict[str, Any] = {"max_seqlen_q": 16, "max_seqlen_kv": 16}
    lengths |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), bounds)
    try:
        attention(query, key, value, attn_mask_type="padding_causal", **lengths).sum().backward()
    except ValueError as error:
        raise _refusal(error) from error


def _refusal(error: ValueError) -> PlatformError:
    return PlatformError(
        f"Transformer Engine has no fused attention for this run: {error}. Most often it has found an older cuDNN than "
        "torch's own: set CUDNN_HOME to site-packages/nvidia/cudnn and put its lib first in LD_LIBRARY_PATH "
        "(NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 shows its reasons); or use parallel.attention_backend torch"
    )
