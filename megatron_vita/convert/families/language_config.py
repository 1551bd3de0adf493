"""Shapes of language models from Hugging Face configs and back: qwen2, qwen3, llama."""

import math
from typing import Any

from megatron_vita.config import LanguageConfig, RopeScalingConfig
from megatron_vita.convert.config_file import Config
from megatron_vita.errors import CheckpointError, ConfigError

FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_ROPE_KINDS = {
    "default": "none",
    "none": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}


def read_language(config: Config, *, tied: bool) -> LanguageConfig:
    """The shapes that a config describes; `tied`: whether the output layer is the word embedding.

    CheckpointError, naming the field, for what the model cannot do.
    """
    family = config.must_be("model_type", tuple(FAMILIES), None)
    config.must_be("hidden_act", ("silu",), "silu")
    config.must_be("use_sliding_window", (False,), False)
    config.must_be("mlp_bias", (False,), False)
    config.must_be("attention_bias", (False,) if family != "qwen2" else (False, True), False)
    config.must_be("partial_rotary_factor", (1.0,), 1.0)
    if set(config.get("layer_types", [])) - {"full_attention"}:
        raise CheckpointError(
            f"{config.where}: layer_types has {config.get('layer_types')}: only full_attention is supported"
        )
    hidden, heads = config.need("hidden_size"), config.need("num_attention_heads")
    try:
        return LanguageConfig(
            num_layers=config.need("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=config.need("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads", heads),
            kv_channels=config.get("head_dim", hidden // heads),
            vocab_size=config.need("vocab_size"),
            layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
            rotary_base=float(_rope(config).get("rope_theta", config.get("rope_theta", 10000.0))),
            rope_scaling=_read_scaling(config),
            add_qkv_bias=family == "qwen2",
            qk_layernorm=family == "qwen3",
            untie_embeddings_and_output_weights=not tied,
        )
    except ConfigError as error:
        raise CheckpointError(f"{config.where}: {error}") from error


def write_language(shape: LanguageConfig, base: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `shape`; a base without a model type becomes the family that has
    such layers."""
    family = base.get("model_type") or _family(shape)
    fields = {
        "architectures": base.get("architectures", [FAMILIES[family]]),
        "model_type": family,
        "hidden_act": "silu",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.layernorm_epsilon,
        "tie_word_embeddings": not shape.untie_embeddings_and_output_weights,
    }
    if family != "qwen2":
        fields |= {"head_dim": shape.kv_channels, "attention_bias": False}
    elif shape.kv_channels * shape.num_attention_heads != shape.hidden_size:
        raise CheckpointError(
            f"model.language.kv_channels is {shape.kv_channels}: a Qwen2 model has hidden_size / num_attention_heads "
            f"({shape.hidden_size} / {shape.num_attention_heads})"
        )
    scaling = _write_scaling(shape.rope_scaling)
    if "rope_theta" in base:
        fields |= {"rope_theta": shape.rotary_base, "rope_scaling": scaling}
    else:
        fields["rope_parameters"] = {
            "rope_theta": shape.rotary_base,
            **(scaling or {"rope_type": "default"}),
        }
    return base | fields


def _family(shape: LanguageConfig) -> str:
    if shape.qk_layernorm and shape.add_qkv_bias:
        raise CheckpointError(
            "model.language.qk_layernorm and add_qkv_bias are both true: no Hugging Face family here has both"
        )
    return "qwen3" if shape.qk_layernorm else "qwen2" if shape.add_qkv_bias else "llama"


def _rope(config: Config) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _read_scaling(config: Config) -> RopeScalingConfig:
    rope = Config(_rope(config), f"{config.where}: rotary positions")
    kind = rope.must_be("rope_type", tuple(_ROPE_KINDS), rope.get("type", "default"))
    kind = _ROPE_KINDS[kind]
    if kind == "none":
        return RopeScalingConfig()
    if kind == "linear":
        return RopeScalingConfig(kind=kind, factor=float(rope.need("factor")))
    # Where the original length is not given, transformers takes the whole length for it.
    length = rope.get("original_max_position_embeddings") or config.need("max_position_embeddings")
    if kind == "llama3":
        return RopeScalingConfig(
            kind=kind,
            factor=float(rope.need("factor")),
            original_length=length,
            low_freq_factor=float(rope.need("low_freq_factor")),
            high_freq_factor=float(rope.need("high_freq_factor")),
        )
    factor = float(rope.get("factor") or config.need("max_position_embeddings") / length)
    return RopeScalingConfig(
        kind=kind,
        factor=factor,
        original_length=length,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate", True),
        attention_scale=_attention_scale(rope, factor),
    )


def _attention_scale(rope: Config, factor: float) -> float:
    """0 where transformers would compute it from the factor alone."""
    mscale, over = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is not None:
        return float(rope.get("attention_factor"))
    if mscale and over:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * over * math.log(factor) + 1)
    return 0.0


def _write_scaling(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        fields |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        fields |= {"attention_factor": scaling.attention_scale} if scaling.attention_scale else {}
    return fields
