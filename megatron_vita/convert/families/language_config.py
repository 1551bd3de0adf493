"""Configs of language models (qwen2, qwen3, llama) to LanguageConfig and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_vita.config import LanguageConfig
from megatron_vita.convert.families import idle_fields
from megatron_vita.convert.families.config_file import QUANTIZED, UNQUANTIZED, Config
from megatron_vita.convert.families.rotary_config import read_rotary, write_rotary
from megatron_vita.errors import CheckpointError
from megatron_vita.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Family:
    """A Hugging Face model type whose tensors have Llama's names."""

    architecture: str
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    # fields of its config with the values that make the model that is here, None for one left out
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_OWN = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", add_qkv_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_layernorm=True),
    # transformers' Llama has no window, whatever a config says
    "llama": Family(architecture="LlamaForCausalLM", needs={"sliding_window": (None,)}),
}
FAMILIES: Registry[Family] = Registry("language_family", _OWN)


def read_language(config: Config, *, tied: bool) -> LanguageConfig:
    """Read a language model's config.

    Args:
        tied: the output layer shares the weights of the word embedding.

    Raises:
        CheckpointError: the model does not implement an option; the message names the field.
    """
    family = FAMILIES[config.must_be("model_type", tuple(FAMILIES), None)]
    _check_options(config, family)
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    with config.naming():
        rotary_base, rope_scaling = read_rotary(config)
        return LanguageConfig(
            num_layers=config.integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=config.integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=config.integer("num_key_value_heads", heads),
            kv_channels=config.integer("head_dim", hidden // heads),
            vocab_size=config.integer("vocab_size"),
            layernorm_epsilon=config.number("rms_norm_eps", 1e-6),
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
            add_qkv_bias=family.add_qkv_bias,
            qk_layernorm=family.qk_layernorm,
            untie_embeddings_and_output_weights=not tied,
        )


def _check_options(config: Config, family: Family) -> None:
    """Fields that would make another model, and those that make none."""
    config.refuse(QUANTIZED, UNQUANTIZED)
    config.must_be("hidden_act", ("silu",), "silu")
    config.must_be("mlp_bias", (False,), False)
    # Qwen2's attention always has biases, and its implementation ignores this field.
    config.must_be("attention_bias", (False, True) if family.add_qkv_bias else (False,), False)
    config.must_be("partial_rotary_factor", (1.0,), 1.0)
    config.must_be("rope_interleaved", (False,), False)
    config.must_be("use_mrope", (False,), False)
    config.must_be("use_sliding_window", (False,), False)
    for name, values in family.needs.items():
        config.must_be(name, values, values[0])
    if set(config.get("layer_types", [])) - {"full_attention"}:
        raise config.wrong("layer_types", "only full_attention is supported")
    config.flag("tie_word_embeddings", False)
    for table in (idle_fields.COMMON, idle_fields.LANGUAGE, idle_fields.GENERATION):
        config.disregard(table)


def write_language(shape: LanguageConfig, base: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with the fields of `shape`; without a model type in `base`, the family
    is the one with the same layers."""
    family = base.get("model_type") or _family(shape)
    fields = {
        "architectures": base.get("architectures", [FAMILIES[family].architecture]),
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
    if not FAMILIES[family].add_qkv_bias:
        fields |= {"head_dim": shape.kv_channels, "attention_bias": False}
    elif shape.kv_channels * shape.num_attention_heads != shape.hidden_size:
        raise CheckpointError(
            f"model.language.kv_channels is {shape.kv_channels}: a {family} model has hidden_size / num_attention_heads "
            f"({shape.hidden_size} / {shape.num_attention_heads})"
        )
    fields |= write_rotary(shape.rotary_base, shape.rope_scaling, origin=base)
    return base | fields


def _family(shape: LanguageConfig) -> str:
    if shape.qk_layernorm and shape.add_qkv_bias:
        raise CheckpointError(
            "model.language.qk_layernorm and add_qkv_bias are both true: no Hugging Face family here has both"
        )
    if shape.qk_layernorm:
        return "qwen3"
    return "qwen2" if shape.add_qkv_bias else "llama"
