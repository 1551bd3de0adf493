"""Configs of vision towers (InternViT, CLIP, SigLIP, EVA2-CLIP) to VisionConfig and back."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from megatron_vita.config import VisionConfig
from megatron_vita.convert.families import idle_fields
from megatron_vita.convert.families.config_file import QUANTIZED, UNQUANTIZED, Config, updated

_NORMS: dict[str, Literal["LayerNorm", "RMSNorm"]] = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
}
# transformers 4 left out of the vision part of a whole model what its class has as default.
_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def read_internvit(config: Config) -> VisionConfig:
    """Read InternViT's config, in OpenGVLab's format (`intern_vit_6b`) or transformers'
    (`internvl_vision`)."""
    hf = config.get("model_type") == "internvl_vision"
    config.must_be("hidden_act", ("gelu",), "gelu")
    config.must_be("num_channels", (3,), 3)
    config.must_be("use_moe", (False,), False)
    if hf:
        config.must_be("use_absolute_position_embeddings", (True,), False)
        config.must_be("use_mask_token", (False,), False)
        config.must_be("use_mean_pooling", (True,), True)
        norm = config.must_be("norm_type", tuple(_NORMS), "layer_norm")
        qk_norm = config.flag("use_qk_norm", False)
        bias = config.flag("attention_bias", False)
    else:
        # OpenGVLab's defaults are those of its 6B model
        norm = config.must_be("norm_type", tuple(_NORMS), "rms_norm")
        qk_norm = config.flag("qk_normalization", True)
        bias = config.flag("qkv_bias", False)
    with config.naming():
        return VisionConfig(
            **_common(config),
            normalization=_NORMS[norm],
            qk_layernorm=qk_norm,
            add_qkv_bias=bias,
        )


def read_clip(config: Config) -> VisionConfig:
    """Read CLIP's vision config, alone or inside a whole CLIP."""
    config = _tower_of(config, defaults=_BASE)
    config.must_be("attention_bias", (True,), True)
    config.must_be("hidden_act", ("quick_gelu", "gelu"), "quick_gelu")
    config.must_be("num_channels", (3,), 3)
    return _built(
        config,
        activation=config.get("hidden_act", "quick_gelu"),
        layernorm_epsilon=config.number("layer_norm_eps", 1e-5),
        patch_size=config.side("patch_size", 32),
        patch_bias=False,
        pre_norm=True,
    )


def read_siglip(config: Config) -> VisionConfig:
    """Read SigLIP's vision config, alone or inside a whole SigLIP."""
    config = _tower_of(config, defaults=_BASE)
    config.must_be("attention_bias", (True,), True)
    config.must_be("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    config.must_be("num_channels", (3,), 3)
    return _built(
        config,
        activation="gelu_tanh",
        patch_size=config.side("patch_size", 16),
        class_token=False,
        post_norm=True,
    )


def read_eva(config: Config) -> VisionConfig:
    """Read the config of EVA2-CLIP, which is the `vision_config` of GLM-4V."""
    config.need("vision_config")
    tower = _tower_of(config)
    tower.must_be("hidden_act", ("gelu",), "gelu")
    tower.must_be("in_channels", (3,), 3)
    tower.disregard(("num_positions", "dropout_prob"))
    return _built(tower, heads="num_heads", norm_after=True)


def _tower_of(config: Config, *, defaults: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Return the vision part of a whole model's config, with `defaults` for missing fields; all
    other fields are disregarded.

    Raises:
        CheckpointError: `vision_config_dict`, which transformers prefers, contradicts it.
    """
    if not config.get("vision_config"):
        return config
    tower = config.part("vision_config")
    for name, value in (config.get("vision_config_dict") or {}).items():
        if tower.values.get(name, value) != value:
            raise tower.wrong(name, f"but vision_config_dict says {value!r}: they must agree")
    config.disregard(config.values)
    return tower.with_defaults(defaults)


def _built(config: Config, *, heads: str = "num_attention_heads", **fields: Any) -> VisionConfig:
    """Build the config of a tower without LayerScale; `heads` is the field with the number of
    heads."""
    fields = _common(config, heads=heads) | {"layer_scale": False} | fields
    fields["ragged_grid"] = fields["image_size"] % (2 * fields["patch_size"]) != 0
    with config.naming():
        return VisionConfig(**fields)


def _common(config: Config, *, heads: str = "num_attention_heads") -> dict[str, Any]:
    config.refuse(QUANTIZED, UNQUANTIZED)
    for table in (idle_fields.COMMON, idle_fields.VISION, idle_fields.GENERATION):
        config.disregard(table)
    return {
        "image_size": config.side("image_size", 224),
        "patch_size": config.side("patch_size", 14),
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": config.integer("hidden_size"),
        "ffn_hidden_size": config.integer("intermediate_size"),
        "num_attention_heads": config.integer(heads),
        "layernorm_epsilon": config.number("layer_norm_eps", 1e-6),
    }


def write_internvit(shape: VisionConfig, base: dict[str, Any], *, hf: bool) -> dict[str, Any]:
    """Return `base` updated with the fields of `shape`, in transformers' format if `hf`."""
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


def write_clip(shape: VisionConfig, base: dict[str, Any], *, siglip: bool) -> dict[str, Any]:
    """Return `base`, or its vision part, updated with the fields of `shape`."""
    base = base.get("vision_config", base)
    model_type = "siglip_vision_model" if siglip else "clip_vision_model"
    architecture = "SiglipVisionModel" if siglip else "CLIPVisionModel"
    activation: str = shape.activation
    if activation == "gelu_tanh":
        activation = "gelu_pytorch_tanh"
    fields = {
        "model_type": model_type,
        "architectures": base.get("architectures") or [architecture],
        "hidden_act": activation,
    }
    return updated(base, _written(shape) | fields)


def write_eva(shape: VisionConfig, base: dict[str, Any]) -> dict[str, Any]:
    """Return `base`, a GLM-4V config, with its vision part updated with the fields of `shape`."""
    heads = {
        "num_heads": shape.num_attention_heads,
        "num_positions": shape.tokens,
        "hidden_act": "gelu",
    }
    fields = {
        name: value for name, value in _written(shape).items() if name != "num_attention_heads"
    }
    vision = updated(base.get("vision_config", {}), fields | heads | {"in_channels": 3})
    return base | {"model_type": "chatglm", "vision_config": vision}


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
