"""Construction of this rank's model from a recipe."""

import dataclasses
import re
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_vita import platform
from megatron_vita.config import (
    LanguageConfig,
    LayerMemory,
    ParallelConfig,
    Recipe,
    adapted_maps,
    layer_memory,
)
from megatron_vita.errors import ConfigError
from megatron_vita.model.backends.backends import AttentionBackend, TorchBackend, choose_backend
from megatron_vita.model.dora import DoraAdapter
from megatron_vita.model.lora import Adapter, adapters_of, attach, named_linears
from megatron_vita.model.quantized import check_quantization, set_packing
from megatron_vita.model.rotary import scale_rotary_positions
from megatron_vita.model.vita import VisionOptions, VitaModel
from megatron_vita.parallel import groups


def transformer_config(recipe: Recipe, *, fused: bool) -> TransformerConfig:
    """Build megatron-core's configuration of the language model.

    Args:
        recipe: a checked recipe.
        fused: use kernels that need Transformer Engine.

    Raises:
        ConfigError: megatron-core refuses the recipe.
    """
    try:
        return _transformer_config(recipe, fused=fused)
    except (ValueError, AssertionError) as error:
        message = f"megatron-core refuses model.language with parallel: {_in_our_words(error)}"
        raise ConfigError(message) from error


def _in_our_words(error: Exception) -> str:
    """Translate megatron-core's field names in an error to the recipe's."""
    # Both have fields of megatron-core's names, so that a name found in the text is the recipe's.
    message = " ".join(str(error).split()) or type(error).__name__
    for group, config in (("model.language", LanguageConfig), ("parallel", ParallelConfig)):
        for field in dataclasses.fields(config):
            message = re.sub(rf"\b(self\.)?{field.name}\b", f"{group}.{field.name}", message)
    return message


def _transformer_config(recipe: Recipe, *, fused: bool) -> TransformerConfig:
    shape = recipe.model.language
    parallel = recipe.parallel
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    attention_factor = shape.rope_scaling.attention_factor
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.layernorm_epsilon,
        init_method_std=shape.init_method_std,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_size,
        # Interleaved: with two stages, batched messages between chunks are silently mixed up.
        overlap_p2p_comm=parallel.virtual_size is not None,
        batch_p2p_comm=parallel.virtual_size is None,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        hierarchical_context_parallel_sizes=parallel.hierarchical_context_parallel_sizes or None,
        sequence_parallel=parallel.sequence_parallel,
        bf16=recipe.training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage or None,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage or None,
        **_recomputation(recipe),
        **_quantization(recipe, fused=fused),
        # Gradients are sums over loss tokens, divided once by their number in the global batch: a
        # mean per pack would weigh tokens of packs with few of them more.
        calculate_per_token_loss=True,
        # Keeps Transformer Engine from falling back to unfused attention.
        attention_backend=AttnBackend.fused,
        use_cpu_initialization=not platform.on_cuda(),
        # Transformer Engine's fused kernel supports no YaRN factor.
        apply_rope_fusion=fused and attention_factor == 1.0,
        bias_activation_fusion=fused,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    scale_rotary_positions(config, attention_factor)
    return config


def _recomputation(recipe: Recipe) -> dict[str, Any]:
    """Return megatron-core's recomputation fields, for what our own layers do not do themselves.

    `selective` recomputes the interior of named modules, `uniform` keeps the inputs of groups of
    layers. `layer_memory` configures our own layers.
    """
    training = recipe.training
    if training.recompute_granularity == "selective":
        modules = list(training.recompute_modules)
        # An MLP in pieces is recomputed by our layer: megatron-core would do it once more.
        if training.mlp_chunk_tokens and "mlp" in modules:
            modules.remove("mlp")
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    if training.recompute_granularity == "none" or training.recompute_method == "block":
        return {}
    return {
        "recompute_granularity": "full",
        "recompute_method": training.recompute_method,
        "recompute_num_layers": training.recompute_num_layers or 1,
    }


def _quantization(recipe: Recipe, *, fused: bool) -> dict[str, Any]:
    """Return megatron-core's fields of 8-bit linear layers, which only Transformer Engine has."""
    name = recipe.training.fp8_recipe
    if name == "none" or not fused:
        return {}
    return {
        # Gradients need the range of E5M2, unless each block of values has a scale of its own.
        "fp8": "e4m3" if name == "blockwise" else "hybrid",
        "fp8_recipe": name,
        # 8-bit weights kept from one forward pass to the next would miss an update between them.
        "disable_parameter_transpose_cache": True,
    }


def build_model(recipe: Recipe, *, backend: AttentionBackend | None = None) -> VitaModel:
    """Build this rank's stage of the model, where it is one chunk; see `build_chunks`."""
    (model,) = build_chunks(recipe, backend=backend)
    return model


