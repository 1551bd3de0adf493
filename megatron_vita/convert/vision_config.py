"""Shapes of vision towers from Hugging Face configs and back."""

from typing import Any

from megatron_vita.config import VisionConfig
from megatron_vita.convert.config_file import Config, updated
from megatron_vita.errors import CheckpointError, ConfigError

_NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}


def read_internvit(config: Config) -> VisionConfig:
    """InternViT, in the original layout (`intern_vit_6b`) or transformers' (`internvl_vision`)."""
    hf = config.get("model_type") == "internvl_vision"
    config.must_be("hidden_act", ("gelu",), "gelu")
    config.must_be("num_channels", (3,), 3)
    if hf:
        config.must_be("use_absolute_position_embeddings", (True,), False)
        config.must_be("use_mask_token", (False,), False)
        config.must_be("use_mean_pooling", (True,), True)
    try:
        return VisionConfig(
            **_common(config),
            normalization=_NORMS[config.must_be("norm_type", tuple(_NORMS), "layer_norm" if hf else "rms_norm")],
            qk_layernorm=config.get("use_qk_norm", False) if hf else config.get("qk_normalization", True),
            add_qkv_bias=config.get("attention_bias" if hf else "qkv_bias", False),
        )
    except ConfigError as error:
        raise CheckpointError(f"{config.where}: {error}") from error


def _common(config: Config) -> dict[str, Any]:
    return {
        "image_size": config.side("image_size", 224),
        "patch_size": config.side("patch_size", 14),
        "num_layers": config.need("num_hidden_layers"),
        "hidden_size": config.need("hidden_size"),
        "ffn_hidden_size": config.need("intermediate_size"),
        "num_attention_heads": config.need("num_attention_heads"),
        "layernorm_epsilon": config.get("layer_norm_eps", 1e-6),
    }


def write_internvit(shape: VisionConfig, base: dict[str, Any], *, hf: bool) -> dict[str, Any]:
    """`base` with the fields of `shape`; `hf`: transformers' layout."""
    norm = next(theirs for theirs, ours in _NORMS.items() if ours == shape.normalization)
    fields = _written(shape) | {"norm_type": norm, "hidden_act": "gelu"}
    if hf:
        fields |= {
            "model_type": "internvl_vision",
            "architectures": base.get("architectures", ["InternVLVisionModel"]),
            "use_qk_norm": shape.qk_layernorm,
            "attention_bias": shape.add_qkv_bias,
            "use_absolute_position_embeddings": True,
        }
        sides = {name: [fields[name]] * 2 for name in ("image_size", "patch_size")}
        return updated(sides | base, fields)
    fields |= {
        "model_type": "intern_vit_6b",
        "architectures": base.get("architectures", ["InternVisionModel"]),
        "qk_normalization": shape.qk_layernorm,
        "qkv_bias": shape.add_qkv_bias,
    }
    return updated(base, fields)


def _written(shape: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "layer_norm_eps": shape.layernorm_epsilon,
    }
