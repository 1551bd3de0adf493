"""Attention backends: layer specifications, and attention metadata of a pack's documents.

`torch` runs everywhere. `te` is Transformer Engine's layer, unchanged, for CUDA. `fa4` is that
layer with FlashAttention-4's kernels as core attention. All write the same checkpoint.
"""

import dataclasses
import functools
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
from megatron_vita.config.groups.parallel import ATTENTION_BACKENDS
from megatron_vita.errors import PlatformError
from megatron_vita.model.backends.attention import DocumentAttention
from megatron_vita.model.backends.documents import pack_documents
from megatron_vita.model.backends.flash_attention import (
    AttentionKernel,
    FlashAttention,
    PackedSequences,
    sequences_of_rank,
)
from megatron_vita.model.backends.norm import RMSNorm
from megatron_vita.parallel import groups
from megatron_vita.platform.pinned import to_device

logger = logging.getLogger(__name__)


class AttentionBackend(Protocol):
    """Interface of a backend to the language model."""

    name: str  # in recipes
    # Transformer Engine's kernels are used for rotary positions and activations too.
    fused: bool

    def block_spec(
        self, num_layers: int, *, qk_layernorm: bool
    ) -> ModuleSpec | TransformerBlockSubmodules:
        """Return the layers of a pipeline stage.

        Args:
            num_layers: layers of the stage.
            qk_layernorm: with an RMSNorm of each query and key head.
        """

    def attention_metadata(
        self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor
    ) -> tuple[Any, Tensor]:
        """Return a pack's attention metadata and rotary angles.

        Args:
            cu_seqlens: bounds of the documents [D+1], on the host.
            inverse_frequencies: see `rotary.inverse_frequencies`; its device is that of the
                results.
        """


def rotary_angles(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Compute rotary angles, halves side by side: positions [t] -> [t, 1, 1, d], fp32."""
    angles = positions[:, None].float() * inverse_frequencies
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


class TorchBackend:
    """Exact attention by torch's scaled_dot_product_attention, in groups of equally long
    documents."""

    name: str = "torch"
    fused = False

    def block_spec(self, num_layers: int, *, qk_layernorm: bool) -> TransformerBlockSubmodules:
        """Return megatron-core's local layers with our norm and core attention."""
        submodules = get_gpt_layer_local_submodules(normalization="RMSNorm")
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        attention = submodules.self_attention.submodules
        attention.core_attention = DocumentAttention
        if qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)

    def attention_metadata(
        self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor
    ) -> tuple[Any, Tensor]:
        """Return rows grouped by document, and the angles of this rank's rows."""
        layout = groups.rank_layout()
        documents, positions = pack_documents(
            cu_seqlens,
            cp_size=layout.cp_size,
            cp_rank=layout.cp_rank,
            cp_group=groups.context_group() if layout.cp_size > 1 else None,
        )
        device = inverse_frequencies.device
        return documents.to(device), rotary_angles(
            to_device(positions, device), inverse_frequencies
        )


def _fused_layer(*, qk_layernorm: bool, separate_norms: bool) -> ModuleSpec:
    """Return megatron-core's Transformer Engine layer.

    separate_norms: norms are modules of their own, so that adapters see the linear maps' inputs;
        the checkpoint is the same.
    """
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    if separate_norms:
        # Imported here, as Transformer Engine is an optional package.
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        provider = TESpecProvider()
        submodules = layer.submodules
        submodules.input_layernorm = submodules.pre_mlp_layernorm = provider.layer_norm()
        submodules.self_attention.submodules.linear_qkv = provider.column_parallel_linear()
        mlp = dataclasses.replace(
            submodules.mlp.keywords["submodules"], linear_fc1=provider.column_parallel_linear()
        )
        submodules.mlp = functools.partial(submodules.mlp.func, submodules=mlp)
        submodules.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
    return layer


class TransformerEngineBackend:
    """Transformer Engine's layers in THD layout."""

    name: str = "te"
    fused = True

    def __init__(self, *, separate_norms: bool = False) -> None:
        self.separate_norms = separate_norms

    def block_spec(self, num_layers: int, *, qk_layernorm: bool) -> ModuleSpec:
        """Return megatron-core's Transformer Engine layer, with attention that refuses to run
        unfused."""
        # Imported here, as Transformer Engine is an optional package.
        from megatron_vita.model.backends.fused_attention import FusedAttention

        layer = _fused_layer(qk_layernorm=qk_layernorm, separate_norms=self.separate_norms)
        layer.submodules.self_attention.submodules.core_attention = FusedAttention
        return layer

    def attention_metadata(
        self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor
    ) -> tuple[Any, Tensor]:
        """Return THD parameters, and the angles of the longest document, restarted in each
        document."""
        longest = int(cu_seqlens.diff().max())
        device = inverse_frequencies.device
        packed = PackedSeqParams(**_thd(cu_seqlens, device))
        return packed, rotary_angles(torch.arange(longest, device=device), inverse_frequencies)