def build_on_meta(recipe: Recipe) -> list[VitaModel]:
    """Build this rank's chunks without memory for weights. Groups must be initialized."""
    backend = TorchBackend()
    config = transformer_config(recipe, fused=False)
    # megatron-core's other way of initialization names a CUDA device, which would override `meta`.
    config.use_cpu_initialization = True
    with torch.device("meta"):
        chunks = [
            _assemble_chunk(recipe, config=config, backend=backend, chunk=chunk)
            for chunk in _chunks(recipe)
        ]
        for model in chunks:
            _add_adapters(model, recipe)
    return chunks


def build_chunks(recipe: Recipe, *, backend: AttentionBackend | None = None) -> list[VitaModel]:
    """Build this rank's chunks with weights initialized from `training.seed`.

    Groups must be initialized.

    Args:
        recipe: a checked recipe.
        backend: used instead of the one that the recipe names.

    Raises:
        PlatformError: this machine lacks what the recipe needs.
    """
    check_quantization(recipe)
    backend = backend or choose_backend(recipe)
    config = transformer_config(recipe, fused=backend.fused)
    # megatron-core's initial weights depend on the layout; `initialize_language` sets ours.
    config.perform_initialization = False
    # No weights come from these, but megatron-core's recomputation restores their states.
    torch.manual_seed(recipe.training.seed)
    model_parallel_cuda_manual_seed(recipe.training.seed, force_reset_rng=True)
    return [
        _build_chunk(recipe, config=config, backend=backend, chunk=chunk)
        for chunk in _chunks(recipe)
    ]


def _chunks(recipe: Recipe) -> range:
    return range(recipe.parallel.virtual_pipeline_model_parallel_size)


def _build_chunk(
    recipe: Recipe, *, config: TransformerConfig, backend: AttentionBackend, chunk: int
) -> VitaModel:
    model = _assemble_chunk(recipe, config=config, backend=backend, chunk=chunk)
    model.initialize_vision(recipe.training.seed)
    model.to(platform.device())
    model.initialize_language(recipe.training.seed)
    # After the parts' own initialization, which knows no adapters.
    _add_adapters(model, recipe)
    for _, adapter in adapters_of(model):
        adapter.initialize(recipe.training.seed)
    if recipe.lora.dropout:
        _number_passes(model)
    model.to(platform.device())
    if recipe.training.bf16:
        return model.bfloat16()
    return model


def _add_adapters(model: VitaModel, recipe: Recipe) -> None:
    """Add the recipe's adapters to a model chunk, without values."""
    linears = dict(named_linears(model))
    for adapted in adapted_maps(recipe.model, recipe.lora):
        linear = linears.get(adapted.linear.name)
        # Other pipeline stages and chunks have the others.
        if linear is None:
            continue
        kind = DoraAdapter if recipe.lora.dora else Adapter
        adapter = kind(
            adapted,
            rank=recipe.lora.rank,
            scale=recipe.lora.scale,
            sequence_parallel=recipe.parallel.sequence_parallel,
            dropout=recipe.lora.dropout,
            seed=recipe.training.seed,
        )
        if isinstance(adapter, DoraAdapter):
            adapter.bind(linear)
        attach(linear, adapter)


def _number_passes(model: VitaModel) -> None:
    """Let layers number the masks of their adapters' dropout."""
    for layer in model.language_model.decoder.layers:
        layer.dropouts = tuple(adapter.dropout for _, adapter in adapters_of(layer))


def take_rows_together(model: VitaModel) -> None:
    """Let no layer split its rows, whatever the recipe saves in training: in serving, adapters know
    each row by its place in the batch."""
    for layer in model.language_model.decoder.layers:
        layer.memory = LayerMemory()


def _assemble_chunk(
    recipe: Recipe, *, config: TransformerConfig, backend: AttentionBackend, chunk: int
) -> VitaModel:
    virtual = recipe.parallel.virtual_size is not None
    model = VitaModel(
        config,
        shapes=recipe.model,
        backend=backend,
        vision_options=VisionOptions(
            tensor_parallel=recipe.parallel.vision_tensor_parallel,
            tiles_at_once=recipe.training.vision_tiles_at_once,
            recompute=recipe.training.recompute_vision,
            recompute_method=recipe.training.recompute_vision_method,
        ),
        quantized=recipe.lora.quantizes,
        pre_process=groups.is_first_stage(chunk),
        post_process=groups.is_last_stage()
        and chunk == recipe.parallel.virtual_pipeline_model_parallel_size - 1,
        vp_stage=chunk if virtual else None,
    )
    layers = model.language_model.decoder.layers
    for layer, memory in zip(layers, layer_memory(recipe, len(layers)), strict=True):
        layer.memory = memory
    set_packing(model, recipe)
    return model


def freeze_parts(model: VitaModel, recipe: Recipe) -> None:
    """Disable the gradients of the parts that the recipe freezes, but for their adapters."""
    frozen = {
        "vision_model": recipe.training.freeze_vision_model,
        "projector": recipe.training.freeze_projector,
        "language_model": recipe.training.freeze_language_model,
    }
    # Later pipeline stages and text-only models lack some parts.
    for name, freeze in frozen.items():
        if freeze and hasattr(model, name):
            getattr(model, name).requires_grad_(False)
    for _, adapter in adapters_of(model):
        adapter.requires_grad_(True)
