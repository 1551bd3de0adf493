"""Attention backends: how layers are built, and what they are told of a pack's documents.

`torch` runs everywhere. `te` is Transformer Engine's layer, untouched, for CUDA. Both write the
same checkpoint.
"""

import logging
from typing import Any, Protocol

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.errors import PlatformError
from megatron_vita.model.attention import DocumentAttention
from megatron_vita.model.documents import pack_documents
from megatron_vita.model.norm import RMSNorm
from megatron_vita.parallel import groups

logger = logging.getLogger(__name__)


class AttentionBackend(Protocol):
    """What the language model asks of a backend."""

    def block_spec(
        self, num_layers: int, *, qk_layernorm: bool
    ) -> ModuleSpec | TransformerBlockSubmodules:
        """The layers of a pipeline stage; `qk_layernorm`: with an RMSNorm of each query and key
        head."""

    def describe(self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor) -> tuple[Any, Tensor]:
        """The pack for attention, and rotary angles, from the documents' bounds [D+1] on the
        host."""


def rotary_angles(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Angles of rotary positions, halves side by side: positions [t] -> [t, 1, 1, d], fp32."""
    angles = positions[:, None].float() * inverse_frequencies
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


class TorchBackend:
    """Exact attention by torch's scaled_dot_product_attention, document by document."""

    def block_spec(self, num_layers: int, *, qk_layernorm: bool) -> TransformerBlockSubmodules:
        """megatron-core's local layers with our norm and core attention."""
        submodules = get_gpt_layer_local_submodules(normalization="RMSNorm")
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        attention = submodules.self_attention.submodules
        attention.core_attention = DocumentAttention
        if qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)

    def describe(self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor) -> tuple[Any, Tensor]:
        """Rows grouped by document; angles of this rank's rows."""
        layout = groups.rank_layout()
        documents, positions = pack_documents(
            cu_seqlens,
            cp_size=layout.cp_size,
            cp_rank=layout.cp_rank,
            cp_group=groups.context_group() if layout.cp_size > 1 else None,
        )
        device = inverse_frequencies.device
        return documents.to(device), rotary_angles(positions.to(device), inverse_frequencies)


class TransformerEngineBackend:
    """Transformer Engine's layers in THD layout."""

    def block_spec(self, num_layers: int, *, qk_layernorm: bool) -> ModuleSpec:
        """megatron-core's Transformer Engine layer, whose attention refuses to run unfused."""
        from megatron_vita.model.fused_attention import FusedAttention

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        layer.submodules.self_attention.submodules.core_attention = FusedAttention
        return layer

    def describe(self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor) -> tuple[Any, Tensor]:
        """One tensor as padded and unpadded bounds; angles of the longest document, which each
        document restarts."""
        longest = int(cu_seqlens.diff().max())
        device = inverse_frequencies.device
        bounds = cu_seqlens.to(device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=bounds,
            cu_seqlens_kv_padded=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            # else Transformer Engine compares the two tensors on the device, every layer
            pad_between_seqs=False,
        )
        return packed, rotary_angles(torch.arange(longest, device=device), inverse_frequencies)


def choose_backend(recipe: Recipe) -> AttentionBackend:
    """The backend that a recipe names; `auto` takes Transformer Engine where it and CUDA are
    present, in bf16.

    PlatformError if Transformer Engine is missing or finds no fused attention.
    """
    name = recipe.parallel.attention_backend
    usable = platform.on_cuda() and platform.has_transformer_engine()
    if name == "te" and not usable:
        missing = "Transformer Engine" if platform.on_cuda() else "CUDA"
        raise PlatformError(
            f"parallel.attention_backend is te, but {missing} is not present; use torch or auto"
        )
    if name == "te" or (name == "auto" and usable and recipe.training.bf16):
        _check_fused_attention(recipe)
        return TransformerEngineBackend()
    if platform.on_cuda() and name == "auto" and not usable:
        logger.warning(
            "Transformer Engine is not installed: the slower torch attention backend is used"
        )
    return TorchBackend()


def _check_fused_attention(recipe: Recipe) -> None:
    from megatron_vita.model.fused_attention import check_fused_attention

    language, tp = recipe.model.language, recipe.parallel.tensor_model_parallel_size
    check_fused_attention(
        heads=language.num_attention_heads // tp,
        query_groups=language.num_query_groups // tp,
        width=language.kv_channels,
        dtype=torch.bfloat16,
    )