def _thd(cu_seqlens: Tensor, device: torch.device) -> dict[str, Any]:
    """Return PackedSeqParams' fields for documents without padding, of equal query and key rows."""
    longest = int(cu_seqlens.diff().max())
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    return {
        "qkv_format": "thd",
        **dict.fromkeys(names, to_device(cu_seqlens, device)),
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        # Otherwise Transformer Engine compares the two tensors on the device in every layer, and
        # the host waits for the answer.
        "pad_between_seqs": False,
    }


class FlashBackend:
    """Transformer Engine's layers around FlashAttention-4's kernels, or around another `kernel`."""

    name: str = "fa4"
    fused = True

    def __init__(
        self, kernel: AttentionKernel | None = None, *, separate_norms: bool = False
    ) -> None:
        if kernel is None:
            from megatron_vita.model.backends.fa4 import FlashAttention4

            kernel = FlashAttention4()
        self.kernel = kernel
        self.separate_norms = separate_norms

    def block_spec(
        self, num_layers: int, *, qk_layernorm: bool
    ) -> ModuleSpec | TransformerBlockSubmodules:
        """Return megatron-core's Transformer Engine layer with our core attention."""
        layer = _fused_layer(qk_layernorm=qk_layernorm, separate_norms=self.separate_norms)
        layer.submodules.self_attention.submodules.core_attention = FlashAttention
        return layer

    def attention_metadata(
        self, cu_seqlens: Tensor, *, inverse_frequencies: Tensor
    ) -> tuple[Any, Tensor]:
        """Return documents for rotary positions with this rank's sequences for the kernel, and
        the angles of the longest document."""
        longest = int(cu_seqlens.diff().max())
        device = inverse_frequencies.device
        group = groups.context_group() if groups.rank_layout().cp_size > 1 else None
        bounds, gathered_keys = sequences_of_rank(cu_seqlens, group=group, device=device)
        packed = PackedSequences(
            **_thd(cu_seqlens, device),
            kernel=self.kernel,
            bounds=bounds,
            gathered_keys=gathered_keys,
        )
        return packed, rotary_angles(torch.arange(longest, device=device), inverse_frequencies)


def choose_backend(recipe: Recipe) -> AttentionBackend:
    """Return the backend named by a recipe; for `auto` the fastest one that can run, in bf16 on
    CUDA.

    Raises:
        PlatformError: the backend's packages or hardware are missing, or it computes wrong results
            here.
    """
    name: str = recipe.parallel.attention_backend
    if name == "auto":
        name = _fastest_backend(recipe)
        if name == "torch" and recipe.training.fp8_recipe != "none":
            raise PlatformError(
                f"training.fp8_recipe is {recipe.training.fp8_recipe}, but this machine has only "
                "attention_backend torch, without 8-bit layers: set it to none"
            )
    elif missing := _missing_for(name, recipe):
        raise PlatformError(
            f"parallel.attention_backend is {name}, but {missing}; use another of "
            f"{', '.join(ATTENTION_BACKENDS)}"
        )
    if name == "fa4":
        from megatron_vita.model.backends.fa4 import check_fa4

        # Some combinations of GPU, package and head width compute wrong numbers without an error.
        check_fa4(**_attention_shape(recipe))
        return FlashBackend(separate_norms=recipe.lora.rank > 0)
    if name == "te":
        from megatron_vita.model.backends.fused_attention import check_fused_attention

        check_fused_attention(**_attention_shape(recipe))
        return TransformerEngineBackend(separate_norms=recipe.lora.rank > 0)
    return TorchBackend()


def _fastest_backend(recipe: Recipe) -> str:
    """Return fa4, te or torch, and log the reasons against the faster ones."""
    if not (platform.on_cuda() and recipe.training.bf16):
        return "torch"
    reasons = {name: _missing_for(name, recipe) for name in ("fa4", "te")}
    chosen = next((name for name, missing in reasons.items() if not missing), "torch")
    refused = [f"not {name}: {missing}" for name, missing in reasons.items() if missing]
    if refused:
        level = logging.WARNING if chosen == "torch" else logging.INFO
        logger.log(level, "parallel.attention_backend auto: %s (%s)", chosen, "; ".join(refused))
    return chosen


def _missing_for(name: str, recipe: Recipe) -> str:
    """Return the reason a backend cannot run on this machine or for this recipe; empty if it
    can."""
    if name == "torch":
        return ""
    if not platform.on_cuda():
        return "CUDA is not present"
    if not platform.has_transformer_engine():
        return "Transformer Engine is not installed (requirements-gpu.txt)"
    if name == "fa4":
        return _missing_for_fa4(recipe)
    return ""


def _missing_for_fa4(recipe: Recipe) -> str:
    if not platform.has_flash_attention_4():
        return "FlashAttention-4 is not installed (pip install flash-attn-4, requirements-gpu.txt)"
    if torch.cuda.get_device_capability() < (9, 0):
        return f"{torch.cuda.get_device_name()} is older than Hopper"
    return recipe.fa4_obstacle()


def _attention_shape(recipe: Recipe) -> dict[str, Any]:
    """Return the shape of attention on one rank, as arguments of the kernel checks."""
    language = recipe.model.language
    tp = recipe.parallel.tensor_model_parallel_size
    return {
        "heads": language.num_attention_heads // tp,
        "query_groups": language.query_groups_of_rank(tp),
        "width": language.kv_channels,
        "dtype": torch.bfloat16,
    }
